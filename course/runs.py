"""Runs the course's commands and records what they print."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from common.errors import RunFailed, UserError
from common.files import replaced
from course.pages import ROOT, RUN, pages
from figures.records import RECORDS


def commands() -> dict[str, str]:
    """All commands to record, in the order of the course: name -> what stands in its block."""
    found = {}
    for page in pages():
        for name, command in RUN.findall(page.read_text(encoding="utf-8")):
            if found.setdefault(name, command) != command:
                raise UserError(f"{page.name}: two commands are called {name}")
    return found


def run(name: str, command: str) -> None:
    """Runs a command's lines one after the other and records what they print (progress bars go to stderr)."""
    print(f"running {name}: {command}", flush=True)
    output, before = "", os.times()
    # torchrun and the like stand beside this Python; PATH need not name that folder.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in command.splitlines():
        words = shlex.split(line)
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                              env=os.environ | {"PYTHONIOENCODING": "utf-8", "PATH": path})  # fmt: skip
        if done.returncode:
            raise RunFailed(f"`{line}` ended with exit code {done.returncode}: {done.stderr[-500:]}")
        output += done.stdout
    after = os.times()
    shown = [line.rstrip() for line in output.replace(f"{ROOT}{os.sep}", "").splitlines()]
    record = {
        "command": command,
        "output": "\n".join(shown).strip("\n"),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "tokenizers")}},
        # Of the processor, not of the clock: other work on the same machine does not make it longer.
        "cpu_seconds": round(
            after.children_user + after.children_system - before.children_user - before.children_system
        ),
    }
    RECORDS.mkdir(exist_ok=True)
    with replaced(RECORDS / f"{name}.json", text=True) as file:
        file.write(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
