"""Adapters in the form of the `peft` library: a folder of adapter_config.json and adapter_model.safetensors.

A dense model of ours is transformers' Llama (Qwen3 with qk_norm) under the same names, so an adapter fits both ways.
The export of a model with experts has other names, and so has an adapter whose scaling or layers have no counterpart
here: those are refused, in words.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save

from common.files import replaced
from model.lora import LoraConfig, active_lora, adapter_parameters, add_lora, fill, targeted
from model.weights_file import told_of

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ABOUT = {  # keys of a peft config that leave the meaning of its tensors alone, or are read below
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "qalora_group_size",
}  # fmt: skip
EMPTY = (None, False, [], {})  # any other key must say nothing, or what it says in PLAIN
PLAIN = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the matrix beside it too
}


def check_peft(model, config: LoraConfig) -> None:
    """Raises ValueError where this adapter of this model has no counterpart in a peft folder."""
    if model.config.use_moe:
        raise ValueError("a peft folder needs a dense model: the export of one with experts has other layer names")
    if "lm_head" in config.targets:
        raise ValueError("a peft folder cannot hold an adapter of the head, which shares the embedding's matrix")


def save_peft(folder, model, base: str = "", name: str | None = None) -> None:
    """Writes an adapter (the active one by default) as a peft folder; base: where the exported model lies."""
    name = name or active_lora(model)
    config = model.lora_configs[name]
    check_peft(model, config)
    layers = targeted(model, config.targets)
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": sorted(layers), "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    tensors = {}
    for key, parameter in adapter_parameters(model, name).items():
        layer, _, matrix = key.rsplit(".", 2)  # "model.layers.0.self_attn.q_proj", "weight", "A"
        tensors[f"{PREFIX}{layer}.lora_{matrix}.weight"] = parameter.detach().cpu().contiguous()
    with replaced(Path(folder) / TENSORS) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with replaced(Path(folder) / CONFIG, text=True) as file:
        file.write(json.dumps(content, indent=2))


def load_peft(model, folder, name: str | None = None):
    """Adds the adapter of a peft folder to a model, under this name (by default the folder's), and makes it active;
    ValueError where it has no counterpart here."""
    folder = Path(folder)
    name = (name or folder.absolute().stem).replace(".", "_")  # of ".", which has no name, the folder's
    with told_of(folder):
        return _attach(model, folder, name)


def _attach(model, folder: Path, name: str):
    if not (folder / CONFIG).exists() or not (folder / TENSORS).exists():
        raise ValueError(f"{folder} is no peft folder: it lacks {CONFIG} or {TENSORS}")
    try:
        theirs = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except Exception as error:  # safetensors raises a type of its own for a damaged file
        raise ValueError(f"{folder} cannot be read as a peft adapter: {error}") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"{folder}: {CONFIG} is no JSON object")
    if theirs.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {theirs.get('peft_type')} adapter; only LoRA has a counterpart here")
    if not all(isinstance(theirs.get(key), int | float) for key in ("r", "lora_alpha")):
        raise ValueError(f"{folder}: {CONFIG} must say r and lora_alpha, the adapter's rank and scale")
    odd = [f"{k}={v!r}" for k, v in theirs.items() if k not in ABOUT and v not in PLAIN.get(k, EMPTY)]
    if odd:
        raise ValueError(f"{folder} is a LoRA adapter of a kind that has no counterpart here: {', '.join(odd)}")
    renamed = {}
    for key, tensor in tensors.items():
        layer, lora, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not key.startswith(PREFIX) or not lora or matrix not in "AB":
            raise ValueError(f"{folder}: the tensor {key} has no counterpart here")
        renamed[f"{layer}.weight.{matrix}"] = tensor.float()
    rank, alpha = theirs["r"], theirs["lora_alpha"]
    if theirs.get("use_rslora"):  # scaled by alpha / sqrt(rank) there, by alpha / rank here
        alpha *= rank**0.5
    layers = sorted({key.rsplit(".", 2)[0] for key in renamed})
    try:
        add_lora(model, rank, alpha, theirs.get("lora_dropout", 0.0), layers, name)
    except ValueError as error:
        raise ValueError(f"{folder} does not fit this model: {error}") from None
    return fill(model, name, renamed, folder)
