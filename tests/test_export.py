"""Exported folders: transformers computes the same from them, 4 and 5; and back; the program around it."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from stage import ROOT, last_json, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import RunFailed, UserError, run_main
from export.counterpart import model_type, transformers_config
from export.tokenizer_files import exported_template
from export.transformers_folder import FILES, write_transformers_folder
from model.chat_template import CHAT_TEMPLATE
from model.LMConfig import LMConfig
from model.lora import add_lora, save_lora
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render
from model.weights import load_model, save_weights

spec = importlib.util.spec_from_file_location("export_model", ROOT / "scripts/export_model.py")
export_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(export_model)

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 512,
         "initializer_range": 0.2}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
KINDS = {
    "llama": {},
    "untied": {"tie_word_embeddings": False, "head_dim": 32},
    "yarn": {"rope_parameters": YARN},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "granite": {"use_moe": True, "moe_hidden_dim": 64, "n_shared_experts": 2},
    "granite_top1": {"use_moe": True, "moe_hidden_dim": 32, "num_experts_per_tok": 1},
    "qwen3_moe": {"use_moe": True, "qk_norm": True, "n_shared_experts": 0},
    "qwen3_moe_raw": {"use_moe": True, "qk_norm": True, "n_shared_experts": 0, "norm_topk_prob": False},
}
CLASS = {
    "llama": "LlamaForCausalLM", "untied": "LlamaForCausalLM", "yarn": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "granite": "GraniteMoeSharedForCausalLM",
    "granite_top1": "GraniteMoeSharedForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_moe_raw": "Qwen3MoeForCausalLM",
}  # fmt: skip
RECORD = {
    "stage": "full_sft", "seq_len": 64, "came_from": "/home/someone/out/pretrain_64.pth",
    "recipe": {"learning_rate": 0.001, "data": ["sft-0123"]},
    "result": {"steps": 7, "tokens": 1234, "val_loss": 2.125, "weights": "/home/someone/out/full_sft_64.pth"},
}  # fmt: skip
TEXTS = ["你好，世界！", "Hello  world\n\n\tx=12345", "<|im_start|>user\n1+1<|im_end|>", "<think>\n好</think>😀"]


def build(kind: str, **changes) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(**(SHAPE | KINDS[kind] | changes))).eval()


def some_ids(rows=2, length=100):
    return torch.randint(0, 6400, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: (our model, the folder it was exported to)}."""
    root, made = tmp_path_factory.mktemp("export"), {}
    for kind in KINDS:
        folder = root / kind
        folder.mkdir()
        made[kind] = build(kind), folder
        write_transformers_folder(folder, made[kind][0], load_tokenizer(), RECORD, kind)
    return made


# --------------------------------------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_without_our_code(folders, kind):
    ours, folder = folders[kind]
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == CLASS[kind] and type(theirs).__module__.startswith("transformers.models.")
    ids = some_ids()
    a, b = logits(ours, ids), logits(theirs, ids)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert sum(p.numel() for p in theirs.parameters()) == ours.config.parameter_count()
    prompt = ids[:1, :10]
    same = [m.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None) for m in (ours, theirs)]
    assert torch.equal(*same)


@pytest.mark.parametrize("kind", KINDS)
def test_and_back_to_the_last_bit(folders, kind):
    ours, folder = folders[kind]
    again, tokenizer, record = load_model(folder)
    mine, theirs = ours.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    left_out = {"hidden_dim", "multiple_of", "seq_aux"} if ours.config.use_moe else {
        "aux_loss_alpha", "multiple_of", "moe_hidden_dim"}  # fmt: skip
    for key in ours.config.fields().keys() - left_out:
        assert getattr(again.config, key) == getattr(ours.config, key), key
    assert tokenizer("你好")["input_ids"] == load_tokenizer()("你好")["input_ids"]
    assert record["result"]["tokens"] == 1234


@pytest.mark.parametrize(
    "change, words",
    [
        ({"qk_norm": True}, "shared experts and qk_norm"),
        ({"n_shared_experts": 0}, "neither shared experts nor qk_norm"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_what_no_class_computes_is_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        model_type(LMConfig(**(SHAPE | {"use_moe": True} | change)))


def test_half_precision_is_stored_as_such_and_overflow_refused(tmp_path):
    model = build("llama")
    write_transformers_folder(tmp_path, model, load_tokenizer(), {}, "half", "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight.bfloat16())
    with torch.no_grad():
        model.model.norm.weight[3] = 70000.0  # the largest float16 is 65504
    with pytest.raises(ValueError, match="model.norm.weight.*float16"):
        write_transformers_folder(tmp_path, model, load_tokenizer(), {}, "half", "float16")


# ------------------------------------------------------------------------------------------------ what others read
@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_that_servers_read(folders, kind):
    """vLLM and SGLang take the class by its name, and the shape from these keys; transformers 4 the older ones."""
    ours, folder = folders[kind]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    c = ours.config
    assert config["architectures"] == [CLASS[kind]] and "auto_map" not in config
    assert config["head_dim"] * config["num_attention_heads"] == ours.model.layers[0].self_attn.q_proj.out_features
    assert config["num_key_value_heads"] == c.n_kv_heads and config["hidden_size"] == c.dim
    assert config["num_hidden_layers"] == c.n_layers and config["vocab_size"] == 6400
    assert config["max_position_embeddings"] == c.max_seq_len and config["rms_norm_eps"] == c.norm_eps
    assert config["tie_word_embeddings"] is c.tie_word_embeddings and config["hidden_act"] == "silu"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == c.rope_theta
    assert (config["rope_scaling"] or {}).get("factor") == config["rope_parameters"].get("factor")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    if kind.startswith("granite"):
        assert config["attention_multiplier"] == pytest.approx(c.head_dim**-0.5)
        assert config["intermediate_size"] == c.moe_hidden_dim
        assert config["shared_intermediate_size"] == c.n_shared_experts * c.moe_hidden_dim
    if c.use_moe:
        name = "num_local_experts" if kind.startswith("granite") else "num_experts"
        assert config[name] == 4 and config["num_experts_per_tok"] == c.num_experts_per_tok
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_tokenizer_and_template_travel(folders):
    folder, mine = folders["llama"][1], load_tokenizer()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXTS)["input_ids"] == mine(TEXTS)["input_ids"]
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    template = exported_template(CHAT_TEMPLATE)
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text("utf-8") == template
    chat = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "嗯"},
        {"role": "user", "content": "?"},
    ]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == render(mine, chat, add_generation_prompt=True)[0]


def test_the_card_tells_the_training_and_no_paths(folders):
    model, folder = folders["granite"]
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{model.config.parameter_count():,} parameters" in card and "GraniteMoeSharedForCausalLM" in card
    for words in ("| val_loss | 2.125 nats a token |", "| tokens | 1234 |", "| started from | pretrain_64.pth |",
                  "apply_chat_template", f"{model.config.active_parameter_count():,} of them active"):  # fmt: skip
        assert words in card
    assert not any(
        "/home/someone" in (folder / name).read_text("utf-8") for name in ("README.md", "training_record.json")
    )


def test_the_program_in_the_card_runs(folders, monkeypatch, capsys):
    folder = folders["llama"][1]
    monkeypatch.chdir(folder.parent)
    code = re.search(r"```python\n(.+?)```", (folder / "README.md").read_text("utf-8"), re.S)[1]
    exec(code.replace("max_new_tokens=256", "max_new_tokens=3"), {})
    assert capsys.readouterr().out


def test_a_base_model_is_not_told_to_chat(tmp_path):
    write_transformers_folder(tmp_path, build("llama"), load_tokenizer(), {"stage": "pretrain"}, "base")
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "A base model" in card and "apply_chat_template" not in card


@pytest.mark.slow
def test_transformers_4_reads_the_folder(folders, tmp_path):
    """TRANSFORMERS_4 names a Python with transformers 4 and torch (docs/export.md says how to make one)."""
    python = os.environ.get("TRANSFORMERS_4")
    if not python:
        pytest.skip("TRANSFORMERS_4 does not name a Python that has transformers 4")
    code = (
        "import sys, torch, transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "assert transformers.__version__.startswith('4.')\n"
        "ids, out, *folders = sys.argv[1:]\n"
        "ids, found, chat = torch.load(ids), [], [{'role': 'user', 'content': '你好'}]\n"
        "for folder in folders:\n"
        "    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "    said = tokenizer.apply_chat_template(chat, add_generation_prompt=True)\n"
        "    found.append((model.eval()(ids).logits.detach(), said))\n"
        "torch.save(found, out)\n"
    )
    ids, out = tmp_path / "ids.pt", tmp_path / "out.pt"
    torch.save(some_ids(), ids)
    subprocess.run([python, "-c", code, ids, out, *(folder for _, folder in folders.values())], check=True)
    want = render(load_tokenizer(), [{"role": "user", "content": "你好"}], add_generation_prompt=True)[0]
    for kind, (theirs, said) in zip(folders, torch.load(out), strict=True):
        a = logits(folders[kind][0], some_ids())
        assert (a - theirs).abs().max() <= 1e-5 * a.abs().max(), kind
        assert said == want


# ------------------------------------------------------------------------------------------------------- the program
@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with base and chat weights in out/."""
    monkeypatch.chdir(tmp_path)
    save_weights("out/full_sft_64.pth", build("llama"), load_tokenizer(), RECORD)
    save_weights("out/pretrain_64.pth", build("qwen3"), load_tokenizer(), {"stage": "pretrain"})
    os.utime("out/full_sft_64.pth", (1000, 1000))
    return tmp_path


def export(capsys, *args) -> dict:
    export_model.main(list(map(str, args)))
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def content(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_newest_chat_weights_by_default_and_all_the_way_round(here, capsys):
    result = export(capsys)
    assert result["out"] == "out/export/full_sft_64" and result["architecture"] == "LlamaForCausalLM"
    assert result["weights"] == "out/full_sft_64.pth" and set(result["files"]) == set(FILES)
    assert result["bytes"] == sum(len(text) for text in content(result["out"]).values())
    back = export(capsys, "--format", "weights", "--weight", result["out"], "--out", "back/chat.pth")
    again, tokenizer, record = load_model(back["out"])
    assert torch.equal(logits(again, some_ids()), logits(build("llama"), some_ids()))
    assert tokenizer.chat_template == exported_template(CHAT_TEMPLATE) and record["result"]["steps"] == 7


def test_an_existing_export_is_kept_unless_told(here, capsys):
    export(capsys, "--out", "x")
    before = content("x")
    export(capsys, "--out", "x")  # the same again: nothing to refuse
    with pytest.raises(UserError, match="--overwrite"):
        export(capsys, "--out", "x", "--weight", "out/pretrain_64.pth")
    assert content("x") == before
    export(capsys, "--out", "x", "--weight", "out/pretrain_64.pth", "--overwrite")
    assert json.loads(content("x")["config.json"])["model_type"] == "qwen3" and len(content("x")) == len(FILES)
    with pytest.raises(UserError, match="out holds full_sft_64.pth"):
        export(capsys, "--out", "out", "--overwrite")
    assert sorted(p.name for p in here.iterdir()) == ["out", "x"]  # no temporary folder is left


def test_a_failed_export_leaves_nothing(here, capsys):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    save_weights("big.pth", model, load_tokenizer(), {})
    for format in ("transformers", "weights", "minimind"):
        with pytest.raises(UserError, match="float16"):
            export(capsys, "--weight", "big.pth", "--out", "y", "--dtype", "float16", "--format", format)
    assert sorted(p.name for p in here.iterdir()) == ["big.pth", "out"]


def test_mistakes_are_one_sentence(here, capsys):
    save_weights("bare.pth", build("llama"), None, {})
    Path("file").write_text("x")
    Path("notes").mkdir()
    (Path("notes") / "a.txt").write_text("x")
    cases = [
        (["--weight", "bare.pth", "--out", "z"], "without a tokenizer"),
        (["--weight", "missing.pth"], "missing.pth"),
        (["--dtype", "q8_0"], "--format gguf"),
        (["--out", "file"], "is a file"),
        (["--out", "file/below"], "cannot write"),
        (["--out", "notes"], "notes holds a.txt"),
        (["--format", "weights", "--out", "notes"], "is a folder"),
        (["--format", "weights", "--out", "out/full_sft_64.pth"], "the very model"),
        (["--lora", "out/full_sft_64.pth", "--out", "z"], "adapter"),
    ]
    for args, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            export_model.main(args)
        assert "\n" not in str(caught.value)
    assert not Path("z").exists()


def test_bf16_in_our_own_file(here, capsys):
    export(capsys, "--format", "weights", "--dtype", "bf16", "--out", "half.pth")
    again, _, _ = load_model("half.pth")
    assert torch.equal(again.lm_head.weight, build("llama").lm_head.weight.bfloat16().float())


def test_a_minimind_release_becomes_ours(here, capsys):
    """A bare state dict as MiniMind 2 saves it: half precision, tables of angles beside the weights."""
    model = build("llama", n_heads=8, n_kv_heads=2)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(state | {"freqs_cos": torch.zeros(3), "freqs_sin": torch.zeros(3)}, "full_sft_512.pth")
    args = ["--weight", "full_sft_512.pth", "--preset", "minimind2-small", "--format", "weights", "--out", "ours.pth"]
    export(capsys, *args)
    again, tokenizer, _ = load_model("ours.pth")
    assert tokenizer is None and again.config.n_heads == 8
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.half().float())


def test_an_adapter_is_merged(here, capsys):
    model = add_lora(build("llama"), rank=4)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_lora("identity.pth", model)
    result = export(capsys, "--lora", "identity.pth", "--out", "merged")
    theirs = AutoModelForCausalLM.from_pretrained("merged").eval()
    a, b, plain = (logits(m, some_ids()) for m in (model, theirs, build("llama")))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max() < (a - plain).abs().max()
    assert (
        result["lora"] == "identity.pth" and "| merged adapter | identity.pth |" in Path("merged/README.md").read_text()
    )


def test_push_to_the_hub(here, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(here / "none"))
    with pytest.raises(UserError, match="bad//name"):
        export(capsys, "--out", "x", "--push_to_hub", "bad//name")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(RunFailed, match="x is written, but not on the hub"):  # the tests run offline
        export(capsys, "--out", "x", "--push_to_hub", "me/tiny")
    sent = []
    address = huggingface_hub.RepoUrl("https://huggingface.co/me/tiny")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, exist_ok: address)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_commit", lambda self, name, operations, commit_message: sent.extend(operations)
    )
    result = export(capsys, "--out", "x", "--push_to_hub", "me/tiny")
    assert {op.path_in_repo for op in sent} == set(FILES) and result["pushed_to"].endswith("me/tiny")


def test_from_the_command_line(here, capsys):
    done = run("scripts/export_model.py", "--weight", here / "out/full_sft_64.pth", "--out", here / "z")
    assert done.returncode == 0 and last_json(done.stdout)["parameters"] == build("llama").config.parameter_count()
    with pytest.raises(SystemExit) as left:
        run_main(export_model.main, ["--weight", "none.pth"])
    assert left.value.code == 2 and capsys.readouterr().err == "error: no weights at none.pth\n"


def test_config_of_a_released_shape():
    """MiniMind 2's 26M, as vLLM would see it."""
    config = transformers_config(LMConfig.from_preset("minimind2-small"), "float16")
    assert (config["head_dim"], config["intermediate_size"], config["rope_theta"]) == (64, 1408, 1e6)


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_while_an_export_is_replaced_loses_none(call, here, capsys, monkeypatch):
    """It arrives with the `call`-th renaming: the old folder aside, or the new one in its place."""
    export(capsys, "--out", "e")
    old, calls, rename = content("e"), [], os.rename

    def interrupted(source, target):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model.main(["--out", "e", "--dtype", "bfloat16", "--overwrite"])
    assert content("e") == old and not [path for path in here.iterdir() if path.name.startswith(".")]
