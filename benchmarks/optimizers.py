"""AdamW and Muon at several learning rates and seeds: held-out bits per byte at equal tokens and at equal time.

Every run is `1-pretrain.py` with a model of 3 million parameters (dim 192, 6 layers) on the same real text, cosine
schedule unless a flag says otherwise, one row of the table for each optimizer and rate. A step of Muon costs more than
one of AdamW; by --steps_ratio AdamW gets so many times Muon's steps, which makes the times equal (0: the ratio is
measured first, in CPU seconds of a few steps of each).
"""

from pathlib import Path

import torch

from benchmarks.report import paired_ratios, spread
from benchmarks.stages import add_run_flags, stage
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from trainer.optimizers import make_optimizers

MODEL = {"dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2}
RATES = {"muon": (1e-3, 2e-3, 4e-3, 8e-3), "adamw": (5e-4, 1e-3, 2e-3, 4e-3)}


def add_flags(parser) -> None:
    add_run_flags(parser, "out/benchmark_optimizers", 250, "Muon", "1-pretrain.py")
    parser.add_argument("--steps_ratio", type=float, default=0.0, help="AdamW's steps for one of Muon (measured)")


def step_cost(rows: int, seq_len: int) -> float:
    """CPU seconds of a whole step with Muon over one with AdamW, the forward and backward pass among them."""
    ids = torch.randint(3, 6400, (rows, seq_len))

    def step(kind):
        model = MiniMindForCausalLM(LMConfig(**MODEL))
        optimizers = make_optimizers(model, kind, 1e-3, 0.1)

        def once():
            model(ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return once

    return spread(paired_ratios(step("muon"), step("adamw"), 5))["median"]


def run(args) -> dict:
    ratio = args.steps_ratio or step_cost(args.batch_size, args.seq_len)
    print(f"a step of Muon takes {ratio:.2f} of one of AdamW", flush=True)
    shape = [word for name, value in MODEL.items() for word in (f"--{name}", value)]
    common = ["--preset", "tiny", *shape, "--data_path", *args.data_path, "--seq_len", args.seq_len, "--batch_size",
              args.batch_size, "--accumulation_steps", 1, "--eval_interval", 0, "--log_interval", 50, "--val_split",
              0.02, "--resume", *args.flags]  # fmt: skip
    table = {}
    for kind, rates in RATES.items():
        budgets = {"equal tokens": args.steps} | ({"equal time": round(args.steps * ratio)} if kind == "adamw" else {})
        for budget, steps in budgets.items():
            for rate in rates:
                bits = []
                for seed in args.seeds:
                    out = Path(args.out_dir) / f"{kind}_{rate:g}_{steps}_{seed}"
                    done = stage("1-pretrain.py", *common, "--optimizer", kind, "--learning_rate", rate, "--max_steps",
                                 steps, "--seed", seed, "--out_dir", out)  # fmt: skip
                    bits.append(done["val_bits_per_byte"])
                table[f"{kind} {rate:g} {steps} steps ({budget})"] = spread(bits)
    for name, found in table.items():
        print(f"{name:<36} {found['median']:.4f} ({found['min']:.4f}-{found['max']:.4f})")
    return {"step_cost": ratio, "tokens_a_step": args.batch_size * args.seq_len, "bits_per_byte": table}
