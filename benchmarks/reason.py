"""Worked answers before and after train_distill_reason.py: are they well-formed, and are they right?

Greedy, up to 1,024 new tokens. Well-formed: one <think> block, then one <answer> block, then the end, nothing else;
an answer that ran into the limit is malformed. Gate on the sample: at least 95% of its held-out questions. Right is an
answer whose answer block holds the known value and nothing else; of the model before, which knows no blocks, one in
which the value stands at all.
"""

from collections import Counter
from pathlib import Path

from benchmarks.stages import SAMPLE, ask, chat_weights, read_lines, stage
from data.answer_match import is_right
from trainer.rewards import TAG, TAGS_IN_ORDER, answer_block, exact_match


def add_flags(parser) -> None:
    parser.add_argument("--weight", metavar="PATH", help="chat model to begin with (the newest full_sft_* in out/)")
    parser.add_argument("--out_dir", default="out/benchmark_reason", help="(%(default)s)")
    parser.add_argument("--data_path", nargs="+", default=[str(SAMPLE / "reason.jsonl")], metavar="FILE", help="traces")
    parser.add_argument("--questions", default=str(SAMPLE / "reason_heldout.jsonl"), metavar="FILE",
                        help="rows of question and answer (the sample's)")  # fmt: skip
    parser.add_argument("flags", nargs="*", help="further flags of train_distill_reason.py, after --")


def fault(completion) -> str | None:
    """What is wrong with the form of an answer, None where nothing is."""
    if completion.finish_reason == "length":
        return "truncated"
    tags = TAG.findall(completion.text)
    if tags != TAGS_IN_ORDER:
        missing = [tag for tag in TAGS_IN_ORDER if tag not in tags]
        return f"no {missing[0]}" if missing else "tags repeated or out of order"
    return None if answer_block(completion.text) else "text outside the blocks, or none in the last"


def run(args) -> dict:
    weights = chat_weights(args.weight)
    found = stage("train_distill_reason.py", "--from_weight", weights, "--out_dir", Path(args.out_dir), "--overwrite",
                  "--data_path", *args.data_path, *args.flags)  # fmt: skip
    rows = read_lines(Path(args.questions).read_text(encoding="utf-8"))
    result = {"questions": args.questions, "seconds": found["seconds"]}
    for name, path, counts in (("before", weights, is_right), ("after", found["weights"], exact_match)):
        answers = ask(path, [row["question"] for row in rows], max_tokens=1024, markers=True)
        faults = [fault(answer) for answer in answers]
        right = [counts(a.text, row["answer"]) for a, row in zip(answers, rows, strict=True)]
        result |= {
            f"well_formed_{name}": faults.count(None) / len(rows), f"exact_match_{name}": sum(right) / len(rows),
            f"faults_{name}": dict(Counter(f for f in faults if f)),
        }  # fmt: skip
    return result | {"n": len(rows), "passed": result["well_formed_after"] >= 0.95}
