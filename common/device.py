"""The choice of device and of precision."""

import os

import torch

from common.errors import user_errors


def pick_device(name: str) -> torch.device:
    """ "auto": this process's GPU where there is one, Apple's on a Mac, else the CPU. ValueError for one that is not
    there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; try auto, cpu, cuda or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no CUDA GPU here; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no Apple GPU here; use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} CUDA GPUs here, counted from 0")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on GPUs that compute it (Ampere and later), float16 on older ones, float32 elsewhere.

    torch emulates bfloat16 on older GPUs, which is slow; CPUs without bfloat16 instructions take it 10 times slower
    than float32. ValueError for float16 anywhere but on a GPU.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        if dtype == torch.float16 and device.type == "cpu":
            raise ValueError("--dtype float16 needs a GPU; use float32 on a CPU")
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which a product with x is computed: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def upload(x, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Python's numbers, or a tensor on the CPU, as a tensor on `device`, without waiting for a GPU.

    Only pinned memory can be copied asynchronously: from ordinary memory the program would stand still until the GPU
    has done all work that is queued.
    """
    x = torch.as_tensor(x, dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def device_and_dtype(args) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype mean on this machine."""
    with user_errors():
        device = pick_device(args.device)
        return device, pick_dtype(args.dtype, device)
