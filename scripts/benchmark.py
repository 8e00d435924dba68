"""Measurements that are no tests: each subcommand prints its figures and, last, one line of JSON.

    python scripts/benchmark.py moe        a training step with experts against a dense model of equal active size

Speeds are ratios of two things measured in turns (A B A B ...) in one process on one thread, in CPU seconds: a busy
machine slows both.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM


def paired_ratios(first, second, pairs: int) -> list[float]:
    """CPU seconds of first() over those of second(), called in turns after one unmeasured call of each."""
    first(), second()
    ratios = []
    for _ in range(pairs):
        begin = time.process_time()
        first()
        middle = time.process_time()
        second()
        ratios.append((middle - begin) / (time.process_time() - middle))
    return ratios


def summary(ratios: list[float]) -> dict:
    """Median, smallest and largest of paired ratios."""
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "pairs": len(ratios)}


# ------------------------------------------------------------------------------------------------------------- moe
def moe(args) -> dict:
    """Forward, backward and AdamW of a model with experts / the same of the dense model a token meets in it."""
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
        result[name] = summary(ratios)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("moe", help=moe.__doc__)
    command.add_argument("--tokens", type=int, default=4096, help="tokens of one step")
    command.add_argument("--n_layers", type=int, default=8)
    command.add_argument("--pairs", type=int, default=7, help="paired measurements")
    command.set_defaults(run=moe)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"command": args.command, **args.run(args)}))


if __name__ == "__main__":
    main()
