"""How much memory a run will take, before it takes it."""

import torch

GB = 2**30
FRAMEWORK = {"cpu": 0.45 * GB, "cuda": 0.0, "mps": 0.0}  # the process with torch loaded, as peak_memory counts it


def training_bytes(config, args, world, trainable: int, others=0) -> int:
    """Estimated peak bytes of one process.

    Weights (further models' `others` among them) and, of the trainable ones, gradients and AdamW's two moments (Muon:
    one for the matrices) at 4 bytes; the activations kept for the backward pass; the logits and their gradient. The
    factors count the tensors autograd saves in one layer and were checked against measured peaks.
    """
    total = config.parameter_count() + others
    moments = 1.2 if args.optimizer == "muon" else 2
    states = 4 * (total + (1 + moments) * trainable)
    tokens = args.batch_size * args.seq_len
    width = torch.finfo(world.dtype).bits // 8
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    layer = 6 * config.dim + 2 * heads + feed_forward_numbers(config, world)  # kept for one token of one layer
    if args.gradient_checkpointing:
        activations = width * tokens * (config.n_layers * config.dim + layer)
    else:
        activations = width * tokens * config.n_layers * layer
    logits = tokens * config.vocab_size * (3 * 4 if world.dtype == torch.float32 else width + 2 * 4)
    masks = args.batch_size * args.seq_len**2 * (5 if world.device.type != "cuda" else 0)
    return int(states + activations + logits + masks + FRAMEWORK.get(world.device.type, 0))


def feed_forward_numbers(config, world) -> int:
    """Numbers a feed-forward block keeps of one token: gate, up, silu(gate) and their product.

    Of a routed expert the loop keeps gate and up alone (model/moe.py), the grouped kernels the weighted product too,
    and the token once for each of its experts.
    """
    if not config.use_moe:
        return 4 * config.hidden_dim
    routed, k = config.num_experts_per_tok * config.moe_hidden_dim, config.num_experts_per_tok
    grouped = world.device.type == "cuda" and world.dtype == torch.bfloat16
    shared = 4 * config.n_shared_experts * config.moe_hidden_dim
    return shared + (5 * routed + k * config.dim if grouped else 2 * routed)


def memory_line(config, args, world, trainable: int, others=0) -> str:
    """The estimate in words, with what to lower where the device has less."""
    need = training_bytes(config, args, world, trainable, others)
    have = device_bytes(world.device)
    text = f"about {need / GB:.1f} GB a process (estimate)"
    if have and need > 0.9 * have:
        text += f", but {world.device} has {have / GB:.1f} GB: lower --batch_size (and raise --accumulation_steps), "
        text += "lower --seq_len, or use --gradient_checkpointing"
    return text


def what_to_lower(args) -> str:
    """For a run whose memory was not enough: flags that need less of it, the one that changes nothing else first."""
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
    """All memory of the device; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
