"""The file that --deepspeed names: read, held against the flags, its "auto" values filled from them.

The flags say what a run is. A value in the file that says something else is a mistake, found before any process begins
to work, and so is a key that DeepSpeed would pass over in silence.
"""

import difflib
import json
import os
import warnings
from pathlib import Path

import torch

from common.device import device_and_dtype
from common.errors import UserError

KEYS = {  # what may stand in the file, and in those sections whose keys DeepSpeed does not check itself
    "": """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer
        zero_optimization bf16 fp16 torch_autocast prescale_gradients gradient_predivide_factor aio
        communication_data_type zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print
        wall_clock_breakdown memory_breakdown dump_state comms_logger flops_profiler log_level""",
    "optimizer": "type params",
    "optimizer.params": "lr betas eps weight_decay torch_adam adam_w_mode bias_correction fused amsgrad",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
}
AUTO = "auto"


def checked_config(args) -> dict:
    """The file's content, filled; UserError where it is wrong or contradicts the flags. Imports deepspeed."""
    if args.optimizer != "adamw":
        raise UserError(f"--optimizer {args.optimizer} does not work with --deepspeed, which trains with adamw only")
    if args.compile:
        raise UserError("--compile does not work with --deepspeed; leave one of them out")
    config = read_config(args.deepspeed)
    device, dtype = device_and_dtype(args)
    size = int(os.environ.get("WORLD_SIZE", 1))
    filled = fill(config, args, size, dtype, args.deepspeed, resumed=args.resume)
    check_sections(filled, args.deepspeed, import_deepspeed(device))
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
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # torch's, about DeepSpeed
    # An optional speed-up of sums between processes on CPUs; without a compiler the start would fail for it.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def read_config(path) -> dict:
    """The file's content, with only keys that have an effect."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed {path} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"--deepspeed {path} is not JSON: {error}") from None
    if isinstance(config, dict) and "scheduler" in config:
        raise UserError(f"{path}: leave `scheduler` out; --schedule and --warmup set the rate of each step")
    for section, words in KEYS.items():
        keys, values = words.split(), get(config, section, {})
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section or 'the file'} must be a JSON object, not {json.dumps(values)}")
        for key in values:
            if key not in keys:
                near = difflib.get_close_matches(key, keys, 1)
                known = f"did you mean {near[0]}?" if near else f"known are {', '.join(keys)}"
                raise UserError(f"{path}: unknown key {f'{section}.{key}'.lstrip('.')}; {known}")
    kind = get(config, "optimizer.type", AUTO)
    if kind not in ("AdamW", AUTO):
        raise UserError(f"{path}: optimizer.type is {kind}, but --optimizer with --deepspeed can only be adamw")
    return config


def check_sections(config: dict, path, deepspeed) -> None:
    """The sections whose keys DeepSpeed knows best, by its own classes."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    classes = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, check in classes.items():
        try:
            check(**config.get(section, {}))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, (section, *fault["loc"])))
            what = "unknown key" if fault["type"] == "extra_forbidden" else f"{fault['msg']}:"
            raise UserError(f"{path}: {what} {where} ({fault['input']!r})") from None
        except TypeError as error:
            raise UserError(f"{path}: {section}: {error}") from None


def fill(config: dict, args, size: int, dtype: torch.dtype, path="", resumed=False) -> dict:
    """A copy with every "auto" replaced by what the flags say; UserError where another value stands there.

    resumed: the number of micro-batches is whatever keeps the run's global batch.
    """
    filled = json.loads(json.dumps(config))
    for place, (value, flag) in flag_values(args, size).items():
        there = get(filled, place, AUTO)
        follows = resumed and place in ("gradient_accumulation_steps", "train_batch_size")
        if there not in (AUTO, value) and not follows:
            raise UserError(f'{path}: {place} is {there}, but {flag}; write "auto" there, or give the same flag')
        put(filled, place, value)
    put(filled, "optimizer.type", "AdamW")
    for name, value in (("betas", [0.9, 0.95]), ("eps", 1e-8)):
        if get(filled, f"optimizer.params.{name}", AUTO) == AUTO:
            put(filled, f"optimizer.params.{name}", value)
    fill_precision(filled, dtype, path)
    zero = filled.setdefault("zero_optimization", {"stage": 0})
    if isinstance(zero, dict):  # sizes of buckets and the like: DeepSpeed's own defaults
        filled["zero_optimization"] = {key: value for key, value in zero.items() if value != AUTO}
    if left := sorted(places_of_auto(filled)):
        raise UserError(f'{path}: no flag says what "auto" means at {", ".join(left)}; write a value')
    return filled


def flag_values(args, size: int) -> dict:
    """Place in the file -> (what the flags say, the flags in words)."""
    global_batch = args.batch_size * args.accumulation_steps * size
    batch, steps = f"--batch_size is {args.batch_size}", f"--accumulation_steps is {args.accumulation_steps}"
    return {
        "train_micro_batch_size_per_gpu": (args.batch_size, batch),
        "gradient_accumulation_steps": (args.accumulation_steps, steps),
        "train_batch_size": (global_batch, f"{batch}, {steps}, of {size} processes"),
        "gradient_clipping": (args.grad_clip, f"--grad_clip is {args.grad_clip:g}"),
        "optimizer.params.lr": (args.learning_rate, f"--learning_rate is {args.learning_rate:g}"),
        "optimizer.params.weight_decay": (args.weight_decay, f"--weight_decay is {args.weight_decay:g}"),
    }  # fmt: skip


def fill_precision(config: dict, dtype: torch.dtype, path) -> None:
    """Turns on what computes in `dtype`: bf16 and fp16 keep the weights in it too (float32 ones beside the moments),
    torch_autocast keeps them in float32, as a run without DeepSpeed does."""
    name = str(dtype).removeprefix("torch.")
    autocast = get(config, "torch_autocast.enabled", False)
    for section, low in (("bf16", "bfloat16"), ("fp16", "float16"), ("torch_autocast", "bfloat16")):
        if section not in config:
            continue
        wanted = name == low
        if section == "bf16":  # both would do: the one that keeps float32 weights is preferred
            wanted = wanted and not autocast
        if section == "torch_autocast":
            wanted = wanted and get(config, "bf16.enabled", False) is not True
            low = get(config, "torch_autocast.dtype", AUTO)
            low = name if low == AUTO else low.removeprefix("torch.")
            put(config, "torch_autocast.dtype", low if wanted else "bfloat16")
        there = get(config, f"{section}.enabled", AUTO)
        if there is True and name != low:
            raise UserError(f"{path}: {section} is enabled with {low}, but --dtype is {name}; make them the same")
        put(config, f"{section}.enabled", wanted if there == AUTO else there)
    enabled = [section for section in ("bf16", "fp16", "torch_autocast") if get(config, f"{section}.enabled", False)]
    if dtype != torch.float32 and len(enabled) != 1:
        found = " and ".join(enabled) or "none of bf16, fp16 and torch_autocast"
        raise UserError(f'{path}: {found} enabled, but --dtype is {name}; write one of them with "enabled": "auto"')


def get(config, place: str, default=None):
    """The value at "a.b.c"; the default where there is none. "" is the whole."""
    for key in filter(None, place.split(".")):
        if not isinstance(config, dict) or key not in config:
            return default
        config = config[key]
    return config


def put(config: dict, place: str, value) -> None:
    *sections, key = place.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[key] = value


def places_of_auto(config: dict, prefix="") -> list[str]:
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += places_of_auto(value, f"{prefix}{key}.")
        elif value == AUTO:
            found.append(prefix + key)
    return found
