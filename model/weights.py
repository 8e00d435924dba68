"""Reads weights of every kind and writes one.

Ours is a single file, `out/pretrain_512.pth`: a dict of config, tokenizer, training record and state dict, made of
plain containers and tensors so that it loads with `weights_only=True` and runs no code. It is written whole or not at
all. Also read: transformers folders and MiniMind's releases (see model/convert.py).
"""

import hashlib
import json
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import convert
from model.files import replaced
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, tokenizer_from_dict, tokenizer_to_dict

OURS = "minimind-"  # how the formats of our files begin
FORMAT = "minimind-weights-1"
LORA_FORMAT = "minimind-lora-1"  # of an adapter's file, see model/lora.py
FREE_FIELDS = ("dropout", "aux_loss_alpha", "seq_aux", "max_seq_len", "use_cache")  # a trained model may change them
STATE_SUFFIX = "_resume"  # <name>_resume.pth beside the weights holds what a resumed run needs


def load_model(path, preset=None):
    """-> (model in eval mode, fp32, on the CPU; tokenizer or None; training record, {} where there is none).

    path: one of our files, a transformers folder, or a MiniMind state dict (where it has no preset's shape, `preset`
    names one with the same heads). The tokenizer is the one in the file or beside it. An adapter's file brings the
    weights it was trained on, with the adapter merged into them.
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
        from model.lora import load_merged  # which imports this file

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
    if config.n_layers > len(state):  # a wrong number would fill the memory with layers before they are compared
        raise ValueError(f"{path} does not fit a model of {describe(config)}: it holds {len(state)} tensors")
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight"))
    wanted, found = model.state_dict(), {name: t.float() for name, t in state.items() if t is not None}
    faults = [f"{n} is missing" for n in wanted if n not in found]
    faults += [f"{n} is not part of the model" for n in found if n not in wanted]
    faults += [f"{n} is {tuple(found[n].shape)}, the model needs {tuple(wanted[n].shape)}"
               for n in wanted if n in found and found[n].shape != wanted[n].shape]  # fmt: skip
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{path} does not fit a model of {describe(config)}: {faults[0]}{more}")
    model.load_state_dict(found, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def describe(config: LMConfig) -> str:
    """A shape in words: "dim 512, 8 layers, 8/2 heads"."""
    text = f"dim {config.dim}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"
    return text + (f", {config.n_routed_experts} experts" if config.use_moe else "")


def fingerprint(model) -> str:
    """16 hex digits of a model's weights and what is computed with them, adapters left out."""
    fields = {key: value for key, value in model.config.fields().items() if key not in FREE_FIELDS}
    digest = hashlib.blake2b(repr(sorted(fields.items())).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if ".adapters." not in name:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def save_atomically(content, path) -> None:
    """torch.save to a file that appears at `path` when it is whole."""
    with replaced(path) as file:
        torch.save(content, file)


def read_header(path) -> dict:
    """All of one of our files, or of an adapter's, but its tensors (they are mapped, not read)."""
    content = read_file(Path(path), mmap=True)
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, LORA_FORMAT):
        raise ValueError(f"{path} is not one of our weights files")
    return {key: value for key, value in content.items() if key != "model"}


def all_weights(folder) -> list[Path]:
    """The weights files in `folder` and the folders in it, newest first; adapters and resume states left out."""
    folder = Path(folder)
    found = [*folder.glob("*.pth"), *folder.glob("*/*.pth")]
    found = [p for p in found if not p.stem.endswith(STATE_SUFFIX) and p.parent.name != "lora" and p.name[0] != "."]
    files = [p for p in found if p.is_file()]  # no folder, no link that leads nowhere
    return sorted(files, key=lambda p: (p.stat().st_mtime_ns, p), reverse=True)  # an unpacked archive has one time


def newest_weights(folder, want=None, unwanted=None) -> Path | None:
    """The newest of all_weights.

    want, unwanted: the first part of the names to take or to leave, such as "pretrain".
    """
    found = [p for p in all_weights(folder) if (want is None or p.name.startswith(f"{want}_"))]
    found = [p for p in found if (unwanted is None or not p.name.startswith(f"{unwanted}_"))]
    return next(iter(found), None)


def read_file(path: Path, mmap=False):
    """The content of a weights file of any kind; ValueError where it cannot be read. mmap: tensors stay in the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)
        if not mmap and isinstance(content, dict) and str(content.get("format")).startswith(OURS):
            check_sums(path)
        return content
    except Exception as error:  # torch reports damaged files by a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights: {reason}") from None


def check_sums(path) -> None:
    """ValueError where a bit of a file of ours has turned, on a disk or on its way: torch writes a checksum of every
    tensor and reads none. (Other writers may leave them out.)"""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged, its checksum is another")


@contextmanager
def told_of(path):
    """Around what reads a file that anybody may have made: whatever is wrong with it becomes a ValueError that begins
    with the path."""
    try:
        yield
    except ValueError as error:
        kind = convert.NoCounterpart if isinstance(error, convert.NoCounterpart) else ValueError
        said = str(error)
        raise kind(said if str(path) in said else f"{path}: {said}") from None
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} holds other things than such a file does: {error!r}") from None


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


def _json_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
