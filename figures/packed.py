"""A packed row: three documents side by side, and who may look at whom. From the record of `packing`."""

from figures.canvas import COLOURS, INK, canvas, write
from figures.records import result_of

WORDS = {
    "en": {"heads": ("with the document mask", "the causal mask alone"), "query": "who looks", "key": "at which token",
           "document": "document {}", "padding": "padding", "learned": "● learned from"},
    "zh": {"heads": ("文档掩码", "只有因果掩码"), "query": "谁在看", "key": "看哪个 token", "document": "文档 {}",
           "padding": "填充", "learned": "● 参加学习"},
}  # fmt: skip
CELL, LEFT, TOP, GAP = 17, 208, 66, 34


def draw(language: str):
    from matplotlib.patches import Rectangle

    words, result = WORDS[language], result_of("packing")
    tokens, segments, learned = result["words"], result["segments"], result["learned"]
    T = len(tokens)
    figure, axes = canvas(LEFT + 2 * (T * CELL + GAP), TOP + T * CELL + 16)
    write(axes, LEFT - 12, 48, words["query"] + " ↓", 7.5, align="right")
    write(axes, 8, 22, words["learned"], 8, align="left")
    for row, (token, segment) in enumerate(zip(tokens, segments, strict=True)):
        y = TOP + CELL * (row + 0.5)
        label = (token if segment else words["padding"]) + f"  {row}"
        write(axes, LEFT - 26, y, label, 7.5, align="right")
        write(axes, LEFT - 12, y, "●" if learned[row] else "", 7)
        if segment and segment not in segments[:row]:
            write(axes, 8, y, words["document"].format(segment), 8.5, align="left", weight="bold")
    for panel, head in enumerate(words["heads"]):
        x = LEFT + panel * (T * CELL + GAP)
        write(axes, x + T * CELL / 2, 14, head, 9.5, weight="bold")
        write(axes, x + T * CELL / 2, 34, words["key"] + " →", 7.5)
        for column in range(T):
            write(axes, x + CELL * (column + 0.5), 55, str(column), 6.5)
        # A row looks at one run of tokens in each document, so one rectangle a run is enough.
        for row in range(T):
            for segment in (segments[row],) if panel == 0 else sorted(set(segments[: row + 1]), reverse=True):
                first = segments.index(segment)
                n = sum(s == segment for s in segments[: row + 1])
                corner, colour = (x + CELL * first, TOP + CELL * row), COLOURS[segment - 1] if segment else "#d5d9de"
                axes.add_patch(Rectangle(corner, CELL * n, CELL, fc=colour, lw=0))
        for i in range(T + 1):
            axes.plot([x, x + T * CELL], [TOP + CELL * i] * 2, color="#e3e6ea", lw=0.5)
            axes.plot([x + CELL * i] * 2, [TOP, TOP + T * CELL], color="#e3e6ea", lw=0.5)
        for row in range(1, T + 1):  # a line where a document ends
            if row == T or segments[row] != segments[row - 1]:
                y = TOP + CELL * row
                axes.plot([x, x + T * CELL], [y, y], color=INK, lw=0.7)
    return figure
