"""Of what parts each preset is made, in shares of its parameters. From the course's record of the budget."""

from figures.canvas import COLOURS, LINE, box, canvas, write
from figures.records import result_of

KINDS = ("embedding", "attention", "feed-forward")
WORDS = {
    "en": {"embedding": "embedding", "attention": "attention", "feed-forward": "feed-forward and experts"},
    "zh": {"embedding": "嵌入", "attention": "注意力", "feed-forward": "前馈网络与专家"},
}


def draw(language: str):
    words, presets = WORDS[language], result_of("budget")
    figure, axes = canvas(760, 44 + 30 * len(presets))
    for i, kind in enumerate(KINDS):
        box(axes, 240 + 130 * i, 10, 16, 16, colour=COLOURS[i])
        write(axes, 262 + 130 * i, 18, words[kind], 8.5, align="left")
    for row, (name, found) in enumerate(presets.items()):
        y, x = 40 + 30 * row, 240.0
        write(axes, 132, y + 10, name, 8.5, align="right")
        write(axes, 230, y + 10, f"{found['parameters'] / 1e6:.1f}M", 8.5, align="right")
        for kind, colour in zip(KINDS, COLOURS, strict=False):
            share = found[kind] / found["parameters"]
            axes.bar(x + 250 * share, 20, 500 * share, y, color=colour, edgecolor=LINE, lw=0.8)
            if share > 0.045:
                write(axes, x + 250 * share, y + 10, f"{share:.0%}", 8)
            x += 500 * share
    return figure
