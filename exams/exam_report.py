"""What an exam showed: accuracies with intervals, the letters chosen, files and a picture."""

import csv
import math
from collections import Counter
from pathlib import Path

from common.files import replaced
from exams.exam import LETTERS, Answer, Subject

CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei", "SimHei")
Z = 1.959964  # 97.5th percentile of the normal distribution: intervals of 95%


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927). It also holds for few questions and for shares near 0 and 1."""
    p, z2 = right / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def macro_interval(counts: list[tuple[int, int]]) -> tuple[float, float]:
    """95% interval of the mean of subjects' accuracies, from (right, n) of each.

    The variances of the subjects add up. Two right and two wrong answers are added to each subject first (Agresti &
    Coull 1998): otherwise a subject with all answers right would have no variance at all.
    """
    shares = [((right + 2) / (n + 4), n + 4) for right, n in counts]
    half = Z * math.sqrt(sum(p * (1 - p) / n for p, n in shares)) / len(counts)
    mean = sum(right / n for right, n in counts) / len(counts)
    return max(mean - half, 0.0), min(mean + half, 1.0)


def summarise(answers: dict[str, list[Answer]]) -> dict:
    """accuracy_micro (over questions), accuracy_macro (mean over subjects), their intervals, letters, baselines."""
    everything = [answer for subject in answers.values() for answer in subject]
    counts = [(sum(a.right for a in subject), len(subject)) for subject in answers.values()]
    n, right = len(everything), sum(a.right for a in everything)
    gold = Counter(a.question.answer for a in everything)
    return {
        "accuracy_micro": right / n,
        "interval": wilson(right, n),
        "accuracy_macro": sum(r / m for r, m in counts) / len(counts),
        "interval_macro": macro_interval(counts),
        "n": n,
        "subjects": len(answers),
        "letters": {letter: sum(a.chosen == letter for a in everything) for letter in LETTERS},
        "majority_letter_accuracy": max(gold.values()) / n,  # what always saying the exam's commonest letter gets
    }


def groups(subjects: list[Subject], answers: dict[str, list[Answer]]) -> dict[str, tuple[int, int]]:
    """(right, n) of each group of subjects, where the exam has groups."""
    table: dict[str, tuple[int, int]] = {}
    for subject in subjects:
        if subject.group:
            right, n = table.get(subject.group, (0, 0))
            these = answers[subject.name]
            table[subject.group] = right + sum(a.right for a in these), n + len(these)
    return table


def lines(subjects: list[Subject], answers: dict[str, list[Answer]], summary: dict) -> list[str]:
    """The report as text."""
    text = [f"{'subject':<40} {'n':>5} {'right':>6}  accuracy"]
    for name, these in answers.items():
        right = sum(a.right for a in these)
        text.append(f"{name:<40} {len(these):>5} {right:>6}  {right / len(these):8.1%}")
    for name, (right, n) in groups(subjects, answers).items():
        low, high = wilson(right, n)
        text.append(f"{'group ' + name:<40} {n:>5} {right:>6}  {right / n:8.1%}   ({low:.1%} to {high:.1%})")
    for name, key, interval in (("all questions", "accuracy_micro", "interval"),
                                ("mean of subjects", "accuracy_macro", "interval_macro")):  # fmt: skip
        low, high = summary[interval]
        text.append(f"{name:<40} {summary['n']:>5} {'':>6}  {summary[key]:8.1%}   ({low:.1%} to {high:.1%})")
    text.append(f"letters chosen; always the commonest right letter gets {summary['majority_letter_accuracy']:.1%}")
    for letter, count in summary["letters"].items():
        text.append(f"  {letter} {count:>6}  {count / summary['n']:6.1%}  {'#' * round(50 * count / summary['n'])}")
    return text


def write_answers(folder: Path, split: str, answers: dict[str, list[Answer]]) -> None:
    """<subject>_<split>_result.csv for each subject, in MiniMind v1's columns, with the letters' probabilities."""
    for name, these in answers.items():
        with replaced(folder / f"{name}_{split}_result.csv", text=True) as file:
            file.write("\ufeff")  # without this mark Excel does not read the file as UTF-8
            writer = csv.writer(file)
            writer.writerow(["question", *LETTERS, "answer", "llm_answer", "is_right", *(f"p_{x}" for x in LETTERS)])
            for a in these:
                chances = [f"{p:.4f}" for p in a.probabilities]
                writer.writerow([a.question.text, *a.question.options, a.question.answer, a.chosen, a.right, *chances])


def plot(path: Path, answers: dict[str, list[Answer]], summary: dict) -> None:
    """A bar for each subject, chance and the mean as lines. Needs matplotlib (ImportError without it).

    Without a font for Chinese, subjects with a Chinese name show their number in the report instead.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    chinese = [name for name in CHINESE_FONTS if name in installed]
    names = {name: name if chinese or name.isascii() else f"no. {i}" for i, name in enumerate(answers, start=1)}
    shares = sorted((sum(a.right for a in these) / len(these), names[name]) for name, these in answers.items())
    with pyplot.rc_context({"font.sans-serif": [*chinese, "DejaVu Sans"]}):
        figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.22 * len(shares)), layout="constrained")
        axes.barh([name for _, name in shares], [share for share, _ in shares], color="#4c78a8")
        axes.axvline(0.25, color="black", linestyle=":", label="chance, 25%")
        axes.axvline(
            summary["accuracy_micro"], color="#e45756", label=f"all questions, {summary['accuracy_micro']:.1%}"
        )
        axes.set(xlim=(0, 1), xlabel="accuracy")
        axes.tick_params(axis="y", labelsize=7)
        axes.legend()
        with replaced(path) as file:
            figure.savefig(file, format="png", dpi=120)
        pyplot.close(figure)
