"""A model as a folder that transformers 4 and 5, vLLM and SGLang open without code of this project."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from export.counterpart import transformers_config, transformers_state
from export.model_card import model_card, public_record
from export.tokenizer_files import exported_tokenizer

# Every name that an export may write: a folder that holds anything else is not replaced.
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "training_record.json", "README.md")  # fmt: skip


def write_transformers_folder(folder, model, tokenizer, record: dict, name: str, dtype: str = "float32") -> dict:
    """Fills `folder`, which is there and empty -> the content of its config.json.

    name: what the model card calls the model. dtype: torch's name of the type the weights are stored in.
    Raises ValueError where transformers has no such model or a weight does not fit the type.
    """
    folder = Path(folder)
    config = transformers_config(model.config, dtype)
    state = {key: cast(tensor, dtype, key) for key, tensor in transformers_state(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # A base model has the template in its tokenizer too, but has never seen a chat.
    base = record.get("stage") == "pretrain"
    chat = bool(tokenizer.chat_template) and not base
    texts = {
        "config.json": to_json(config),
        "generation_config.json": to_json(generation),
        "training_record.json": to_json(public_record(record)),
        "README.md": model_card(name, model.config, config, record, chat),
        **exported_tokenizer(tokenizer, model.config.max_seq_len, base),
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return config


def cast(tensor: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """The tensor in another type, contiguous; ValueError if a number is too large for it."""
    out = tensor.detach().to(getattr(torch, dtype)).contiguous()
    if not out.isfinite().all():
        raise ValueError(f"{name} holds numbers that {dtype} cannot; use --dtype float32")
    return out


def to_json(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
