"""Two measures of the same answers: right or wrong, and how many bits the right answer costs.

    python docs/course/code/smooth.py --data_dir dataset/sample/exam --weights out/course/sft10_160.pth \
        out/course/sft40_160.pth out/course/full_sft_160.pth

Each question is put alone, and each option's own words are a possible answer, as in eval_ceval.py --format text. The
last line is a JSON object.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from common.errors import run_main, user_errors
from exams.exam import LETTERS, AskByText, answer_of, read_exam
from exams.exam_report import wilson
from inference.engine import Engine
from model.weights import load_model
from trainer.preference import paired_bootstrap


def bits_per_byte(log_p: float, text: str) -> float:
    """What a text costs a model that gives it the log-probability log_p (nats)."""
    return -log_p / math.log(2) / len(text.encode("utf-8"))


def measured(engine, subjects) -> dict[str, np.ndarray]:
    """Of each question: whether it was answered right, the right option's share of the probability, its bits a byte."""
    ask, prompts, options, questions = AskByText(engine), [], [], []
    for subject in subjects:
        for question in subject.questions:
            prompt, four, _ = ask(subject, question)
            prompts, options, questions = prompts + [prompt] * 4, options + four, [*questions, question]
    totals = [score.total for score in engine.score(prompts, options)]
    rows = []
    for i, question in enumerate(questions):
        answer, k = answer_of(question, totals[4 * i : 4 * i + 4]), LETTERS.index(question.answer)
        rows.append((answer.right, answer.probabilities[k], bits_per_byte(totals[4 * i + k], question.options[k])))
    return dict(zip(("right", "share", "bits"), np.array(rows, dtype=float).T, strict=True))


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the exam's folder")
    parser.add_argument("--weights", required=True, nargs="+", help="models, the one trained least first")
    args = parser.parse_args(argv)
    result, before = {"models": {}, "changes": []}, None
    print(f"{'model':16} {'right':>7}   {'95% interval':16} {'share':>6} {'bits/byte':>10}")
    with user_errors():
        subjects = read_exam(args.data_dir, "ceval")
        for path in map(Path, args.weights):
            model, tokenizer, _ = load_model(path)
            now = measured(Engine(model.eval(), tokenizer), subjects)
            right, share, bits = (now[name].mean() for name in ("right", "share", "bits"))
            low, high = wilson(int(now["right"].sum()), len(now["right"]))
            print(f"{path.stem:16} {right:7.1%}   {f'{low:.1%} to {high:.1%}':16} {share:6.1%} {bits:10.3f}")
            result["models"][path.stem] = {"right": right, "interval": [low, high], "share": share, "bits": bits}
            if before is not None:
                change = {name: paired_bootstrap(before[name], now[name]) for name in now}
                shown = "   ".join(f"{name} {low:+.3f} to {high:+.3f}" for name, (low, high) in change.items())
                print(f"    change, 95% interval:   {shown}")
                result["changes"].append(change)
            before = now
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
