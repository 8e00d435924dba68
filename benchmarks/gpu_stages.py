"""Whole stages on a device, as a user starts them, beside the same stages on the CPU: losses, kills, precisions.

Every run is a process of its own, a few steps of the preset `tiny` on rows of the embedded sample. Its reference has
the same command but for --device cpu, hence float32, and starts from the same weights: those that the reference of the
stage before has left. A run that has ended leaves a result.json and is not repeated.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.parts import Case, Part
from benchmarks.stages import ROOT, SAMPLE, read_lines
from common.errors import RunFailed, UserError
from common.files import replaced

ROWS = 300  # of each of the sample's files, taken evenly
LIMIT_SECONDS = 540  # of one run: one that hangs must not hold the rest
KILLS_TRIED = 3
TEXT = "--seq_len 256 --batch_size 2 --accumulation_steps 2 --val_split 0.05 --eval_interval 10"
ANSWERS = "--seq_len 128 --batch_size 16 --accumulation_steps 1 --group 4 --max_new_tokens 96 --val_split 0.02"


@dataclass(frozen=True)
class Run:
    """command: of python. data: a file of the sample. base: the run that leaves its starting weights (role: the flag
    that names them), None for random ones. compared: the number of its log that is set beside the reference's. longer:
    times as many steps. here: flags of the device's run alone."""

    command: str
    data: str
    flags: str
    base: str | None = None
    role: str = "--from_weight"
    compared: str = "loss"
    longer: int = 1
    here: str = ""


PRETRAIN, FROM_NOTHING = "1-pretrain.py", f"{TEXT} --preset tiny"
RUNS = {
    "pretrain": Run(PRETRAIN, "pretrain", FROM_NOTHING),
    "full_sft": Run("3-full_sft.py", "sft", TEXT, "pretrain"),
    "lora": Run("4-lora_sft.py", "lora_domain", TEXT, "full_sft"),
    "dpo": Run("5-dpo_train.py", "dpo", TEXT, "full_sft"),
    "full_dist": Run("train_distill.py", "sft", TEXT, "full_sft", role="--teacher"),
    "reason": Run("train_distill_reason.py", "reason", TEXT, "full_sft"),
    # Reinforcement needs a model that is right now and then, which is trained on the device: it takes a while.
    "reasoner": Run("train_distill_reason.py", "reason", f"{FROM_NOTHING} --from_weight none --optimizer muon "
                    "--learning_rate 4e-3 --save_weight reasoner", longer=5),
    "grpo": Run("train_grpo.py", "reason", ANSWERS, "reasoner", compared="reward"),
    "grpo-fixed": Run("-m benchmarks.fixed_answers", "reason", ANSWERS, "reason", compared="grad_norm"),
    "pretrain-qk_norm": Run(PRETRAIN, "pretrain", f"{FROM_NOTHING} --qk_norm"),
    "pretrain-experts": Run(PRETRAIN, "pretrain", f"{FROM_NOTHING} --use_moe --moe_hidden_dim 128"),
    "pretrain-checkpointing": Run(PRETRAIN, "pretrain", f"{FROM_NOTHING} --gradient_checkpointing"),
    "pretrain-compiled": Run(PRETRAIN, "pretrain", FROM_NOTHING, here="--compile"),
}  # fmt: skip
COMPARED_RUNS = [name for name in RUNS if name != "reasoner"]
KILLED_RUNS = ("pretrain", "full_sft", "lora", "dpo", "full_dist", "reason", "grpo")
REFERENCE = "cpu"


# ------------------------------------------------------------------------------------------------------------- running
class StageProcess:
    """The process of a run. where: REFERENCE, or a name for what is done with it on the device."""

    def __init__(self, args, name: str, where: str, *more: str):
        run, self.folder = RUNS[name], folder_of(args, name, where)
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = {
            "--data_path": sample_rows(args, run.data), "--device": REFERENCE if where == REFERENCE else args.device,
            "--max_steps": run.longer * args.steps, "--save_interval": max(1, args.steps // 6),
            "--out_dir": self.folder,
        }  # fmt: skip
        if run.base:
            flags[run.role] = once(args, run.base, "device" if run.base == "reasoner" else REFERENCE)["weights"]
        words = [*run.command.split(), *run.flags.split(), *(str(w) for flag in flags.items() for w in flag), *more]
        words += run.here.split() if where != REFERENCE else []
        self.command, self.printed = " ".join(words), self.folder / "printed.txt"
        with open(self.printed, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)

    def result(self) -> dict:
        """Waits for the end -> the JSON object of the last line. UserError where the run refuses its flags."""
        try:
            code = self.process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RunFailed(f"`python {self.command}` took more than {LIMIT_SECONDS} seconds") from None
        lines = self.printed.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if code == 2:
            raise UserError(lines[-1].removeprefix("error: "))
        if code:
            raise RunFailed(f"`python {self.command}` ended with exit code {code}: {lines[-1] if lines else ''}")
        return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def folder_of(args, name: str, where: str) -> Path:
    return Path(args.out_dir).absolute() / "runs" / where / name


def sample_rows(args, name: str) -> Path:
    """A file of ROWS rows of dataset/sample/<name>.jsonl, more or less."""
    path = Path(args.out_dir).absolute() / "runs" / f"{name}.jsonl"
    if not path.exists():
        rows = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        with replaced(path, text=True) as file:
            file.writelines(rows[:: max(1, len(rows) // ROWS)])
    return path


def once(args, name: str, where: str, *more: str) -> dict:
    """The result of the run, which is begun where it has not ended before."""
    done = folder_of(args, name, where) / "result.json"
    if not done.exists():
        result = StageProcess(args, name, where, "--overwrite", *more).result()
        with replaced(done, text=True) as file:
            json.dump(result, file)
    return json.loads(done.read_text(encoding="utf-8"))


def killed_and_resumed(args, name: str) -> tuple[int, dict]:
    """-> (steps that were done when it was killed with SIGKILL, after a save; the result of the run that went on)."""
    for _ in range(KILLS_TRIED):
        shutil.rmtree(folder_of(args, name, "killed"), ignore_errors=True)
        started = StageProcess(args, name, "killed", "--overwrite")
        while started.process.poll() is None and not any(started.folder.rglob("*_resume.pth")):
            time.sleep(0.002)
        if started.process.poll():
            started.result()  # it failed by itself: says why
        started.process.kill()
        if started.process.wait():
            log = next(p for p in started.folder.rglob("*.jsonl") if "cache" not in p.relative_to(started.folder).parts)
            killed_after = len(read_steps(log))
            return killed_after, StageProcess(args, name, "killed", "--resume").result()
    raise RunFailed(
        f"`python {started.command}` ended {KILLS_TRIED} times before it could be killed; take more --steps"
    )


# ----------------------------------------------------------------------------------------------------------- comparing
def read_steps(log: Path) -> list[dict]:
    """The lines of a run's log that tell of a step; what a kill has cut short is left out."""
    text = log.read_text(encoding="utf-8")
    return [line for line in read_lines(text[: text.rfind("\n") + 1]) if "loss" in line]


def numbers(result: dict, name: str) -> list[float]:
    """A number of a run's log, step by step."""
    return [line[name] for line in read_steps(Path(result["weights"]).with_suffix(".jsonl"))]


def difference(a: float, b: float) -> float:
    """Between 0 and 2, as a share of the larger one."""
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def compared(args, name: str, result: dict) -> dict:
    """A run's numbers beside its reference's, at the steps of which both are finite: the gradient's norm is infinite
    where float16 passes over a step."""
    what = RUNS[name].compared
    pairs = zip(numbers(result, what), numbers(once(args, name, REFERENCE), what), strict=True)
    own, theirs = zip(*(pair for pair in pairs if all(map(math.isfinite, pair))), strict=True)
    apart = [difference(a, b) for a, b in zip(own, theirs, strict=True)]
    return {
        "compared": what, "steps": len(own), "cpu_first": theirs[0], "cpu_last": theirs[-1], "first": own[0],
        "last": own[-1], "first_difference": apart[0], "largest_difference": max(apart),
    }  # fmt: skip


def equality(one: dict, two: dict) -> dict:
    """How alike two finished runs are: their losses, and the weights they wrote."""
    apart = [difference(a, b) for a, b in zip(numbers(one, "loss"), numbers(two, "loss"), strict=True)]
    first, second = (torch.load(r["weights"], map_location="cpu", weights_only=True)["model"] for r in (one, two))
    weights = max((first[name].float() - second[name].float()).abs().max().item() for name in first)
    return {"equal": weights == 0 and max(apart) == 0, "loss_difference": max(apart), "weights_difference": weights}


def measure_stage(args, name: str) -> dict:
    return compared(args, name, once(args, name, "device"))


def measure_kill(args, name: str) -> dict:
    whole, again = once(args, name, "device"), once(args, name, "again")
    killed_after, resumed = killed_and_resumed(args, name)
    return {"killed_after": killed_after, **equality(whole, resumed), "undisturbed": equality(whole, again)}


def measure_dtype(args, name: str, dtype: str) -> dict:
    try:
        result = once(args, name, dtype, "--dtype", dtype)
    except UserError as refusal:
        return {"refused": str(refusal)}
    last = read_steps(Path(result["weights"]).with_suffix(".jsonl"))[-1]
    return compared(args, name, result) | {"passed_over": last.get("passed_over")}


# --------------------------------------------------------------------------------------------------------------- parts
def cases(args, names) -> list[Case]:
    return [(name,) for name in names if name in args.stages]


COMPARED = {
    "compared": lambda f: f["compared"],
    "first step, CPU": lambda f: f"{f['cpu_first']:.4f}",
    "first step, here": lambda f: f"{f['first']:.4f}",
    "apart": lambda f: f"{f['first_difference']:.1e}",
    "last step, CPU": lambda f: f"{f['cpu_last']:.4f}",
    "last step, here": lambda f: f"{f['last']:.4f}",
    "farthest apart": lambda f: f"{f['largest_difference']:.1e}",
}
PARTS = {
    "stages": Part(
        "the same steps from the same start in float32 on the CPU and in the device's precision (\"here\"); apart is a "
        "share of the larger number. GRPO on answers that each samples for itself, which differ, shows their mean "
        "reward; on fixed answers, the gradient's norm.",
        lambda args: cases(args, COMPARED_RUNS), measure_stage, ("stage",), COMPARED,
    ),
    "kills": Part(
        "a run killed with SIGKILL after a save and resumed, beside the undisturbed one; and beside that, a second "
        "undisturbed one: kernels that add in any order are not equal to themselves. Largest difference of a step's "
        "loss (a share) and of a weight.",
        lambda args: cases(args, KILLED_RUNS), measure_kill, ("stage",),
        {
            "killed after step": lambda f: str(f["killed_after"]),
            "equal": lambda f: "yes" if f["equal"] else "no",
            "loss": lambda f: f"{f['loss_difference']:.1e}",
            "weight": lambda f: f"{f['weights_difference']:.1e}",
            "undisturbed: equal": lambda f: "yes" if f["undisturbed"]["equal"] else "no",
            "undisturbed: loss": lambda f: f"{f['undisturbed']['loss_difference']:.1e}",
            "undisturbed: weight": lambda f: f"{f['undisturbed']['weights_difference']:.1e}",
        },
    ),
    "dtypes": Part(
        "as stages, in another precision: float16 with its scaler, and how many steps that passed over; float32 with "
        "products in TF32.",
        lambda args: [(name, dtype) for dtype in ("float16", "float32") for name in ("pretrain", "full_sft")],
        measure_dtype, ("stage", "precision"),
        COMPARED | {
            "passed over": lambda f: str(f["passed_over"]) if f["passed_over"] is not None else "–",
            "refused": lambda f: f["refused"],
        },
    ),
}  # fmt: skip
