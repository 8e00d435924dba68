"""Which questions of an exam are in a training text? Two rules, for texts reduced to their letters and digits:

  question  the text has the whole question. A question of fewer than 10 characters, or one that the exam asks more
            than once in the same words ("which statement is right?"), is searched for together with its options
  run       the text has 50 characters in a row of the question and its options

Reduced means: NFKC (full width to plain), lower case, and only letters and digits of all scripts kept, so that other
blanks, punctuation or line ends do not hide a match. Paraphrases and translations are not found. Runs of 50 characters
without blanks and signs are the measure of GPT-4's report (arXiv 2303.08774, appendix C). The report samples three runs
per question; here all are searched for.
"""

import csv
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.files import named
from data.reading import raw_rows
from data.row_shapes import BadRow, parse_record
from exams.exam import Subject

SHORTEST = 10  # characters; anything shorter is found by accident
RUN = 50
NO_WORD = re.compile(r"[\W_]+")


def reduced(text: str) -> str:
    return NO_WORD.sub("", unicodedata.normalize("NFKC", text).lower())


@dataclass(frozen=True)
class Needle:
    """What is looked for: `text` for question `number` (from 0) of a subject, found by `rule`."""

    subject: str
    number: int
    rule: str
    text: str


def search(files, subjects, target: Path) -> dict:
    """Searches training files for the exam's questions, row by row, and writes each match into the CSV file `target`.

    -> the numbers of rows, of rows with a match, and of questions found.
    """
    exam_in = Contamination(subjects)
    rows, bad, overlapping, questions = 0, 0, 0, set()
    with named(target), open(target, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "line", "subject", "number", "rule", "text"])
        for path in files:
            for line, raw in raw_rows(path):
                rows += 1
                try:
                    found = list(exam_in.find("\n".join(strings(parse_record(raw)))))
                except BadRow:
                    bad += 1
                    continue
                overlapping += bool(found)
                questions |= {(needle.subject, needle.number) for needle in found}
                writer.writerows([path, line, n.subject, n.number, n.rule, n.text] for n in found)
    return {
        "files": list(files), "rows": rows, "rows_unreadable": bad, "rows_overlapping": overlapping,
        "questions_overlapping": len(questions), "questions_too_short": exam_in.hidden,
    }  # fmt: skip


class Contamination:
    """Looks for the questions of an exam in texts, one at a time.

    `hidden` counts the questions too short to be looked for, even with their options.
    """

    def __init__(self, subjects: list[Subject]):
        # Needles by their first SHORTEST characters: find() then looks up each place of a text once.
        self.needles: dict[str, list[Needle]] = defaultdict(list)
        self.hidden = 0
        asked = [(s.name, i, reduced(q.text), q) for s in subjects for i, q in enumerate(s.questions)]
        wordings = Counter(text for _, _, text, _ in asked)
        for name, number, text, question in asked:
            whole = text + reduced("".join(question.options))
            plain = len(text) >= SHORTEST and wordings[text] == 1
            needle = text if plain else whole
            if len(needle) < SHORTEST:
                self.hidden += 1
                continue
            self._add(Needle(name, number, "question", needle))
            for begin in range(len(whole) - RUN + 1):
                self._add(Needle(name, number, "run", whole[begin : begin + RUN]))

    def _add(self, needle: Needle) -> None:
        self.needles[needle.text[:SHORTEST]].append(needle)

    def find(self, text: str) -> Iterator[Needle]:
        """One needle for each question that is in the text: the whole question if it is there, else a run of it."""
        text, found = reduced(text), {}
        for begin in range(len(text) - SHORTEST + 1):
            for needle in self.needles.get(text[begin : begin + SHORTEST], ()):
                key = needle.subject, needle.number
                if text.startswith(needle.text, begin) and (key not in found or needle.rule == "question"):
                    found[key] = needle
        yield from found.values()


def strings(row) -> Iterator[str]:
    """All texts in a row of training data, in order, whatever its schema."""
    waiting = [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting += reversed(list(value.values() if isinstance(value, dict) else value))
