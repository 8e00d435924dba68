"""The log of a run, read while it grows: a line a step, and a line a validation, each a JSON object.

{"step": 1, "tokens": 207, "seconds": 0.4, "lr": 0.004, "loss": 5.77, "grad_norm": 2.19}    a step
{"step": 200, "val_loss": 2.41, "val_bits_per_byte": 1.08}                                  a validation after it
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import UserError

AXES = ("step", "tokens", "seconds")
RECENT = 50  # steps by which the time left is reckoned


@dataclass
class Series:
    """One number of a run along its steps, (n,) each.

    tokens: read so far; seconds: since the run began, resumptions counted on, NaN in logs of before they were kept.
    """

    step: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    value: np.ndarray


@dataclass
class RunLog:
    """The rows of a log. read() takes in what is new; it may be called as often as one likes.

    faults: lines that are none of a log's, as "file:line: why". A line at the end that is not complete yet is no fault:
    it is read when its end is there.
    """

    path: Path
    rows: list[dict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _read: int = 0  # bytes of complete lines so far
    _lines: int = 0
    _last: bytes = b""  # the last complete line: a resumed run cuts its log and writes on

    def read(self) -> "RunLog":
        """Reads on, or from the start where what was read before has changed; UserError where it cannot be read."""
        try:
            with open(self.path, "rb") as file:
                if not self._is_continued(file):
                    self.rows, self.faults, self._read, self._lines, self._last = [], [], 0, 0, b""
                file.seek(self._read)
                whole = file.read()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        for line in whole.split(b"\n")[:-1]:  # what follows the last line end is not complete yet
            self._take(line + b"\n")
        return self

    def _is_continued(self, file) -> bool:
        file.seek(max(self._read - len(self._last), 0))
        return file.read(len(self._last)) == self._last

    def _take(self, line: bytes) -> None:
        self._lines, self._read, self._last = self._lines + 1, self._read + len(line), line
        if (row := as_row(line)) is None:
            self.faults.append(f"{self.path}:{self._lines}: not a line of a training log")
        else:
            self.rows.append(row)

    @property
    def steps(self) -> list[dict]:
        """The rows of steps, without those of validations."""
        return [row for row in self.rows if "tokens" in row]

    @property
    def step(self) -> int:
        """The last step that was taken, 0 before the first."""
        return max((row["step"] for row in self.steps), default=0)

    def names(self) -> list[str]:
        """The numbers that series() can give."""
        found = {name: None for row in self.rows for name, value in row.items() if is_number(value)}
        speed = ["tokens_per_second"] if "seconds" in found else []
        return [name for name in found if name not in AXES] + speed

    def series(self, name: str) -> Series:
        """The number called so at each step that has it; UserError where none has.

        "tokens_per_second" is a step's tokens by the time since the step before: validations and saves count into it.
        """
        tokens, seconds, points = 0, float("nan"), []
        for row in self.rows:
            before = seconds
            if "tokens" in row:
                tokens, seconds = tokens + row["tokens"], row.get("seconds", float("nan"))
            value = row.get(name)
            if name == "tokens_per_second" and "tokens" in row and seconds > before:
                value = row["tokens"] / (seconds - before)
            if is_number(value):
                points.append((row["step"], tokens, seconds, value))
        if not points:
            raise UserError(f"{self.path} holds no {name}; it holds {', '.join(self.names()) or 'nothing yet'}")
        return Series(*np.array(points, dtype=float).T)

    def seconds_left(self, total_steps: int | None) -> float | None:
        """By the pace of the last steps; None where it is not known."""
        timed = [(row["step"], row["seconds"]) for row in self.steps if is_number(row.get("seconds"))][-RECENT:]
        if total_steps is None or len(timed) < 2 or timed[-1][0] <= timed[0][0]:
            return None
        (first, begin), (last, end) = timed[0], timed[-1]
        return max(total_steps - last, 0) * (end - begin) / (last - first)


def as_row(line: bytes) -> dict | None:
    """A line of a log as an object; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    known = [value for name, value in row.items() if name != "step"]
    # A log holds numbers, and null where there is none (no validation rows); anything else is another kind of file.
    return row if known and all(value is None or is_number(value) for value in known) else None


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------------------ samples
@dataclass(frozen=True)
class Sample:
    """What the model wrote to a prompt of --sample_prompts after a step, or in reinforcement learning to a question of
    that step: then with the reward it got and the right answer, else None and ""."""

    step: int
    prompt: str
    text: str
    reward: float | None = None
    answer: str = ""


def read_samples(path) -> list[Sample]:
    """Those of <name>_samples.jsonl; [] where there is no such file. Lines that are none, and one that is not
    complete yet, are left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
            reward, answer = row.get("reward"), row.get("answer")
            sample = Sample(row["step"], row["prompt"], row["text"], reward if is_number(reward) else None,
                            answer if isinstance(answer, str) else "")  # fmt: skip
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            continue
        if type(sample.step) is int and isinstance(sample.prompt, str) and isinstance(sample.text, str):
            found.append(sample)
    return found
