"""An estimate of the memory a run will need, and of how many rows fit into a GPU's memory together."""

import os

import torch

from model.attention import DocumentLengths
from model.expert_loop import experts_kind
from model.model import LOSS_CHUNK_GPU

GB = 2**30
FRAMEWORK = {"cpu": 0.45 * GB, "cuda": 0.0, "mps": 0.0}  # the process with torch loaded, as peak_memory counts it
FILLED = 0.8  # share of a GPU's memory that the estimate may fill; the rest is for fragments and other programs


def training_bytes(config, args, world, batch_size: int, trainable: int, others=0) -> int:
    """Estimated peak bytes of one process whose micro-batches have batch_size rows.

    Weights (further models' `others` among them) and, of the trainable ones, gradients and AdamW's two moments (Muon:
    one for the matrices) at 4 bytes; the activations kept for the backward pass; the logits. The factors count the
    tensors autograd saves in one layer; checked against peaks, measured on a CPU and counted for a GPU.
    """
    total = config.parameter_count() + others
    moments = 1.2 if args.optimizer == "muon" else 2
    states = 4 * (total + (1 + moments) * trainable)
    tokens, V, T = batch_size * args.seq_len, config.vocab_size, args.seq_len
    half = world.dtype != torch.float32
    # Attention kernels that take the documents' lengths need no mask of T x T numbers for each row.
    by_lengths = DocumentLengths.served(world.device, world.dtype, config.head_dim)
    layer = layer_bytes(config, world) * tokens
    between = 4 * config.dim * tokens  # the residual stream between two layers, float32
    masks = 5 * batch_size * T**2  # True or False, and the number that is added to a score
    if half:
        states += 2 * total  # autocast's copies of the weights
        masks = 0 if by_lengths else (1 + 2 * config.n_layers) * batch_size * T**2
    # With checkpointing only each layer's input is kept, and the insides of one layer at a time.
    kept = between * config.n_layers + layer if args.gradient_checkpointing else layer * config.n_layers
    if world.device.type == "cuda":
        # The larger of two that exist one after the other: the logits of one chunk, computed again in the backward
        # pass, and then the gradients inside a layer.
        working = max(14 * min(tokens, LOSS_CHUNK_GPU) * V, 2 * layer)
    else:
        working = 8 * tokens * V  # log-probabilities, and as much again that the allocator keeps
    return int(states + kept + working + 2 * between + masks + FRAMEWORK.get(world.device.type, 0))


def layer_bytes(config, world) -> int:
    """Bytes that one layer keeps for its backward pass, per token."""
    H, G, h = config.n_heads, config.n_kv_heads, config.head_dim
    if world.dtype == torch.float32:
        # Both norms' inputs and outputs, two sums; queries, keys and values before and after the rotation, twice.
        return 4 * (6 * config.dim + 2 * (2 * H + 2 * G) * h + feed_forward_numbers(config, world))
    # Autocast: the residual stream is float32, each norm's output 2 bytes, and so is all that products read and write.
    by_lengths = DocumentLengths.served(world.device, world.dtype, h)
    heads = 2 * H + 2 * G if by_lengths else 4 * H  # masked attention repeats keys and values
    norms = 4 * (H + G) * h if config.qk_norm else 0
    return 12 * config.dim + 2 * heads * h + norms + 2 * feed_forward_numbers(config, world)


def feed_forward_numbers(config, world) -> int:
    """Numbers a feed-forward block keeps per token: gate, up, silu(gate) and their product.

    For a routed expert, the loop in model/expert_loop.py keeps only gate and up. The grouped kernels also keep the
    weighted product, and a copy of the token for each of its experts.
    """
    if not config.use_moe:
        return 4 * config.hidden_dim
    routed, k = config.num_experts_per_tok * config.moe_hidden_dim, config.num_experts_per_tok
    shape = (config.n_routed_experts, 2 * config.moe_hidden_dim, config.dim)
    grouped = experts_kind(world.device, world.dtype, shape) == "grouped_mm"
    shared = 4 * config.n_shared_experts * config.moe_hidden_dim
    return shared + (5 * routed + k * config.dim if grouped else 2 * routed)


def rows_that_fit(config, args, world, trainable: int) -> tuple[int, int]:
    """(--batch_size, --accumulation_steps) of the same step, with as many rows together as fit into a GPU's memory.

    A small model's kernels are so short that launching one takes longer than running it: fewer, larger micro-batches
    take less time.
    """
    rows = args.batch_size * args.accumulation_steps
    room = FILLED * device_bytes(world.device)
    sizes = (n for n in range(rows, args.batch_size, -1) if rows % n == 0)
    size = next((n for n in sizes if training_bytes(config, args, world, n, trainable) <= room), args.batch_size)
    return size, rows // size


def memory_line(config, args, world, batch_size: int, trainable: int, others=0) -> str:
    """The estimate in words; where the device has less memory, also which flags to lower."""
    need = training_bytes(config, args, world, batch_size, trainable, others)
    have = device_bytes(world.device)
    text = f"about {need / GB:.1f} GB a process (estimate)"
    if have and need > 0.9 * have:
        text += f", but {world.device} has {have / GB:.1f} GB: lower --batch_size (and raise --accumulation_steps), "
        text += "lower --seq_len, or use --gradient_checkpointing"
    return text


def what_to_lower(args) -> str:
    """Advice for a run that ran out of memory: flags that need less, first the one that leaves the result the same."""
    ways = []
    if args.batch_size > 1:
        size = next(n for n in range(args.batch_size // 2, 0, -1) if args.batch_size % n == 0)
        more = args.accumulation_steps * (args.batch_size // size)
        ways.append(f"--batch_size {size} --accumulation_steps {more} has the same result")
    if not args.gradient_checkpointing:
        ways.append("--gradient_checkpointing takes a third more time")
    ways.append(f"a shorter --seq_len than {args.seq_len} cuts long texts sooner")
    return "; ".join(ways)


def device_bytes(device: torch.device) -> int | None:
    """The memory of the device in bytes; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
