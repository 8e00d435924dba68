"""Questions for GRPO out of worked examples: additions without a carry, their answers, and no steps.

    python docs/course/code/sums.py --data_path dataset/sample/reason.jsonl --out out/course/sums.jsonl \
        --most 16

The last line is a JSON object.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common.errors import UserError, run_main, user_errors
from common.files import replaced
from data.reading import raw_rows
from data.row_shapes import parse_record

SUM = re.compile(r"(?<!\d)(\d\d)\+(\d\d)(?!\d)")


def question_of(row: dict) -> str:
    return row["question"] if "question" in row else row["conversations"][0]["content"]


def sum_without_carry(question: str) -> int | None:
    """The sum that a question asks for; None if it asks for something else or the ones have to be carried."""
    found = SUM.search(question)
    if not found:
        return None
    a, b = int(found[1]), int(found[2])
    return a + b if a % 10 + b % 10 < 10 else None


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="rows with a question, or conversations that begin with one")
    parser.add_argument("--out", required=True, type=Path, help="the file to write")
    parser.add_argument("--most", type=int, metavar="N", help="how many to write at most (all)")
    args = parser.parse_args(argv)
    with user_errors():
        asked = [question_of(parse_record(raw)) for _, raw in raw_rows(args.data_path)]
        kept = {question: total for question in asked if (total := sum_without_carry(question)) is not None}
        if not kept:
            raise UserError(f"{args.data_path} asks for no sum of two numbers below 100 without a carry")
        kept = dict(list(kept.items())[: args.most])
        with replaced(args.out, text=True) as file:
            for question, total in kept.items():
                file.write(json.dumps({"question": question, "answer": str(total)}, ensure_ascii=False) + "\n")
    print(f"{args.out.as_posix()}: {len(kept):,} of {len(asked):,} questions")
    result = {"questions": len(kept), "of": len(asked)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
