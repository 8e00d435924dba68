"""Two rewards that rise: of a short GRPO run, where right answers rise with it, and of a rule that can be cheated."""

import re

from figures.canvas import INK, plot
from figures.records import record_of, result_of

STEP = re.compile(r"step (\d+)/\d+  reward (\S+)  well_formed (\S+)  right (\S+)")
WINDOW = 3
REWARD, RIGHT, FORM = "#2f6fb3", "#3c8d40", "#8a8f98"
WORDS = {
    "en": {"grpo": "GRPO on 16 sums, means of three steps", "cheat": "a rule that can be cheated", "reward": "reward",
           "right": "right", "form": "well-formed", "really": "really right", "step": "step"},
    "zh": {"grpo": "16 道加法题上的 GRPO，三步的平均", "cheat": "可以钻空子的规则", "reward": "奖励", "right": "答对",
           "form": "格式对", "really": "真正答对", "step": "步"},
}  # fmt: skip


def draw(language: str):
    words = WORDS[language]
    figure, left = plot(860, 320)
    left.set_position((0.06, 0.15, 0.41, 0.72))
    right = figure.add_axes((0.56, 0.15, 0.41, 0.72))
    rows = [tuple(map(float, row)) for row in STEP.findall(record_of("grpo")["output"])]
    steps = [row[0] for row in rows]
    for k, name, colour in ((1, "reward", REWARD), (2, "form", FORM), (3, "right", RIGHT)):
        windows = [[row[k] for row in rows[max(0, i + 1 - WINDOW) : i + 1]] for i in range(len(rows))]
        left.plot(steps, [sum(w) / len(w) for w in windows], color=colour, label=words[name])
    rows = result_of("cheat")["loose"]["rows"]
    for key, name, colour in (("loose", "reward", REWARD), ("strict", "really", RIGHT)):
        right.plot([row["step"] for row in rows], [row[key] for row in rows], color=colour, label=words[name])
    for axes, title in ((left, words["grpo"]), (right, words["cheat"])):
        axes.set_ylim(-0.03, 1.27)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
        axes.set_xlabel(words["step"], fontsize=8.5, color=INK)
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.legend(fontsize=8.5, frameon=False, ncols=3, loc="upper center")
    return figure
