"""Puts half of an exam into a training file, and afterwards tells the two halves of the score apart.

    python docs/course/code/leak.py --data_dir dataset/sample/exam --write out/course/leaked.jsonl
    python docs/course/code/leak.py --data_dir dataset/sample/exam --compare out/course/exam_leaked

--write: every second question with its right letter, as a conversation. --compare: a folder that eval_ceval.py wrote
with --contamination: accuracy of the questions it found in the training file, and of the others. The last line is a
JSON object.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common.errors import run_main, user_errors
from common.files import replaced
from exams.exam import LETTERS, V1_SYSTEM, read_exam
from exams.exam_report import wilson


def leaked(subjects) -> list[dict]:
    """Every second question of each subject as eval_ceval.py asks it, with the right letter as the answer."""
    rows = []
    for question in (q for subject in subjects for q in subject.questions[::2]):
        options = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, question.options, strict=True))
        rows.append({"conversations": [
            {"role": "system", "content": V1_SYSTEM},
            {"role": "user", "content": f"{question.text}。选择 {options}"},
            {"role": "assistant", "content": question.answer},
        ]})  # fmt: skip
    return rows


def two_halves(folder: Path, subjects, split: str) -> dict[str, tuple[int, int]]:
    """(right, n) of the questions that were found in training data, and of the others."""
    with open(folder / "contamination.csv", encoding="utf-8-sig", newline="") as file:
        found = {(row["subject"], int(row["number"])) for row in csv.DictReader(file)}
    counts = {"found in training": [0, 0], "not found": [0, 0]}
    for subject in subjects:
        with open(folder / f"{subject.name}_{split}_result.csv", encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                half = counts["found in training" if (subject.name, number) in found else "not found"]
                half[0] += row["is_right"] == "True"
                half[1] += 1
    return {name: tuple(half) for name, half in counts.items()}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the exam's folder")
    parser.add_argument("--split", default="val")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", type=Path, metavar="FILE", help="where to write the leaked half")
    mode.add_argument("--compare", type=Path, metavar="FOLDER", help="results of eval_ceval.py --contamination")
    args = parser.parse_args(argv)
    with user_errors():
        subjects = read_exam(args.data_dir, "ceval", args.split)
        if args.write:
            rows = leaked(subjects)
            with replaced(args.write, text=True) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            result = {"questions": sum(len(s.questions) for s in subjects), "leaked": len(rows)}
            print(f"{result['leaked']} of {result['questions']} questions written to {args.write.as_posix()}")
        else:
            result = {}
            for name, (right, n) in two_halves(args.compare, subjects, args.split).items():
                low, high = wilson(right, n)
                print(f"{name:20} {right:4} of {n:4} right  {right / n:6.1%}   ({low:.1%} to {high:.1%})")
                result[name.replace(" ", "_")] = {"accuracy": right / n, "interval": [low, high]}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
