"""The file that --deepspeed names, with the flags laid over it.

The flags say what a run is: they fill what is "auto" in the file, and a value that contradicts them is a mistake, found
before any process begins to work. What else is wrong with the file DeepSpeed says itself, in one line.
"""

import copy
import json
import os
import warnings
from pathlib import Path

import torch

from common.device import device_and_dtype
from common.errors import UserError

AUTO = "auto"
SECTIONS = ("optimizer", "zero_optimization", "bf16", "fp16", "torch_autocast")  # those that are read here


def checked_config(args) -> dict:
    """The file's content, filled; UserError where it is wrong or contradicts the flags. Imports deepspeed."""
    if args.optimizer != "adamw":
        raise UserError(f"--optimizer {args.optimizer} does not work with --deepspeed, which trains with adamw only")
    if args.compile:
        raise UserError("--compile does not work with --deepspeed; leave one of them out")
    path, size = args.deepspeed, int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = device_and_dtype(args)
    filled = fill(read_config(path), args, size, dtype)
    import_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig

    try:  # without the global batch, which it holds against a number of processes that it does not know yet
        DeepSpeedConfig({key: value for key, value in filled.items() if key != "train_batch_size"})
    except Exception as error:  # a dozen types, pydantic's over several lines
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    return filled


def import_deepspeed(device: torch.device):
    """The module, set to work on `device`."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"--deepspeed needs the package deepspeed: pip install deepspeed ({error})") from None
    # Of torch 2.13, about a function of its own that DeepSpeed calls at each gathering of weights.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning, "torch.distributed")
    # An optional speed-up of sums between processes on CPUs; without a compiler the start would fail for it.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def read_config(path) -> dict:
    """The file's content, a JSON object."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed {path} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed {path} is not JSON: {error}") from None
    sections = {name: config.get(name, {}) for name in SECTIONS} if isinstance(config, dict) else {}
    for name, value in {"the file": config, **sections}.items():
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name} must be a JSON object, not {json.dumps(value)}")
    return config


def fill(config: dict, args, size: int, dtype: torch.dtype) -> dict:
    """A copy with every "auto" replaced by what the flags say, or left to DeepSpeed where they say nothing; UserError
    where another value than the flags' stands there. size: processes."""
    config, path = copy.deepcopy(config), args.deepspeed
    params = config.setdefault("optimizer", {}).setdefault("params", {})
    global_batch = args.batch_size * args.accumulation_steps * size
    rows, steps = f"--batch_size is {args.batch_size}", f"--accumulation_steps is {args.accumulation_steps}"
    flags = [  # (section, key, what the flags say, the flags in words)
        (config, "train_micro_batch_size_per_gpu", args.batch_size, rows),
        (config, "gradient_accumulation_steps", args.accumulation_steps, steps),
        (config, "train_batch_size", global_batch, f"{rows}, {steps}, of {size} processes"),
        (config, "gradient_clipping", args.grad_clip, f"--grad_clip is {args.grad_clip:g}"),
        (config["optimizer"], "type", "AdamW", "--optimizer with --deepspeed can only be adamw"),
        (params, "lr", args.learning_rate, f"--learning_rate is {args.learning_rate:g}"),
        (params, "weight_decay", args.weight_decay, f"--weight_decay is {args.weight_decay:g}"),
    ]
    if "scheduler" in config:
        raise UserError(f"{path}: leave `scheduler` out; --schedule and --warmup set the rate of each step")
    for section, key, value, words in flags:
        there = section.get(key, AUTO)
        # A resumed run takes as many micro-batches as keep its global batch, whatever flags and file say.
        follows = args.resume and key in ("gradient_accumulation_steps", "train_batch_size")
        if there not in (AUTO, value) and not follows:
            raise UserError(f'{path}: {key} is {there}, but {words}; write "auto" there, or give the same flag')
        section[key] = value
    for key, value in (("betas", [0.9, 0.95]), ("eps", 1e-8)):  # as without DeepSpeed
        params[key] = value if params.get(key, AUTO) == AUTO else params[key]
    fill_precision(config, str(dtype).removeprefix("torch."), path)
    return without_auto(config)


def fill_precision(config: dict, dtype: str, path) -> None:
    """Turns on what computes in `dtype`. bf16 and fp16 keep the weights in it too, beside float32 ones; torch_autocast
    keeps them in float32 alone, as a run without DeepSpeed does, and so it is preferred."""
    computes = {"torch_autocast": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}
    if "torch_autocast" in config:
        there = config["torch_autocast"].get("dtype", AUTO)
        computes["torch_autocast"] = "bfloat16" if there == AUTO else there.removeprefix("torch.")
        config["torch_autocast"]["dtype"] = computes["torch_autocast"]
    enabled = {name: config[name].get("enabled", AUTO) for name in computes if name in config}
    for name, value in enabled.items():
        if value is True and computes[name] != dtype:
            raise UserError(f"{path}: {name} is enabled with {computes[name]}, but --dtype is {dtype}; make them equal")
    fitting = [name for name, value in enabled.items() if value is not False and computes[name] == dtype]
    said = [name for name in fitting if enabled[name] is True]
    if len(said) > 1 or (dtype != "float32" and not fitting):
        found = " and ".join(said) or "none of bf16, fp16 and torch_autocast"
        raise UserError(f"{path}: {found} enabled, but --dtype is {dtype}; enable one of them")
    for name, value in enabled.items():
        config[name]["enabled"] = name in (said or fitting[:1]) if value == AUTO else value


def without_auto(config: dict) -> dict:
    """The rest that is "auto" left out: sizes of buckets and the like, for which DeepSpeed has defaults."""
    inner = {key: without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in inner.items() if value != AUTO}
