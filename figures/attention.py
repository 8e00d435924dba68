"""Attention of one head, step by step: scores, the causal mask, the softmax. From the record of `attention`."""

from figures.canvas import INK, canvas, write
from figures.records import result_of

WORDS = {
    "en": {"heads": ("1. scores q·k / √h", "2. the future is masked", "3. softmax: weights in %"),
           "query": "who looks", "key": "at which token"},
    "zh": {"heads": ("1. 分数 q·k / √h", "2. 掩住后面的 token", "3. softmax：权重（%）"),
           "query": "谁在看", "key": "看哪个 token"},
}  # fmt: skip
CELL = 38


def draw(language: str):
    from matplotlib.patches import Rectangle

    words, result = WORDS[language], result_of("attention")
    tokens, scores, weights = result["tokens"], result["scores"], result["weights"]
    T, largest = len(tokens), max(abs(score) for row in scores for score in row)
    figure, axes = canvas(112 + 3 * (T * CELL + 30), 82 + T * CELL)
    for row, token in enumerate(tokens):
        write(axes, 102, 70 + CELL * (row + 0.5), f"{token}  {row}", align="right")
    write(axes, 102, 40, words["query"] + " ↓", 7.5, align="right")
    for panel, head in enumerate(words["heads"]):
        x = 112 + panel * (T * CELL + 30)
        write(axes, x + T * CELL / 2, 16, head, 9.5, weight="bold")
        write(axes, x + T * CELL / 2, 40, words["key"] + " →", 7.5)
        for column in range(T):
            write(axes, x + CELL * (column + 0.5), 58, str(column), 8)
        for row in range(T):
            for column in range(T):
                seen, score, weight = column <= row, scores[row][column], weights[row][column]
                if panel == 2:
                    text, colour = f"{100 * weight:.0f}" if seen else "0", (1 - 0.7 * weight, 1 - 0.4 * weight, 1)
                elif panel == 1 and not seen:
                    text, colour = "−∞", (0.85, 0.85, 0.85)
                else:
                    shade = min(abs(score) / largest, 1)
                    warm, cold = (1, 1 - 0.35 * shade, 1 - 0.6 * shade), (1 - 0.5 * shade, 1 - 0.25 * shade, 1)
                    text, colour = f"{score:.1f}", warm if score > 0 else cold
                cell = (x + CELL * column, 70 + CELL * row)
                axes.add_patch(Rectangle(cell, CELL, CELL, fc=colour, ec="#ffffff", lw=1))
                write(axes, cell[0] + CELL / 2, cell[1] + CELL / 2, text, 8, INK)
    return figure
