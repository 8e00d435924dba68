"""The command line of every stage: common flags with one name, one meaning and one order, and errors in one line."""

import argparse
import importlib.util
import math
from pathlib import Path

from common.errors import UserError
from common.flags import Parser, out_of_bounds
from model.LMConfig import DEFAULT_PRESET, PRESETS

DEEPSPEED_CONFIG = Path(__file__).with_name("deepspeed.json")
BATCH = ("batch_size", "accumulation_steps")
SHAPE_FLAGS = {  # fields of LMConfig that can be set on the command line, and what they are
    "dim": (int, "width of the model"), "n_layers": (int, "decoder layers"), "n_heads": (int, "query heads"),
    "n_kv_heads": (int, "key/value heads"), "hidden_dim": (int, "width of a feed-forward block"),
    "use_moe": (bool, "mixture of experts in place of feed-forward blocks"),
    "n_routed_experts": (int, "routed experts"), "n_shared_experts": (int, "shared experts"),
    "num_experts_per_tok": (int, "experts a token is sent to (top k)"), "moe_hidden_dim": (int, "width of an expert"),
    "aux_loss_alpha": (float, "weight of the load-balancing loss"), "qk_norm": (bool, "RMSNorm on queries and keys"),
    "dropout": (float, "dropout probability"),
}  # fmt: skip

BOUNDS = (  # of the common flags, see out_of_bounds; a stage gives those of its own flags as its parser's `bounds`
    (("batch_size", "accumulation_steps", "log_interval", "save_interval", "max_steps"), "be at least 1",
     lambda x: x >= 1),
    (("seq_len",), "be at least 16", lambda x: x >= 16),
    (("epochs", "learning_rate"), "be above 0", lambda x: x > 0),
    (("warmup", "weight_decay", "grad_clip", "eval_interval", "save_minutes"), "be at least 0", lambda x: x >= 0),
    (("seed",), "lie in [0, 2^63)", lambda x: 0 <= x < 2**63),
    (("dropout", "val_split"), "lie in [0, 1)", lambda x: 0 <= x < 1),
)  # fmt: skip


def stage_parser(stage: str, description: str, **defaults) -> Parser:
    """The common flags, with this stage's defaults.

    stage: its name in records, and the first part of its files' names. learning_rate: a number, or a dict with one for
    each optimizer. The caller adds flags of its own to the parser.
    """
    d = {
        "save_weight": stage, "seq_len": 512, "epochs": 1.0, "batch_size": 8, "accumulation_steps": 4,
        "learning_rate": 1e-3, "optimizer": "adamw", "schedule": "cosine", "warmup": 0.02, "weight_decay": 0.1,
        "from_weight": None, "preset": None, "val_split": 0.01,
    } | defaults  # fmt: skip
    parser = Parser(description=description)
    rates = d.pop("learning_rate")
    rates = rates if isinstance(rates, dict) else {"adamw": rates, "muon": rates}
    parser.set_defaults(stage=stage, subfolder="", recipe_flags=(), bounds=(), rates=rates,
                        default_optimizer=d["optimizer"])  # fmt: skip

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
    g.add_argument("--learning_rate", type=float, metavar="N", help=f"peak learning rate ({told})")
    g.add_argument("--optimizer", choices=("adamw", "muon"), help=f"({d['optimizer']}; with --deepspeed adamw)")
    g.add_argument("--schedule", choices=("cosine", "wsd"), default=d["schedule"], help=f"({d['schedule']})")
    g.add_argument("--warmup", type=float, default=d["warmup"], metavar="N",
                   help=f"linear warmup: steps, or below 1 a share of all steps ({d['warmup']})")  # fmt: skip
    g.add_argument("--weight_decay", type=float, default=d["weight_decay"], metavar="N", help=f"({d['weight_decay']})")
    g.add_argument(
        "--grad_clip", type=float, default=1.0, metavar="N", help="gradient clipping: largest norm, 0: none (1.0)"
    )
    g.add_argument("--seed", type=int, default=42, metavar="N", help="of weights, order and dropout (42)")

    g = parser.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (auto)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="mixed precision; weights stay float32 (auto: bfloat16 where the GPU has it)")  # fmt: skip
    parser.flag(g, "compile", False, "compile the model with torch.compile")
    parser.flag(g, "gradient_checkpointing", False, "activation checkpointing: less memory, a third more time")
    g.add_argument("--deepspeed", nargs="?", const=str(DEEPSPEED_CONFIG), metavar="CONFIG.json",
                   help="train by DeepSpeed, as this file says (trainer/deepspeed.json), see docs")  # fmt: skip
    g.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers, not used")

    add_watching(parser, d["val_split"])
    return parser


def add_watching(parser: Parser, val_split: float) -> None:
    """The flags of logging, validation and saving, which do not change what is learned."""
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
    # Flags decide. Without them the defaults below suit a CPU; a GPU may take a step's rows in fewer micro-batches, see
    # setup.micro_batch, which needs to know whether there was a flag.
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
    """What is wrong with the flags' values, a sentence each."""
    faults = out_of_bounds(args, [*BOUNDS, *args.bounds])
    if args.preset is not None and args.preset not in PRESETS:
        faults.append(f"--preset {args.preset!r} does not exist; presets are {', '.join(PRESETS)}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"--{name} must be a number, not {value}")
    for package in ("wandb", "tensorboard"):
        if getattr(args, f"use_{package}") and importlib.util.find_spec(package) is None:
            faults.append(f"--use_{package} needs the package {package}: pip install {package}")
    if args.resume and args.overwrite:
        faults.append("--resume continues a run and --overwrite starts it afresh; give one of them")
    if args.save_weight is not None and ("/" in args.save_weight or not args.save_weight):
        faults.append(f"--save_weight is the first part of a file's name, not {args.save_weight!r}; see --out_dir")
    return faults
