"""An estimate of how long a run will take: its operations, divided by those that the device does in a second."""

from trainer.log import device_flops, flops_per_token

# Share of its peak speed that a device reaches while it trains a small model. A GPU's peak is its maker's figure, a
# CPU's is measured with large matrix products. Of a CPU's the sample's model reached 40 to 51%, larger ones more
# (docs/benchmarks.md). A GPU's share is assumed.
REACHED = {"cuda": 0.3, "cpu": 0.5, "mps": 0.5}


def operations(config, args, tokens: int, learned_share=1.0, others=0) -> float:
    """Floating-point operations of training on so many tokens, padding included.

    learned_share: share of the parameters that is trained. others: parameters of further models that only read along,
    such as a teacher: 2 operations a parameter.
    """
    of_token = flops_per_token(config, args.seq_len, learned_share)
    if args.gradient_checkpointing:  # the forward pass, a third of it all, is computed twice
        of_token *= 4 / 3
    return tokens * (of_token + 2 * others)


def time_line(config, args, world, tokens: int, learned_share=1.0, others=0) -> str:
    """The estimate in words. tokens: row slots of all steps that are left."""
    if args.stage == "grpo":
        return "not estimated: sampling answers takes most of it, and nobody knows how long they will be"
    peak = device_flops(world)
    if not peak:
        return "not estimated: this GPU is not in the table of trainer/log.py; the log says how much is left"
    reached = REACHED[world.device.type]
    seconds = operations(config, args, tokens, learned_share, others) / (reached * peak)
    at = f"{reached:.0%} of the device's {peak / 1e9:,.0f} GFLOP/s"
    return f"about {in_words(seconds)} (estimate: {at}; without validation)"


def in_words(seconds: float) -> str:
    """45.2 -> "45 seconds"; minutes from two of them on, hours likewise."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
