"""README.md of an exported folder: what the model is, how it was trained, how to run it."""

from pathlib import PurePath

from model.LMConfig import LMConfig

STAGES = {
    "pretrain": "a base model, trained to continue text", "full_sft": "a chat model, trained on conversations",
    "lora": "a chat model with a low-rank adapter merged in", "dpo": "a chat model, trained on preference pairs",
    "full_dist": "a chat model, distilled from a larger one", "reason": "a model that thinks before it answers",
    "grpo": "a reasoning model, trained by reinforcement",
}  # fmt: skip
SETTINGS = ("data", "seq_len", "rows_per_step", "epochs", "max_steps", "learning_rate", "optimizer", "schedule",
            "warmup", "weight_decay", "grad_clip", "seed")  # fmt: skip
RESULTS = ("steps", "tokens", "seconds", "loss", "val_loss", "val_bits_per_byte")
UNITS = {"seconds": "s", "loss": "nats a token", "val_loss": "nats a token", "val_bits_per_byte": "bits a byte"}


def model_card(name: str, config: LMConfig, exported: dict, record: dict, chat: bool) -> str:
    """The Markdown text. exported: the content of config.json; record: the training record, {} if there is none."""
    stage = record.get("stage")
    tags = "".join(f"- {tag}\n" for tag in ["minimind", *([stage] if stage else [])])
    head = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlanguage:\n- zh\n- en\ntags:\n{tags}---\n"
    what = STAGES.get(stage, "a language model")
    return "\n".join([
        head,
        f"# {name}\n",
        f"{what[0].upper()}{what[1:]}; {config.parameter_count():,} parameters{_active(config)}. "
        f"The class is transformers' `{exported['architectures'][0]}`: no remote code.\n",
        _table("Shape", _shape(config, exported)),
        _training(record),
        _usage(name, chat),
        "A model of this size says wrong things fluently: do not rely on what it states as fact.\n",
    ])  # fmt: skip


def public_record(record: dict) -> dict:
    """The record with file names in place of paths, which would tell about the machine that trained the model."""
    out = dict(record)
    if isinstance(out.get("came_from"), str):
        out["came_from"] = _file_name(out["came_from"])
    if isinstance(out.get("result"), dict) and isinstance(out["result"].get("weights"), str):
        out["result"] = out["result"] | {"weights": _file_name(out["result"]["weights"])}
    if isinstance(out.get("taught"), dict):  # nor rows of its data
        out["taught"] = {stage: told | {"examples": []} for stage, told in out["taught"].items()}
    return out


def _file_name(text: str) -> str:
    return PurePath(text).name if "/" in text or "\\" in text else text


def _active(config: LMConfig) -> str:
    return f", {config.active_parameter_count():,} of them active for a token" if config.use_moe else ""


def _shape(config: LMConfig, exported: dict) -> dict:
    rows = {
        "layers": config.n_layers, "width": config.dim,
        "heads": f"{config.n_heads} query, {config.n_kv_heads} key/value, {config.head_dim} wide",
        "vocabulary": config.vocab_size, "context": f"{config.max_seq_len} positions", "stored as": exported["dtype"],
    }  # fmt: skip
    if config.use_moe:
        shared = config.n_shared_experts
        rows["experts"] = f"{config.num_experts_per_tok} of {config.n_routed_experts}, {shared} shared, " \
                          f"{config.moe_hidden_dim} wide"  # fmt: skip
    else:
        rows["feed-forward"] = config.hidden_dim
    return rows


def _training(record: dict) -> str:
    if not record.get("stage"):
        return "## Training\n\nThe weights came without a record of their training.\n"
    recipe, result = record.get("recipe") or {}, record.get("result") or {}
    rows = {"stage": record["stage"], "started from": public_record(record).get("came_from")}
    rows |= {key: recipe.get(key) for key in SETTINGS} | {key: result.get(key) for key in RESULTS}
    if record.get("lora"):
        rows["merged adapter"] = record["lora"]
    return _table("Training", {key: value for key, value in rows.items() if value is not None})


def _table(title: str, rows: dict) -> str:
    lines = [f"| {key} | {_cell(value)}{' ' + UNITS[key] if key in UNITS else ''} |" for key, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""])


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _usage(name: str, chat: bool) -> str:
    ask = (
        'chat = [{"role": "user", "content": "你好"}]\n'
        'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)"
        if chat
        else 'inputs = tokenizer("春天", return_tensors="pt")  # the start token is put before it'
    )
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{ask}
out = model.generate(**inputs, max_new_tokens=256, do_sample=True, temperature=0.85, top_p=0.85)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
