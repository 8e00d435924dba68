"""Sentences as the project's own vocabulary cuts them: a colour a token, its id below."""

from figures.canvas import COLOURS, box, canvas, text_width, write

SENTENCES = (
    "中国的首都是北京，人口超过两千万。",
    "The capital of China is Beijing.",
    "1984 年 + 16 = 2000 年",
    "饕餮 unhappiness",
)


def draw(language: str):
    from inspection.tokens import pieces
    from model.tokenizer import encode_text, load_tokenizer

    tokenizer = load_tokenizer()
    figure, axes = canvas(450, 12 + 66 * len(SENTENCES))
    for row, sentence in enumerate(SENTENCES):
        x, y = 14, 14 + 66 * row
        for i, piece in enumerate(pieces(tokenizer, encode_text(tokenizer, sentence))):
            # Blanks made visible; what is not a whole character as hexadecimal bytes.
            text = piece.text.replace(" ", "␣") if piece.whole else piece.bytes.hex(" ").upper()
            wide = max(text_width(text, 11), text_width(str(piece.id), 6.5)) + 10
            box(axes, x, y, wide - 2, 30, text, COLOURS[i % len(COLOURS)], 11)
            write(axes, x + wide / 2 - 1, y + 41, str(piece.id), 6.5)
            x += wide
    return figure
