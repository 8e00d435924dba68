"""<name>_run.json: what a run is, and how it ended, for those who look at it from outside. The run reads none of it.

Written when the run begins or is resumed, and once more when it ends. A process that is killed writes no end: a note
without one, whose lock nobody holds, is that of a run that was lost.
"""

import contextlib
import functools
import json
import os
import signal
import time

from common.errors import disk_fault, out_of_memory
from common.files import replaced
from trainer.announce import resume_command


def begin_note(session) -> None:
    """The first process writes what the run is: steps, settings, the data's paths, the command that resumes it."""
    run, plan, args = session.run, session.plan, session.run.args
    if not session.world.first:
        return
    machine = {"device": str(session.world.device), "dtype": str(session.world.dtype).removeprefix("torch."),
               "batch_size": plan.batch_size, "accumulation_steps": plan.accumulation_steps,
               "processes": session.world.size, "val_split": args.val_split}  # fmt: skip
    run.files.note = {
        "stage": args.stage, "steps": plan.steps, "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "from": run.came_from, "data_path": list(map(str, run.data_files)), "resume": resume_command(),
        "folder": os.getcwd(), "settings": session.record["recipe"] | machine, "end": None,
    }  # fmt: skip
    write(run.files)


def with_its_end_noted(train):
    """Around a train(run, ...): notes how it ended, whatever ends it."""

    @functools.wraps(train)
    def noted(run, *args, **kwargs):
        try:
            result = train(run, *args, **kwargs)
        except BaseException as error:
            end_note(run.files, *in_words(error))
            raise
        end_note(run.files, "finished", "", result)
        return result

    return noted


def in_words(error: BaseException) -> tuple[str, str]:
    """How a run ends with this exception: ("stopped" or "failed", why)."""
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return "stopped", {signal.SIGINT: "Ctrl-C"}.get(error.code - 128, signal.Signals(error.code - 128).name)
    why = out_of_memory(error) or disk_fault(error) or str(error) or type(error).__name__
    return "failed", why.splitlines()[0]


def end_note(files, how: str, why: str, result: dict | None = None) -> None:
    """Where no note was begun (a dry run, a run that was finished before, another process) there is none to end."""
    if (note := getattr(files, "note", None)) is None:
        return
    note["end"] = {"how": how, "why": why, "at": time.strftime("%Y-%m-%d %H:%M:%S"), "result": result}
    with contextlib.suppress(OSError):  # of a full disk: it is what ended the run, and that is told on the screen
        write(files)


def write(files) -> None:
    with replaced(files.about, text=True) as file:
        json.dump(files.note, file, ensure_ascii=False, indent=1)
