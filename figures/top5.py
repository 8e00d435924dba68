"""A text written greedily, and for each token the five that were most probable. From the record of `sampling`."""

from figures.canvas import COLOURS, INK, LINE, PALE, canvas, text_width, write
from figures.records import result_of

WORDS = {
    "en": {"written": "written", "bars": "the five most probable next tokens"},
    "zh": {"written": "写下的", "bars": "最可能的五个 token"},
}
COLUMN, BAR, ROW, LEFT = 118, 96, 34, 20


def draw(language: str):
    from matplotlib.patches import Rectangle

    words, path = WORDS[language], result_of("sampling")["path"]
    figure, axes = canvas(LEFT + COLUMN * len(path) + 10, 262)
    write(axes, LEFT, 18, words["written"], 9, align="left", weight="bold")
    write(axes, LEFT, 68, words["bars"], 9, align="left", weight="bold")
    for column, at in enumerate(path):
        x = LEFT + COLUMN * column
        axes.add_patch(Rectangle((x, 28), BAR, 24, fc=COLOURS[2], ec=LINE, lw=0.8))
        write(axes, x + BAR / 2, 40, visible(at["token"]), 9)
        for row, (token, p) in enumerate(at["best"]):
            y = 82 + ROW * row
            axes.add_patch(Rectangle((x, y + 17), BAR, 9, fc=PALE))
            axes.add_patch(Rectangle((x, y + 17), BAR * p, 9, fc=COLOURS[2] if token == at["token"] else COLOURS[0]))
            write(axes, x, y + 8, visible(token), 8, INK, align="left")
            write(axes, x + BAR, y + 8, f"{p:.1%}" if p >= 0.001 else "<0.1%", 7, INK, align="right")
    return figure


def visible(token: str) -> str:
    """A token beside its percentage: line ends and blanks as signs, a long one cut."""
    token = token.replace("\n", "↵").replace(" ", "␣")
    return token if text_width(token, 8) <= BAR - 38 else token[:4] + "…"
