"""A conversation, a line a turn: which tokens are learned, and their nats in two models. From the record of `mask`."""

from figures.canvas import COLOURS, INK, PALE, box, canvas, text_width, write
from figures.records import result_of

WORDS = {
    "en": {"learned": "learned (mask 1)", "read": "read only (mask 0)", "models": ("base model", "after SFT"),
           "price": "nats of each learned token:"},
    "zh": {"learned": "要学（掩码 1）", "read": "只读（掩码 0）", "models": ("基座模型", "SFT 之后"),
           "price": "每个要学的 token 的 nat："},
}  # fmt: skip
SIZE, PAD, GAP, HEIGHT, LOW, TALL, LEFT, TOP = 8, 12, 4, 26, 42, 72, 16, 56
GREEN, RED = COLOURS[2], "#b03a2e"


def draw(language: str):
    words, result = WORDS[language], result_of("mask")
    tokens = [token.replace("\n", "↵") for token in result["tokens"]]
    prices = list(result["nats"].values())  # of the base model, then of the one after SFT
    lines = [range(a, b) for a, b in zip(result["starts"], [*result["starts"][1:], len(tokens)], strict=True)]
    wide = [max(text_width(token, SIZE), 22) + PAD for token in tokens]
    width = max(sum(wide[t] + GAP for t in line) for line in lines) + 2 * LEFT
    steps = [TALL if any(result["mask"][t] for t in line) else LOW for line in lines]
    figure, axes = canvas(max(width, 710), TOP + sum(steps))
    for x, colour, text in ((LEFT, GREEN, words["learned"]), (LEFT + 150, PALE, words["read"])):
        box(axes, x, 14, 24, 20, "", colour)
        write(axes, x + 32, 24, text, align="left")
    write(axes, LEFT + 320, 24, words["price"], align="left")
    for i, (name, colour) in enumerate(zip(words["models"], (RED, INK), strict=True)):
        write(axes, LEFT + 515 + 90 * i, 24, name, 9, colour, align="left", weight="bold")
    y = TOP
    for line, step in zip(lines, steps, strict=True):
        x = LEFT
        for t in line:
            learned = result["mask"][t]
            box(axes, x, y, wide[t], HEIGHT, tokens[t], GREEN if learned else PALE, SIZE)
            if learned:
                for i, colour in enumerate((RED, INK)):
                    write(axes, x + wide[t] / 2, y + HEIGHT + 9 + 13 * i, f"{prices[i][t]:.2f}", 7, colour)
            x += wide[t] + GAP
        y += step
    return figure
