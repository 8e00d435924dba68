"""The command line of every stage: common flags with one name, one meaning and one order, and errors in one line."""

import argparse
import contextlib
import errno
import importlib.util
import math
import os
import re
import sys
from pathlib import Path

from model.LMConfig import DEFAULT_PRESET, PRESETS

DISK_FAULTS = (  # full, over a limit, broken, gone
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE,
)  # fmt: skip
WRONG_PATHS = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
DEEPSPEED_CONFIG = Path(__file__).with_name("deepspeed.json")
BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
BATCH = ("batch_size", "accumulation_steps")
SHAPE_FLAGS = {  # fields of LMConfig that can be set on the command line, and what they are
    "dim": (int, "width of the model"), "n_layers": (int, "decoder layers"), "n_heads": (int, "query heads"),
    "n_kv_heads": (int, "key/value heads"), "hidden_dim": (int, "width of a feed-forward block"),
    "use_moe": (bool, "experts in place of feed-forward blocks"),
    "n_routed_experts": (int, "experts a token can go to"), "n_shared_experts": (int, "experts all tokens go through"),
    "num_experts_per_tok": (int, "experts a token goes to"), "moe_hidden_dim": (int, "width of an expert"),
    "aux_loss_alpha": (float, "weight of the experts' balance loss"), "qk_norm": (bool, "norm on queries and keys"),
    "dropout": (float, "share of activations zeroed in training"),
}  # fmt: skip


class UserError(Exception):
    """A mistake of the user: the message is one line that says what, where and what to do. Exit code 2."""


class RunFailed(Exception):
    """A failure that is not the user's (NaN, full disk, lost process). One line, exit code 1."""


@contextlib.contextmanager
def user_errors():
    """A ValueError of model/ or inference/, which is worded for the user, becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def out_of_memory(error: BaseException) -> str | None:
    """What to say of an allocator's error; None for any other. Only CUDA's has a class of its own."""
    text = str(error)
    if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
        return None
    if (wanted := re.search(r"tried to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)) is None:
        return "out of memory"
    amount = f"{int(wanted[1]) / 2**30:.2f} GiB" if wanted[2] == "bytes" else f"{wanted[1]} {wanted[2]}"
    return f"out of memory ({amount} more were wanted)"


def disk_fault(error: BaseException) -> str | None:
    """What to say of an error of the disk: which file it met, and where that disk is; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in DISK_FAULTS:
        return None
    if error.filename is None:
        return error.strerror
    place = Path(error.filename).absolute().parent
    while not os.path.ismount(place):
        place = place.parent
    return f"{error.filename}: {error.strerror} (the disk at {place})"


def note(text: str) -> None:
    """Prints something worth knowing, once, however many processes a launcher started."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"NOTE: {text}", flush=True)


def run_main(main, argv=None) -> None:
    """Runs a program's main(argv) and turns its errors into one line and an exit code."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if (words := out_of_memory(error)) is None:
            raise
        print(f"failed: {words}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if (words := disk_fault(error)) is not None:
            print(f"failed: {words}; see to it and give the same command again", file=sys.stderr)
            sys.exit(1)
        if error.errno in WRONG_PATHS and error.filename is not None:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        raise
    except KeyboardInterrupt:  # while data are read; during training the loop saves first
        print("stopped", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line and the defaults in the help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)

    def flag(self, group, name, default, text):
        """A boolean: --name, --no-name, or MiniMind's --name 0/1/True/False."""
        group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=text)
        group.add_argument(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS,
                           help=argparse.SUPPRESS)  # fmt: skip


def boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLEANS[text.lower()]


def stage_parser(stage: str, description: str, **defaults) -> Parser:
    """The common flags, with this stage's defaults.

    stage: its name in records, and the first part of its files. learning_rate may be one for each optimizer, as a dict.
    The caller adds flags of its own to the parser.
    """
    d = {
        "save_weight": stage, "seq_len": 512, "epochs": 1.0, "batch_size": 8, "accumulation_steps": 4,
        "learning_rate": 1e-3, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.02, "weight_decay": 0.1,
        "from_weight": None, "preset": None, "val_split": 0.01,
    } | defaults  # fmt: skip
    parser = Parser(description=description)
    rates = d.pop("learning_rate")
    rates = rates if isinstance(rates, dict) else {"adamw": rates, "muon": rates}
    parser.set_defaults(stage=stage, recipe_flags=(), subfolder="", default_optimizer=d["optimizer"], rates=rates)

    g = parser.add_argument_group("files")
    g.add_argument(
        "--data_path", nargs="+", metavar="FILE", help="training data: .jsonl(.gz/.zst), .csv, .txt, .parquet"
    )
    g.add_argument("--tokenizer", metavar="FOLDER", help="default: the starting weights' own, else the project's")
    g.add_argument("--out_dir", default="out", metavar="FOLDER", help="where everything is written (out)")
    g.add_argument("--save_weight", default=d["save_weight"], metavar="NAME",
                   help=f"first part of the weights' name ({d['save_weight'] or 'that of the data'})")  # fmt: skip
    g.add_argument("--from_weight", default=d["from_weight"], metavar="PATH|STAGE|none",
                   help="starting weights: a path, a stage's name, or none for random ones")  # fmt: skip

    g = parser.add_argument_group("shape (default: that of the starting weights, else --preset)")
    g.add_argument("--preset", default=d["preset"], metavar="NAME",
                   help=f"{', '.join(PRESETS)} ({d['preset'] or DEFAULT_PRESET})")  # fmt: skip
    for name, (kind, text) in SHAPE_FLAGS.items():
        if kind is bool:
            parser.flag(g, name, None, text)
        else:
            g.add_argument(f"--{name}", type=kind, metavar="N", help=text)

    g = parser.add_argument_group("training")
    g.add_argument("--seq_len", "--max_seq_len", type=int, default=d["seq_len"], metavar="N",
                   help=f"tokens of a training row ({d['seq_len']})")  # fmt: skip
    for name, kind, text in (
        ("epochs", float, "passes over the data"), ("max_steps", int, "steps in all, whatever --epochs says"),
        ("batch_size", int, "rows of one micro-batch of one process"),
        ("accumulation_steps", int, "micro-batches of one step"),
    ):  # fmt: skip
        told = f"{d.get(name)}; on a GPU as memory allows" if name in BATCH else d.get(name)
        default = None if name in BATCH else d.get(name)  # None: not given, see parse
        g.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} ({told})")
    parser.set_defaults(default_batch={name: d[name] for name in BATCH})
    told = ", ".join(f"{rate:g} for {name}" for name, rate in rates.items())
    told = told if len(set(rates.values())) > 1 else f"{rates['adamw']:g}"
    g.add_argument("--learning_rate", type=float, metavar="N", help=f"peak rate ({told})")
    g.add_argument("--optimizer", choices=("adamw", "muon"), help=f"({d['optimizer']}; with --deepspeed adamw)")
    g.add_argument("--schedule", choices=("cosine", "wsd"), default=d["schedule"], help=f"({d['schedule']})")
    g.add_argument("--warmup", type=float, default=d["warmup"], metavar="N",
                   help=f"steps of rising rate; below 1 a share of all steps ({d['warmup']})")  # fmt: skip
    g.add_argument("--weight_decay", type=float, default=d["weight_decay"], metavar="N", help=f"({d['weight_decay']})")
    g.add_argument("--grad_clip", type=float, default=1.0, metavar="N", help="largest gradient norm, 0: no limit (1.0)")
    g.add_argument("--seed", type=int, default=42, metavar="N", help="of weights, order and dropout (42)")

    g = parser.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (auto)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="of the arithmetic; weights stay float32 (auto: bfloat16 where the GPU has it)")  # fmt: skip
    parser.flag(g, "compile", False, "compile the model with torch.compile")
    parser.flag(g, "gradient_checkpointing", False, "less memory, a third more time")
    g.add_argument("--deepspeed", nargs="?", const=str(DEEPSPEED_CONFIG), metavar="CONFIG.json",
                   help="train by DeepSpeed, as this file says (trainer/deepspeed.json), see docs")  # fmt: skip
    g.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers, not used")

    add_watching(parser, d["val_split"])
    return parser


def add_watching(parser: Parser, val_split: float) -> None:
    """The flags that change what is said, measured and kept of a run, not how it learns."""
    g = parser.add_argument_group("watching")
    g.add_argument("--log_interval", type=int, default=10, metavar="STEPS", help="steps between printed lines (10)")
    g.add_argument("--eval_interval", type=int, default=200, metavar="STEPS",
                   help="steps between validations, 0: only at the end (200)")  # fmt: skip
    g.add_argument("--save_interval", type=int, default=100, metavar="STEPS", help="steps between saves (100)")
    g.add_argument("--save_minutes", type=float, default=10.0, metavar="X",
                   help="save at the latest after so many minutes, 0: by steps alone (10)")  # fmt: skip
    g.add_argument("--val_split", type=float, default=val_split, metavar="SHARE",
                   help=f"share of the documents held out for validation ({val_split})")  # fmt: skip
    parser.flag(g, "resume", False, "go on where the run of the same name stopped")
    parser.flag(g, "overwrite", False, "replace weights of another configuration, or an unfinished run")
    parser.flag(g, "skip_bad_lines", False, "leave out rows that cannot be read, and count them")
    parser.flag(g, "use_wandb", False, "send the numbers to Weights & Biases (without a key: keep them on disk)")
    g.add_argument("--wandb_project", default="MiniMind", metavar="NAME", help="(MiniMind)")
    parser.flag(g, "use_tensorboard", False, "write TensorBoard events to <out_dir>/tensorboard")
    parser.flag(g, "dry_run", False, "say what would be done and stop")


def parse(parser: Parser, argv=None) -> argparse.Namespace:
    """Parses and checks; all faults of the arguments are reported at once."""
    args = parser.parse_args(argv)
    args.optimizer = args.optimizer or ("adamw" if args.deepspeed else args.default_optimizer)
    args.learning_rate = args.rates[args.optimizer] if args.learning_rate is None else args.learning_rate
    # What a flag says holds; the defaults are a CPU's, and a GPU may take the step's rows in fewer micro-batches.
    args.batch_given = bool(args.deepspeed) or any(getattr(args, name) is not None for name in BATCH)
    for name, size in args.default_batch.items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    faults = faults_of(args)
    if faults:
        raise UserError("\n       ".join(faults))
    if args.deepspeed:
        from trainer.deepspeed_config import checked_config

        checked_config(args)
    return args


def faults_of(args) -> list[str]:
    """What is wrong with the common flags' values, a sentence each."""
    faults = []
    if args.preset is not None and args.preset not in PRESETS:
        faults.append(f"--preset {args.preset!r} does not exist; presets are {', '.join(PRESETS)}")
    for name in ("batch_size", "accumulation_steps", "log_interval", "save_interval"):
        if getattr(args, name) < 1:
            faults.append(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.max_steps is not None and args.max_steps < 1:
        faults.append(f"--max_steps must be at least 1, not {args.max_steps}")
    if args.seq_len < 16:
        faults.append(f"--seq_len must be at least 16, not {args.seq_len}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"--{name} must be a number, not {value}")
    for name in ("epochs", "learning_rate"):
        if getattr(args, name) <= 0:
            faults.append(f"--{name} must be above 0, not {getattr(args, name)}")
    for name in ("warmup", "weight_decay", "grad_clip", "eval_interval", "save_minutes", "seed"):
        if getattr(args, name) < 0:
            faults.append(f"--{name} must not be negative, but is {getattr(args, name)}")
    if args.seed >= 2**63:
        faults.append(f"--seed must be below 2^63, not {args.seed}")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        faults.append(f"--dropout must lie in [0, 1), not {args.dropout}")
    if not 0 <= args.val_split < 1:
        faults.append(f"--val_split must lie in [0, 1), not {args.val_split}")
    for package in ("wandb", "tensorboard"):
        if getattr(args, f"use_{package}") and importlib.util.find_spec(package) is None:
            faults.append(f"--use_{package} needs the package {package}: pip install {package}")
    if args.resume and args.overwrite:
        faults.append("--resume continues a run and --overwrite starts it afresh; give one of them")
    if args.save_weight is not None and ("/" in args.save_weight or not args.save_weight):
        faults.append(f"--save_weight is the first part of a file's name, not {args.save_weight!r}; see --out_dir")
    return faults
