"""The results of exams, as eval_ceval.py keeps them: a line an exam in the exams.jsonl of its folder."""

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = "exams.jsonl"


@dataclass(frozen=True)
class ExamResult:
    """One model in one exam. accuracy: share of the n questions; low, high: its 95% interval; time: ISO 8601, UTC."""

    exam: str
    weights: str
    time: str
    accuracy: float
    low: float
    high: float
    n: int


def find_exams(folders=("out", "ceval")) -> list[ExamResult]:
    """All exams in the folders and two levels below, the earliest first; lines that are none are left out."""
    paths = {path for folder in folders for depth in ("", "*/", "*/*/") for path in Path(folder).glob(depth + RESULTS)}
    found = [result for path in paths for line in lines(path) if (result := as_result(line))]
    return sorted(found, key=lambda result: (result.time, result.exam))


def lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []


def as_result(line: bytes) -> ExamResult | None:
    try:
        row = json.loads(line)
        exam = f"{Path(row['data_dir']).name}/{row['split']}, {row['format']}, {row['shots']} shots"
        numbers = (float(row["accuracy_micro"]), *map(float, row["interval"]), int(row["n"]))
        return ExamResult(exam, str(row["weights"]), str(row["time"]), *numbers)
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
