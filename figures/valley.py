"""Gradient descent and AdamW on their way down a valley, and what Muon does to a matrix (record `optimizers`)."""

from figures.canvas import COLOURS, INK, LINE
from figures.records import result_of

WALKS = ("sgd 0.039", "adamw 0.1")
WORDS = {
    "en": {"sgd 0.039": "gradient descent", "adamw 0.1": "AdamW", "muon": "Muon: singular values",
           "before": "of the gradient", "after": "of the update", "flat": "b (flat)", "steep": "a (steep)"},
    "zh": {"sgd 0.039": "梯度下降", "adamw 0.1": "AdamW", "muon": "Muon：奇异值",
           "before": "梯度的", "after": "更新量的", "flat": "b（平缓）", "steep": "a（陡峭）"},
}  # fmt: skip


def draw(language: str):
    from matplotlib.figure import Figure

    words, result = WORDS[language], result_of("optimizers")
    figure = Figure(figsize=(9.0, 2.9))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.17, top=0.88, wspace=0.28)
    grid = [-1.3 + 0.026 * i for i in range(101)]
    height = [[(50 * a * a + b * b) / 2 for b in grid] for a in grid]
    for axes, name in zip(panels, WALKS, strict=False):
        axes.contour(grid, grid, height, levels=(0.2, 1, 3, 8, 18, 32), colors=LINE, linewidths=0.6)
        a, b = zip(*result["paths"][name], strict=True)
        axes.plot(b, a, marker="o", ms=2.4, lw=0.9, color="#b4532a")
        axes.plot(b[0], a[0], marker="o", ms=6, color=INK)
        axes.plot(0, 0, marker="*", ms=10, color="#2a8c4a")
        axes.set(xlim=(-0.4, 1.3), ylim=(-1.3, 1.3))
        axes.set_title(words[name], fontsize=9.5)
        axes.set_xlabel(words["flat"], fontsize=8.5)
        axes.set_ylabel(words["steep"], fontsize=8.5, labelpad=0)
    axes = panels[2]
    numbers = range(1, len(result["before"]) + 1)
    axes.bar(
        [n - 0.2 for n in numbers],
        result["before"],
        0.4,
        color=COLOURS[0],
        edgecolor=INK,
        lw=0.5,
        label=words["before"],
    )
    axes.bar(
        [n + 0.2 for n in numbers], result["after"], 0.4, color=COLOURS[1], edgecolor=INK, lw=0.5, label=words["after"]
    )
    axes.set_title(words["muon"], fontsize=9.5)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    axes.set(ylim=(0, 1.6))
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
