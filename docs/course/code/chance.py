"""What chance does in an exam: guessers, intervals by hand, and how many questions a difference needs.

    python docs/course/code/chance.py --questions 308

No model is needed: the exams are drawn at random. The last line is a JSON object.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from exams.exam_report import wilson

OPTIONS, TRIALS, Z = 4, 20_000, 1.96  # 1.96: 95% of a normal distribution lie within so many standard deviations


def wilson_by_hand(right: int, n: int) -> tuple[float, float]:
    """All true shares p from which p_hat = right / n is at most 1.96 standard deviations away, found by trying."""
    p_hat, tried = right / n, np.linspace(0, 1, 100_001)
    inside = tried[np.abs(p_hat - tried) <= Z * np.sqrt(tried * (1 - tried) / n)]
    return inside[0], inside[-1]


def plain(right: int, n: int) -> tuple[float, float]:
    """The interval of the schoolbook: p_hat plus and minus 1.96 of its own standard deviations."""
    p_hat = right / n
    half = Z * math.sqrt(p_hat * (1 - p_hat) / n)
    return p_hat - half, p_hat + half


def coverage(interval, p: float, n: int, rng) -> float:
    """In what share of exams of n questions the interval holds the true share p."""
    counts = np.bincount(rng.binomial(n, p, TRIALS), minlength=n + 1)
    held = [low <= p <= high for low, high in (interval(right, n) for right in range(n + 1))]
    return float(counts @ np.array(held) / TRIALS)


def questions_needed(p: float, q: float) -> int:
    """For how many questions the standard deviation of the difference of two scores is a third of q - p.

    The two models answer questions of their own. At a third, a difference of that size is found about 85 times in 100.
    """
    return math.ceil((p * (1 - p) + q * (1 - q)) * (3 / (q - p)) ** 2)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=308, metavar="N", help="of the exam (308)")
    args = parser.parse_args(argv)
    n, rng = args.questions, np.random.default_rng(0)

    scores = rng.binomial(n, 1 / OPTIONS, TRIALS) / n
    low, high = np.quantile(scores, [0.025, 0.975])
    print(f"{TRIALS:,} guessers, {n} questions with {OPTIONS} options: mean {scores.mean():.1%}, "
          f"95 of 100 between {low:.1%} and {high:.1%}")  # fmt: skip
    best = {}
    for k in (1, 5, 20, 100):
        best[k] = float(rng.binomial(n, 1 / OPTIONS, (2000, k)).max(axis=1).mean() / n)
        print(f"  the best of {k:3} guessers has {best[k]:.1%} on average")

    print("\n95% intervals, by hand and by exams/exam_report.py")
    intervals, difference = {}, 0.0
    for questions in (10, 44, n, 1346, 12342):
        right = round(0.3 * questions)
        hand, ours = wilson_by_hand(right, questions), wilson(right, questions)
        intervals[questions] = ours
        difference = max(difference, *(abs(a - b) for a, b in zip(hand, ours, strict=True)))
        print(
            f"  {right:5} of {questions:6,} right: {hand[0]:6.1%} to {hand[1]:6.1%}   {ours[0]:6.1%} to {ours[1]:6.1%}"
        )
    kept = {name: coverage(interval, 0.95, 44, rng) for name, interval in (("plain", plain), ("wilson", wilson))}
    print(f"a model that knows 95% of all answers, 44 questions: the interval holds 95% in "
          f"{kept['wilson']:.1%} of the exams, the schoolbook's in {kept['plain']:.1%}")  # fmt: skip

    print("\nquestions needed to tell two models apart")
    needed = {}
    for p, q in ((0.25, 0.27), (0.25, 0.30), (0.25, 0.40), (0.60, 0.65)):
        needed[f"{p:.0%} {q:.0%}"] = questions_needed(p, q)
        print(f"  {p:.0%} and {q:.0%}: {questions_needed(p, q):,}")
    sizes = sorted({round(10 * 1.15**i) for i in range(59)} | {44, 308, 1346, 12342})
    curve = {p: [(size, *(round(end, 4) for end in wilson(p * size, size))) for size in sizes] for p in (0.25, 0.6)}
    result = {"questions": n, "low": low, "high": high, "best": best, "intervals": intervals, "coverage": kept,
              "difference": difference, "needed": needed, "curve": curve}  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
