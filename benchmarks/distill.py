"""Does a teacher help? A student distilled from a larger model of ours, and the same student alone on the same tokens.

Both students have one shape, start, order of rows, optimizer and rate; only the loss differs. Per seed the held-out
bits per byte of both.
"""

from pathlib import Path
from statistics import mean

from benchmarks.stages import add_run_flags, stage

STUDENT = ["--preset", "tiny", "--dim", 128, "--n_layers", 4, "--n_heads", 4, "--n_kv_heads", 2]
TEACHER = ["--preset", "tiny", "--dim", 256, "--n_layers", 8, "--n_heads", 8, "--n_kv_heads", 2]
RECIPE = ["--optimizer", "muon", "--learning_rate", "4e-3", "--weight_decay", 0.1, "--log_interval", 50,
          "--eval_interval", 0, "--accumulation_steps", 1]  # fmt: skip


def add_flags(parser) -> None:
    add_run_flags(parser, "out/benchmark_distill", 500, "a student", "train_distill.py")
    parser.add_argument("--teacher", metavar="PATH", help="instead of training one")
    parser.add_argument("--teacher_steps", type=int, default=2000, help="(%(default)s)")


def run(args) -> dict:
    out = Path(args.out_dir)
    common = ["--data_path", *args.data_path, "--seq_len", args.seq_len, "--batch_size", args.batch_size, *RECIPE]
    teacher = args.teacher or stage("1-pretrain.py", *common, *TEACHER, "--max_steps", args.teacher_steps, "--out_dir",
                                    out / "teacher", "--resume")["weights"]  # fmt: skip
    alone, distilled = [], []
    for seed in args.seeds:
        student = [*common, *STUDENT, "--from_weight", "none", "--max_steps", args.steps, "--seed", seed, "--overwrite"]
        plain = stage("1-pretrain.py", *student, "--out_dir", out / f"alone_{seed}")
        taught = stage("train_distill.py", *student, "--rows", "text", "--teacher", teacher, *args.flags,
                       "--out_dir", out / f"taught_{seed}")  # fmt: skip
        alone.append(plain["val_bits_per_byte"])
        distilled.append(taught["val_bits_per_byte"])
    return {
        "seeds": args.seeds, "tokens": plain["tokens"], "steps": args.steps, "teacher": str(teacher),
        "alone_bits_per_byte": alone, "distilled_bits_per_byte": distilled,
        "gain": 1 - mean(distilled) / mean(alone), "alone_seconds": plain["seconds"], "seconds": taught["seconds"],
        "passed": all(b < a for a, b in zip(alone, distilled, strict=True)),
    }  # fmt: skip
