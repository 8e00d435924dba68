"""The same text, the same network, two recipes: how much sooner does ours reach what MiniMind's reaches in the end?

MiniMind's recipe is benchmarks/padded.py, at its own rate and at the best of --rates; ours is `1-pretrain.py` with its
defaults. Both see as many slots (rows times their length), are validated as often on the same held-out documents, and
run one after the other, a seed at a time. Times are CPU seconds of the whole process, so other work on the machine
counts little. The ratio is MiniMind's time to its last figure over our time to the same figure, read off our curve:
there our rate has not yet come down, so the ratio is a lower bound.
"""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.padded import CUT, ROWS
from benchmarks.parts import spread
from benchmarks.stages import ROOT, stage
from common.errors import RunFailed

THEIR_RATE = 5e-4
SHAPE = {"dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 2}  # 3.6 million parameters


def add_flags(parser) -> None:
    parser.add_argument("--data_path", nargs="+", required=True, help="text files, as for 1-pretrain.py")
    parser.add_argument("--out_dir", default="out/benchmark_recipe", help="(%(default)s)")
    parser.add_argument("--slots", type=float, default=6e6, help="tokens and padding of a run (6e6)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(%(default)s)")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3],
                        help="further rates for MiniMind's recipe, for the first seed (%(default)s)")  # fmt: skip
    parser.add_argument("--points", type=int, default=8, help="validations of a run (%(default)s)")
    parser.add_argument("--val_split", type=float, default=0.01, help="(%(default)s)")
    parser.add_argument("--shape", type=json.loads, default=SHAPE, help="JSON (%(default)s)")
    parser.add_argument("flags", nargs="*", help="further flags of 1-pretrain.py, after --")


def run(args) -> dict:
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    # Builds the token cache that all runs share.
    stage("1-pretrain.py", *our_flags(args, 1), "--out_dir", out, "--dry_run")
    first, *others = args.seeds
    theirs = {(rate, first): padded(args, out, rate, first) for rate in (THEIR_RATE, *args.rates)}
    best = min({rate for rate, _ in theirs}, key=lambda rate: theirs[rate, first]["curve"][-1][1])
    ours = {first: packed(args, out, first)}
    for seed in others:
        theirs |= {(rate, seed): padded(args, out, rate, seed) for rate in {THEIR_RATE, best}}
        ours[seed] = packed(args, out, seed)

    result = {"slots": args.slots, "shape": args.shape, "best_rate": best, "ours": last_figures(ours.values())}
    for name, rate in (("their_rate", THEIR_RATE), ("best_rate_of_theirs", best)):
        runs = {seed: theirs[rate, seed] for seed in args.seeds}
        ratios = [runs[s]["cpu_seconds"] / when(ours[s], runs[s]["curve"][-1][1]) for s in args.seeds]
        result[name] = {"rate": rate, **last_figures(runs.values()), "times_sooner": spread(ratios)}
    for (rate, seed), found in theirs.items():
        show(f"MiniMind's, rate {rate:g}, seed {seed}", found)
    for seed, found in ours.items():
        show(f"ours, seed {seed}", found)
    return result


def our_flags(args, seed: int) -> list:
    steps = math.ceil(args.slots / (8 * 512))
    shape = [word for name, value in args.shape.items() for word in (f"--{name}", value)]
    return ["--preset", "tiny", *shape, "--data_path", *args.data_path, "--seq_len", 512, "--batch_size", 8,
            "--accumulation_steps", 1, "--max_steps", steps, "--eval_interval", max(1, steps // args.points),
            "--log_interval", max(1, steps // 20), "--save_interval", steps, "--val_split", args.val_split,
            "--seed", seed, *args.flags]  # fmt: skip


def packed(args, out: Path, seed: int) -> dict:
    """A run of ours -> {"cpu_seconds", "curve": [step, bits per byte], "steps", "tokens", "real_token_share"}."""
    flags = [*our_flags(args, seed), "--out_dir", out, "--save_weight", f"ours_{seed}", "--overwrite"]
    result, seconds = timed(lambda: stage("1-pretrain.py", *flags))
    lines = map(json.loads, Path(result["weights"]).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines())
    curve = [[line["step"], line["val_bits_per_byte"]] for line in lines if line.get("val_bits_per_byte")]
    kept = {key: result[key] for key in ("steps", "tokens", "real_token_share")}
    return kept | {"cpu_seconds": seconds, "curve": curve}


def padded(args, out: Path, rate: float, seed: int) -> dict:
    """A run of MiniMind's recipe, as packed()."""
    steps = math.ceil(args.slots / (ROWS * CUT))
    command = ["-m", "benchmarks.padded", "--data_path", *args.data_path, "--steps", steps, "--learning_rate", rate,
               "--seed", seed, "--points", args.points, "--val_split", args.val_split, "--cache", out / "cache",
               "--shape", json.dumps(args.shape)]  # fmt: skip

    def measured() -> dict:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RunFailed(f"benchmarks/padded.py ended with exit code {done.returncode}")
        print(done.stdout, end="", flush=True)
        return json.loads(done.stdout.splitlines()[-1])

    result, seconds = timed(measured)
    return result | {"cpu_seconds": seconds}


def timed(function) -> tuple[dict, float]:
    """What it returns, and the CPU seconds of the processes it started and waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = function()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def when(found: dict, bits: float) -> float:
    """CPU seconds at which a run's curve first reaches these bits per byte, between two points by a straight line;
    infinity where it does not. A step is taken to cost the same throughout."""
    before = None
    for step, value in found["curve"]:
        if value <= bits:
            share = 1.0 if before is None else (before[1] - bits) / (before[1] - value)
            start = 0 if before is None else before[0]
            return (start + share * (step - start)) / found["steps"] * found["cpu_seconds"]
        before = step, value
    return math.inf


def last_figures(runs) -> dict:
    runs = list(runs)
    return {"bits_per_byte": spread([run["curve"][-1][1] for run in runs]),
            "cpu_seconds": spread([run["cpu_seconds"] for run in runs]),
            "tokens": runs[0]["tokens"], "real_token_share": runs[0]["real_token_share"]}  # fmt: skip


def show(name: str, found: dict) -> None:
    second = found["cpu_seconds"] / found["steps"]
    points = "  ".join(f"{value:.3f} after {step * second:.0f} s" for step, value in found["curve"])
    print(f"{name}: {points}")
