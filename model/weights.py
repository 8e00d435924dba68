"""Loads weights files of every kind as a model, and writes our own kind.

Ours is a single file, `out/pretrain_512.pth`: a dict of config, tokenizer, training record and state dict. It holds
plain containers and tensors only, so it loads with `weights_only=True`, which refuses a file that would run code.
Transformers folders and MiniMind's releases are read too (convert.py). weights_file.py reads and finds the files.
"""

import json
from pathlib import Path

import torch

from model import convert
from model.LMConfig import LMConfig
from model.lora import attach, merge_lora
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.tokenizer_files import tokenizer_from_dict, tokenizer_to_dict
from model.weights_file import FORMAT, LORA_FORMAT, describe, read_file, save_atomically, told_of


def load_model(path, preset=None):
    """-> (model in eval mode, fp32, on the CPU; tokenizer or None; training record, {} where there is none).

    path: one of our files, a transformers folder, or a MiniMind state dict. If its shape is no preset's, `preset` names
    one with the same heads. The tokenizer is the one in the file or beside it. For an adapter's file the model is the
    one it was trained on, with the adapter merged into it.
    Raises ValueError, in a sentence, for anything that cannot be read or does not fit.
    """
    path = Path(path)
    with told_of(path):
        if not path.exists():
            raise ValueError(f"no weights at {path}")
        return _load_folder(path) if path.is_dir() else _load_file(path, preset)


def _load_file(path: Path, preset):
    content = read_file(path)
    if isinstance(content, dict) and content.get("format") == LORA_FORMAT:
        return load_merged(path, content)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        config, state = LMConfig(**content["config"]), content["model"]
        tokenizer = tokenizer_from_dict(content["tokenizer"]) if content["tokenizer"] else None
        record = content["record"]
    else:
        state = convert.state_dict_of(content, path)
        config, state = convert.from_minimind(state, preset)
        tokenizer, record = _tokenizer_beside(path.parent), {}
    return build_model(config, state, path), tokenizer, record


def build_model(config: LMConfig, state: dict, path="these weights") -> MiniMindForCausalLM:
    """A model of this shape holding these weights; ValueError names what does not fit."""
    if config.n_layers > len(state):  # a wrong number of layers could fill the memory before the names are compared
        raise ValueError(f"{path} does not fit a model of {describe(config)}: it holds {len(state)} tensors")
    # On the device "meta" tensors have shapes but no memory, so no random weights are drawn only to be replaced.
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    if config.tie_word_embeddings:  # many files hold a shared matrix once
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight"))
    wanted, found = model.state_dict(), {name: t.float() for name, t in state.items() if t is not None}
    faults = [f"{n} is missing" for n in wanted if n not in found]
    faults += [f"{n} is not part of the model" for n in found if n not in wanted]
    faults += [f"{n} is {tuple(found[n].shape)}, the model needs {tuple(wanted[n].shape)}"
               for n in wanted if n in found and found[n].shape != wanted[n].shape]  # fmt: skip
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{path} does not fit a model of {describe(config)}: {faults[0]}{more}")
    model.load_state_dict(found, assign=True)  # puts the tensors themselves in place of the empty ones
    model.tie_weights()  # and the head is the embedding's matrix again, not a copy of it
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def save_weights(path, model, tokenizer, record: dict) -> None:
    """Writes model, config, tokenizer (or None) and training record (plain values) as one file, atomically."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = {
        "format": FORMAT,
        "config": model.config.fields(),
        "tokenizer": tokenizer_to_dict(tokenizer) if tokenizer is not None else None,
        "record": record,
        "model": state,
    }
    save_atomically(content, path)


def _tokenizer_beside(folder: Path):
    return load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None


def _load_folder(folder: Path):
    """A transformers folder: config.json, weights in safetensors or .bin (shards too), tokenizer files if any."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json: it is not a transformers folder")
    raw_config = _json_object(folder / "config.json")
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")
    state = {}
    for file in files:
        state |= convert.state_dict_of(read_file(file), file)
    config, state = convert.from_transformers(raw_config, state)
    record_file = folder / "training_record.json"
    record = _json_object(record_file) if record_file.exists() else {}
    return build_model(config, state, folder), _tokenizer_beside(folder), record


def load_merged(path, content: dict) -> tuple[MiniMindForCausalLM, object, dict]:
    """load_model for an adapter's file: loads the model it was trained on, from the path in its record, and merges the
    adapter into it."""
    base = content["record"].get("came_from")
    if not base or not Path(base).exists():
        raise ValueError(
            f"{path} is an adapter for the weights {base}, which are not there; load them and use model.lora.load_lora"
        )
    model, tokenizer, _ = load_model(base, content["record"].get("preset"))
    return merge_lora(attach(model, content, "default", path)), tokenizer, content["record"]


def _json_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
