"""Weights files: writing, reading, recognising and finding them. weights.py builds models from them."""

import hashlib
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.files import replaced
from model.convert import NoCounterpart
from model.LMConfig import LMConfig

OURS = "minimind-"  # the "format" of all our files begins with it
FORMAT = "minimind-weights-1"
LORA_FORMAT = "minimind-lora-1"  # of an adapter's file, see model/lora.py
# Fields that change how a model is trained and used but not what its weights mean: an adapter fits where they differ.
FREE_FIELDS = ("dropout", "aux_loss_alpha", "seq_aux", "max_seq_len", "use_cache")
STATE_SUFFIX = "_resume"  # <name>_resume.pth beside the weights holds what a resumed run needs


def describe(config: LMConfig) -> str:
    """A shape in words: "dim 512, 8 layers, 8/2 heads"."""
    text = f"dim {config.dim}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"
    return text + (f", {config.n_routed_experts} experts" if config.use_moe else "")


def fingerprint(model) -> str:
    """16 hex digits: a hash of a model's weights and of the config fields that decide what they compute.

    Adapters are left out: an adapter's file holds the fingerprint of the weights it belongs to.
    """
    fields = {key: value for key, value in model.config.fields().items() if key not in FREE_FIELDS}
    digest = hashlib.blake2b(repr(sorted(fields.items())).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if ".adapters." not in name:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_atomically(content, path) -> None:
    """torch.save. Readers of `path` see the old file or the new one, never a partial one."""
    with replaced(path) as file:
        torch.save(content, file)


def read_header(path) -> dict:
    """The content of one of our files, or of an adapter's, without its tensors. Fast: the tensors are not read."""
    content = read_file(Path(path), mmap=True)
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, LORA_FORMAT):
        raise ValueError(f"{path} is not one of our weights files")
    return {key: value for key, value in content.items() if key != "model"}


def all_weights(folder) -> list[Path]:
    """The weights files in `folder` and the folders in it, newest first; no adapters, exports or resume states."""
    folder = Path(folder)
    found = [*folder.glob("*.pth"), *folder.glob("*/*.pth")]
    found = [p for p in found if p.parent.name not in ("lora", "export") and p.name[0] != "."]
    found = [p for p in found if not p.stem.endswith(STATE_SUFFIX)]
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
    """The content of a weights file of any kind; ValueError where it cannot be read. mmap: do not read the tensors."""
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
    """ValueError where a bit of one of our files has flipped, on a disk or in transfer. torch writes a checksum of each
    tensor but does not check it when it reads. (Files of other programs may have none.)"""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged, its checksum is another")


@contextmanager
def told_of(path):
    """A context for reading a file that another program may have made: any error becomes a ValueError with the path."""
    try:
        yield
    except ValueError as error:
        kind = NoCounterpart if isinstance(error, NoCounterpart) else ValueError
        said = str(error)
        raise kind(said if str(path) in said else f"{path}: {said}") from None
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} holds other things than such a file does: {error!r}") from None
