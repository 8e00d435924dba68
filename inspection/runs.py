"""The training runs of a folder: what they are, how far they are, how they ended, how to go on. Nothing is changed.

A run is its log, <name>.jsonl. Beside it lie what the run says of itself (<name>_run.json), its lock, its weights and,
while it is not finished, its state. Runs of before there was a <name>_run.json are known by weights and state.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.files import is_locked
from inspection.exam_results import RESULTS
from inspection.run_log import RunLog, as_row
from model.weights_file import STATE_SUFFIX, read_file

SAMPLES, NOTE = "_samples.jsonl", "_run.json"
NO_RUNS = ("cache", "wandb", "tensorboard")  # folders in out/ that hold other things
FIRST_BYTES = 2**16  # by which a file is known
RUNNING, FINISHED, STOPPED, FAILED, LOST = "running", "finished", "stopped", "failed", "lost"
NOT_KNOWN = "why is not known: it is a run of before this was written down"
KILLED = "it ended without a word: killed, or the machine went down"


@dataclass
class TrainingRun:
    """One run.

    name        "pretrain_512"
    status, why "running", "finished", "stopped", "failed", "lost" (it ended without a word), and the reason, if known
    stage       "pretrain"; "" where no file tells
    steps       of the whole run; None where no file tells
    settings    {name: value}, those of the model as "config.dim"
    resume      the command that resumes it, "" where it is finished or not known
    folder      where that command is to be given; "" where not known
    result      of a finished run, as its last line says it
    faults      what of its files cannot be read, a sentence each
    """

    name: str
    log: RunLog
    status: str = LOST
    why: str = ""
    stage: str = ""
    steps: int | None = None
    settings: dict = field(default_factory=dict)
    resume: str = ""
    folder: str = ""
    result: dict = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def beside(self, ending: str) -> Path:
        """The file of the run with this ending: ".pth", "_samples.jsonl"."""
        return self.log.path.with_name(self.name + ending)


@dataclass
class Found:
    """The runs of a folder, newest first, and (file, why it is none) for each other .jsonl there."""

    runs: list[TrainingRun]
    others: list[tuple[Path, str]]


def find_runs(folder="out", before: Found | None = None) -> Found:
    """Looks into `folder` and the folders in it. UserError where it is no folder.

    before: what was found there the last time; of its logs only what is new is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: training writes one, or name another")
    paths = [p for p in (*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")) if p.parent.name not in NO_RUNS]
    logs = {run.log.path: run.log for run in before.runs} if before else {}
    runs, others = [], []
    for path in sorted(paths):
        if path.name.endswith(SAMPLES) or path.name == RESULTS:
            continue
        if why := why_no_log(path):
            others.append((path, why))
        else:
            runs.append(open_run(path, logs.get(path)))
    return Found(sorted(runs, key=lambda run: changed(run.log.path), reverse=True), others)


def why_no_log(path: Path) -> str:
    """ "" for the log of a run, else why it is none. A log is empty until the first step is taken."""
    try:
        with open(path, "rb") as file:
            first = file.readline(FIRST_BYTES)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if first.endswith(b"\n"):
        return "" if as_row(first) is not None else "is not the log of a training run"
    known = path.with_name(path.stem + NOTE).exists() or lock_of(path).exists()
    return "" if known and len(first) < FIRST_BYTES else "is not the log of a training run"


def open_run(path, log: RunLog | None = None) -> TrainingRun:
    """The run whose log this is, as its files are now. Files that cannot be read are named in `faults`.

    log: the same log as it was read earlier; it is read on.
    """
    path = Path(path)
    run = TrainingRun(path.stem, log or RunLog(path))
    try:
        run.log.read()
    except UserError as error:
        run.faults.append(str(error))
    run.faults += run.log.faults
    note = read_note(run)
    told = note or read_record(run)
    run.stage, run.steps = text(told.get("stage")), whole_number(told.get("steps"))
    run.settings = flat(told["settings"])
    run.status, run.why, run.result = how_it_stands(run, note, told)
    if run.status != FINISHED:
        run.resume, run.folder = text(told.get("resume")), text(told.get("folder"))
    return run


def how_it_stands(run: TrainingRun, note: dict, told: dict) -> tuple[str, str, dict]:
    """-> (status, why, result): by the run's lock, else by what it wrote when it ended, else by which files are there.

    note: what the run wrote of itself, {} where it did not; told: that, or what its weights and state say.
    """
    end = note.get("end") if isinstance(note.get("end"), dict) else {}
    result = end.get("result") or told.get("result")
    result = result if isinstance(result, dict) else {}
    if is_locked(lock_of(run.log.path)):
        return RUNNING, "", {}
    if end.get("how") in (FINISHED, STOPPED, FAILED):
        return end["how"], text(end.get("why")), result
    if note:
        return LOST, KILLED, {}
    unfinished = run.beside(f"{STATE_SUFFIX}.pth").exists() or not result
    return (STOPPED, NOT_KNOWN, {}) if unfinished else (FINISHED, "", result)


def lock_of(path: Path) -> Path:
    """The lock of the run whose log this is; see trainer.checkpoint.Files."""
    return path.with_name(f".{path.stem}.lock")


# ------------------------------------------------------------------------------------------- what its files say of it
def read_note(run: TrainingRun) -> dict:
    """What the run wrote of itself; {} where there is no such file, or none that can be read."""
    path = run.beside(NOTE)
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        run.faults.append(f"{path} cannot be read: {error}")
        return {}
    if not isinstance(note, dict) or not isinstance(note.get("settings"), dict):
        run.faults.append(f"{path} is not what a run says of itself")
        return {}
    return note


def read_record(run: TrainingRun) -> dict:
    """The same from the run's state or its weights, as far as they tell it."""
    for path in (run.beside(f"{STATE_SUFFIX}.pth"), run.beside(".pth")):
        if not path.exists():
            continue
        try:
            record = read_file(path, mmap=True)["record"]  # mapped: its tensors are not read
            recipe, result = record["recipe"], record.get("result") or {}
            steps = result.get("steps") or recipe.get("max_steps")
            return {"stage": record.get("stage"), "settings": recipe, "steps": steps, "result": result}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            # read_file names the file in what it says; the others say only which key is not there.
            run.faults.append(str(error) if str(path) in str(error) else f"{path} is not a file of a training run")
    return {"settings": {}}


def text(value) -> str:
    return value if isinstance(value, str) else ""


def whole_number(value) -> int | None:
    return value if type(value) is int and value >= 0 else None


def flat(settings) -> dict:
    """{"config": {"dim": 512}} -> {"config.dim": 512}."""
    found = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        inside = flat(value) if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": one for key, one in inside.items()} or {name: value}
    return found


def changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# ---------------------------------------------------------------------------------------------------- several of them
def differences(runs: list[TrainingRun]) -> dict[str, list]:
    """{setting: its value in each run} of those that are not the same in all of them; None where a run has it not."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}
