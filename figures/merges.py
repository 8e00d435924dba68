"""A word from bytes to one token, merge by merge: the steps that the command `bpe` recorded."""

from figures.canvas import COLOURS, box, canvas, text_width, write
from figures.records import result_of

LABELS = {"en": ("bytes", "merge {}"), "zh": ("字节", "第 {} 次合并")}
BYTE = 44  # units that a byte is wide


def draw(language: str):
    steps = result_of("bpe")["steps"]
    width = 120 + BYTE * len(steps[0])
    figure, axes = canvas(width, 24 + 42 * len(steps))
    for row, step in enumerate(steps):
        y, x = 14 + 42 * row, 100
        start, merged = LABELS[language]
        write(axes, 14, y + 15, merged.format(row) if row else start, align="left")
        before = set(steps[row - 1]) if row else set(step)
        for token in step:
            is_text = any(ord(char) > 127 for char in token)
            n_bytes = len(token.encode()) if is_text else len(token.split())
            wide = BYTE * n_bytes
            size = 10 if text_width(token, 10) < wide else 7
            box(axes, x + 1, y, wide - 2, 30, token, COLOURS[1] if token not in before else COLOURS[0], size)
            x += wide
    return figure
