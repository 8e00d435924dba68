"""A training step with experts against a dense model of equal active size.

Forward, backward and AdamW, one thread, CPU seconds, in turns (A B A B ...): a busy machine slows both.
"""

import torch

from benchmarks.report import paired_ratios, spread
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM


def add_flags(parser) -> None:
    parser.add_argument("--tokens", type=int, default=4096, help="of one step (%(default)s)")
    parser.add_argument("--n_layers", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="paired measurements (%(default)s)")


def run(args) -> dict:
    torch.set_num_threads(1)
    fine = {"n_routed_experts": 32, "num_experts_per_tok": 8}
    cases = {
        "minimind2-moe": LMConfig.from_preset("minimind2-moe", n_layers=args.n_layers),
        "32 experts of 1/8, top-8": LMConfig.from_preset(
            "minimind2-moe", n_layers=args.n_layers, moe_hidden_dim=1728 // 8, **fine
        ),
    }
    result = {"n_layers": args.n_layers, "tokens": args.tokens}
    for name, config in cases.items():
        active = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_hidden_dim
        dense = LMConfig.from_preset("minimind2-moe", n_layers=args.n_layers, use_moe=False, hidden_dim=active)
        ratios = paired_ratios(training_step(config, args.tokens), training_step(dense, args.tokens), args.pairs)
        result[name] = spread(ratios)
        print(f"{name:<26} against dense of width {active}: median {result[name]['median']:.3f}, "
              f"from {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} pairs", flush=True)  # fmt: skip
    return result


def training_step(config: LMConfig, tokens: int, seq_len: int = 512):
    """A function that trains a fresh model of this shape one step on the same random rows."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(3, config.vocab_size, (tokens // seq_len, seq_len))
    segments = torch.ones_like(ids)

    def step():
        optimizer.zero_grad()
        model(ids, segment_ids=segments, labels=ids).loss.backward()
        optimizer.step()

    return step
