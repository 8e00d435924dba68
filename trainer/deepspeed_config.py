"""The file that --deepspeed names, with the flags laid over it.

The flags decide precision, batch sizes, clipping, optimizer and schedule, as they do without DeepSpeed. Their values
replace "auto" in the file; another value there is refused. All other keys are DeepSpeed's: it checks them itself, and
its complaint becomes one line. All this happens before any process begins to work.
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
PRECISIONS = ("torch_autocast", "bf16", "fp16")  # sections that set the precision, the preferred one first


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

    try:  # without the global batch: DeepSpeed does not know yet how many processes there are, and would refuse it
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
    # torch 2.13 warns of a function that DeepSpeed calls at each gathering of weights; a user can do nothing about it.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning, "torch.distributed")
    # An optional speed-up of sums between processes on CPUs; without a compiler the start would fail for it.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def read_config(path) -> dict:
    """The file's content, a JSON object."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path} must hold a JSON object")
    for name in ("optimizer", "zero_optimization", *PRECISIONS):  # those that are read here
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{path}: {name} must be a JSON object, not {json.dumps(config[name])}")
    return config


def fill(config: dict, args, size: int, dtype: torch.dtype) -> dict:
    """A copy with every "auto" replaced by what the flags say, or left to DeepSpeed where they say nothing; UserError
    where another value than the flags' stands there. size: processes."""
    config, path = copy.deepcopy(config), args.deepspeed
    if "scheduler" in config:
        raise UserError(f"{path}: leave `scheduler` out; --schedule and --warmup set the rate of each step")
    optimizer = config.setdefault("optimizer", {})
    params = optimizer.setdefault("params", {})
    global_batch = args.batch_size * args.accumulation_steps * size
    for section, key, flag, value in (
        (config, "train_micro_batch_size_per_gpu", "--batch_size", args.batch_size),
        (config, "gradient_accumulation_steps", "--accumulation_steps", args.accumulation_steps),
        (config, "train_batch_size", "--batch_size x --accumulation_steps x processes", global_batch),
        (config, "gradient_clipping", "--grad_clip", args.grad_clip),
        (optimizer, "type", "the --optimizer", "AdamW"),
        (params, "lr", "--learning_rate", args.learning_rate),
        (params, "weight_decay", "--weight_decay", args.weight_decay),
        (params, "betas", "the value without --deepspeed", [0.9, 0.95]),
        (params, "eps", "the value without --deepspeed", 1e-8),
    ):
        there = section.get(key, AUTO)
        if there not in (AUTO, value):
            raise UserError(f'{path}: {key} is {there}, but {flag} is {value}; write "auto" there, or give equal ones')
        section[key] = value
    set_precision(config, str(dtype).removeprefix("torch."), path)
    return without_auto(config)


def set_precision(config: dict, dtype: str, path) -> None:
    """Turns on the one section that computes in `dtype`, none for float32.

    bf16 and fp16 keep the weights in half precision too, beside float32 ones. torch_autocast keeps them in float32
    alone, as a run without DeepSpeed does, and so it is preferred where the file leaves the choice.
    """
    autocast = config.get("torch_autocast", {})
    if autocast.get("dtype", AUTO) == AUTO:
        autocast["dtype"] = "bfloat16"
    computes = {"torch_autocast": autocast["dtype"].removeprefix("torch."), "bf16": "bfloat16", "fp16": "float16"}
    said = {name: config[name].get("enabled", AUTO) for name in PRECISIONS if name in config}
    fitting = [name for name, value in said.items() if value is not False and computes[name] == dtype]
    on = [name for name, value in said.items() if value is True] or fitting[:1]
    if [computes[name] for name in on] != [dtype] * (dtype != "float32"):
        found = " and ".join(on) or "none of bf16, fp16 and torch_autocast"
        raise UserError(f"{path}: {found} enabled, but --dtype is {dtype}; enable the one that computes in it")
    for name in said:
        config[name]["enabled"] = name in on


def without_auto(config: dict) -> dict:
    """The rest that is "auto" left out: sizes of buckets and the like, for which DeepSpeed has defaults."""
    inner = {key: without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in inner.items() if value != AUTO}
