"""Two short runs of DPO, with and without the SFT part: margins, and how much likelier each answer became."""

import re

from figures.canvas import INK, LINE, plot, write
from figures.records import record_of

RUNS, BETA, WINDOW = {"dpo": "#2f6fb3", "dpo_plain": "#c0562b"}, 0.1, 10
STEP = re.compile(r"step (\d+)/\d+  loss .*?  margin (\S+)  kl (\S+)")
WORDS = {
    "en": {"margin": "margin", "change": "likelier than under the reference, nats", "step": "step",
           "dpo": "with the SFT part", "dpo_plain": "without", "chosen": "chosen", "rejected": "rejected"},
    "zh": {"margin": "间隔", "change": "比参考模型更可能（nat）", "step": "步",
           "dpo": "带 SFT 那一项", "dpo_plain": "不带", "chosen": "好答案", "rejected": "差答案"},
}  # fmt: skip


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and of those before it, WINDOW in all: a step sees few pairs, and its numbers jump."""
    windows = (values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(language: str):
    words = WORDS[language]
    figure, left = plot(860, 330)
    left.set_position((0.07, 0.15, 0.36, 0.72))
    right = figure.add_axes((0.53, 0.15, 0.34, 0.72))
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(labelsize=8, colors=INK)
    for name, colour in RUNS.items():
        rows = [tuple(map(float, row)) for row in STEP.findall(record_of(name)["output"])]
        steps = [step for step, _, _ in rows]
        margins, kl = (smooth([row[k] for row in rows]) for k in (1, 2))
        left.plot(steps, margins, color=colour, label=words[name])
        # margin / beta is the difference of the two changes, and -kl is their mean.
        for side, sign, style in (("chosen", 1, "-"), ("rejected", -1, "--")):
            change = [sign * m / BETA / 2 - k for m, k in zip(margins, kl, strict=True)]
            right.plot(steps, change, style, color=colour)
            write(right, steps[-1] + 1, change[-1], words[side], 8, colour, "left")
    for axes, title in ((left, words["margin"]), (right, words["change"])):
        axes.axhline(0, color=LINE, lw=0.8)
        axes.set_xlim(0, steps[-1])  # labels of lines stand beyond
        axes.set_xlabel(words["step"], fontsize=8.5, color=INK)
        axes.set_title(title, fontsize=9.5, color=INK)
    left.legend(fontsize=8.5, frameon=False)
    return figure
