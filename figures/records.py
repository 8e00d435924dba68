"""Recorded runs of the course's commands: what text and pictures take their numbers from."""

import json
from pathlib import Path

from common.errors import UserError

RECORDS = Path(__file__).resolve().parents[1] / "docs" / "course" / "records"


def record_of(name: str) -> dict:
    """command, output, date, machine, versions and CPU seconds of a recorded run."""
    path = RECORDS / f"{name}.json"
    if not path.is_file():
        raise UserError(f"no record of the command {name}: python scripts/make_docs.py runs it")
    return json.loads(path.read_text(encoding="utf-8"))


def result_of(name: str) -> dict:
    """The JSON object in the last line that a recorded run printed."""
    return json.loads(record_of(name)["output"].rpartition("\n")[2])
