"""What this project does on a GPU: right, and how fast. Needs no network, and no package but torch and transformers
with what they bring, pandas and pyarrow.

  stages     every stage, its losses beside the CPU's from the same start
  speed      training steps a second, their share of the peak and their memory, beside transformers' classes
  decode     tokens a second of 1, 16 and 64 streams, compiled or not
  kills      every stage killed and resumed, beside the undisturbed run
  dtypes     float16 with its scaler, float32 with TF32
  exams      the sample's exam, beside the CPU's answers
  compiled   speed, with --compile

Each takes two to ten minutes on a GPU such as an RTX 3090 or a larger one (estimates; the longest are stages and
compiled). They stand in the order of their worth. What is found is kept in --out_dir case by case, so a command that
was broken off is given again and goes on; a case that failed is tried again at the end. table.md there is for
docs/benchmarks.md.

  python scripts/benchmark.py gpu                                       all of it
  python scripts/benchmark.py gpu --parts stages speed                  where a machine is lent for minutes
  python scripts/benchmark.py gpu --device cpu --presets tiny --rows 2 --steps 2 --new_tokens 4    a smoke run
"""

import datetime
import shutil
import time
import traceback
from pathlib import Path

import torch
import transformers

from benchmarks import gpu_speed, gpu_stages
from benchmarks.parts import Results, tables
from common.device import pick_device
from common.errors import RunFailed, UserError, user_errors
from common.files import replaced
from model.LMConfig import PRESETS

EVERY = gpu_stages.PARTS | gpu_speed.PARTS
PARTS = {name: EVERY[name] for name in ("stages", "speed", "decode", "kills", "dtypes", "exams", "compiled")}
STAGES = gpu_stages.COMPARED_RUNS
SHAPES = ["minimind2-small", "minimind3", "minimind2-moe"]


def add_flags(parser) -> None:
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="NAME",
                        help=f"{' '.join(PARTS)} (all)")  # fmt: skip
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, metavar="NAME",
                        help=f"of stages and kills: {' '.join(STAGES)} (all)")  # fmt: skip
    parser.add_argument("--presets", nargs="+", default=SHAPES, choices=list(PRESETS), metavar="NAME",
                        help=f"of speed, decode, compiled; exams: the first ({' '.join(SHAPES)})")  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 32, 128], metavar="N",
                        help="of 512 tokens, of speed and compiled (8 32 128)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=30, help="of every run and measurement (%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=128, help="of every stream of decode (%(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N; cpu for a smoke run (%(default)s)")
    parser.add_argument("--out_dir", default="out/gpu", help="(%(default)s)")
    parser.flag(parser, "overwrite", False, "begin anew, over what --out_dir holds")


def check(args) -> None:
    for name in ("steps", "new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if min(args.rows) < 1:
        raise UserError(f"--rows must be at least 1, not {min(args.rows)}")
    if args.steps < 2 and "kills" in args.parts:
        raise UserError("--steps must be at least 2 for kills: a run is killed between two saves")


def machine(args, device: torch.device) -> dict:
    """What all figures of a table have in common."""
    name = "CPU"
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        name = f"{of.name}, compute capability {of.major}.{of.minor}, {of.total_memory / 2**30:.0f} GiB"
    return {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__, "steps": args.steps,
        "new_tokens": args.new_tokens,
    }  # fmt: skip


def measured(args, name: str, case) -> dict:
    """The figures of a case; where it failed "error", in words, after a traceback for who wants to mend it."""
    begin = time.perf_counter()
    try:
        figures = PARTS[name].measure(args, *case)
    except Exception as error:  # whatever a library raises on a machine that none of this was ever run on
        traceback.print_exc()
        figures = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return figures | {"seconds": round(time.perf_counter() - begin, 1)}


def still_answers(device: torch.device) -> bool:
    """Whether the device does: after some errors CUDA refuses all that a process asks of it."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def markdown(args, results: Results) -> str:
    found = results.machine
    head = f"{found['device']}; torch {found['torch']}, transformers {found['transformers']}; {found['steps']} steps."
    smoke = "A smoke run of the command on a CPU: no figure here is one of a GPU. " if found["device"] == "CPU" else ""
    return f"{smoke}{head} {datetime.date.today()}.\n\n{tables(PARTS, results)}\n"


def run(args) -> dict:
    check(args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA GPU here: nothing was run (--device cpu is a smoke run)")
        return {"gpu": None}
    with user_errors():
        device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    folder = Path(args.out_dir)
    file = folder / "results.jsonl"
    if args.overwrite:
        file.unlink(missing_ok=True)
    if not file.exists():  # runs of other settings may be there
        shutil.rmtree(folder / "runs", ignore_errors=True)
    results = Results(file, machine(args, device))
    todo = results.left([(name, case) for name in args.parts for case in PARTS[name].cases(args)])
    for done, (name, case) in enumerate(todo, start=1):
        print(f"[{done}/{len(todo)}] {name}: {', '.join(case)} ...", end=" ", flush=True)
        figures = measured(args, name, case)
        results.add(name, case, figures)
        print(figures.get("error", f"{figures['seconds']} s"), flush=True)
        if "error" in figures and not still_answers(device):
            raise RunFailed(f"{device} answers no more after {name}: {', '.join(case)}; what was found is in {file}, "
                            "the same command goes on with the rest")  # fmt: skip
    with replaced(folder / "table.md", text=True) as table:
        table.write(markdown(args, results))
    print("", markdown(args, results), sep="\n")
    found = {f"{name}: {', '.join(case)}": figures for (name, case), figures in results.found.items()}
    failed = [f"{name}: {', '.join(case)}" for name, case in results.failed()]
    gpu = results.machine["device"] if device.type == "cuda" else None
    return {"gpu": gpu, **results.machine, "failed": failed, "table": str(folder / "table.md"), "found": found}
