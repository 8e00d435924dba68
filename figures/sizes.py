"""Held-out bits per byte of the course's small models: against their size, and against their depth at equal size."""

from figures.canvas import COLOURS, INK, plot
from figures.records import result_of

WORDS = {
    "en": {"size": "parameters (two layers each, one epoch)", "depth": "layers (about 0.9 million parameters)",
           "bits": "held-out bits per byte", "one": "1 epoch, two seeds", "three": "3 epochs"},
    "zh": {"size": "参数量（都是两层，一轮）", "depth": "层数（都约 90 万参数）",
           "bits": "留出集的每字节比特数", "one": "1 轮，两个种子", "three": "3 轮"},
}  # fmt: skip


def draw(language: str):
    words = WORDS[language]
    figure, left = plot(760, 290)
    left.set_position((0.08, 0.17, 0.38, 0.77))
    right = figure.add_axes((0.57, 0.17, 0.38, 0.77))
    sizes = result_of("sizes")["shapes"]
    left.plot([x["parameters"] for x in sizes], [x["mean"] for x in sizes], "o-", color=INK, mfc=COLOURS[1], lw=1)
    for x in sizes:
        left.annotate(x["shape"].replace("x", "×"), (x["parameters"], x["mean"]), (6, 6), textcoords="offset points",
                      fontsize=8)  # fmt: skip
    left.set_xscale("log")
    left.margins(x=0.15, y=0.12)
    ticks = {}
    for record, label, colour in (("depth", words["one"], COLOURS[0]), ("depth_longer", words["three"], COLOURS[1])):
        shapes = result_of(record)["shapes"]
        layers = [int(x["shape"].partition("x")[0]) for x in shapes]
        right.plot(layers, [x["mean"] for x in shapes], "-", color=INK, lw=1)
        ticks |= {n: x["shape"].replace("x", "×") for n, x in zip(layers, shapes, strict=True)}
        points = [(n, bits) for n, x in zip(layers, shapes, strict=True) for bits in x["bits"]]
        right.plot(*zip(*points, strict=True), "o", color=colour, mec=INK, label=label)
    right.set_xticks(list(ticks), ticks.values())
    right.margins(x=0.12, y=0.12)
    right.legend(fontsize=8, frameon=False)
    for axes, name in ((left, words["size"]), (right, words["depth"])):
        axes.set_xlabel(name, fontsize=9)
        axes.set_ylabel(words["bits"], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK, which="both")
    return figure
