"""Sentences as the project's own vocabulary cuts them: a colour a token, its id below."""

from figures.canvas import COLOURS, box, canvas, text_width, write

SENTENCES = ("中国的首都是北京，人口超过两千万。", "The capital of China is Beijing.", "1984 年 + 16 = 2000 年", "饕餮 unhappiness")


def draw(language: str):
    from model.tokenizer import encode_text, load_tokenizer

    tokenizer = load_tokenizer()
    figure, axes = canvas(760, 20 + 66 * len(SENTENCES))
    for row, sentence in enumerate(SENTENCES):
        x, y = 14, 14 + 66 * row
        for i, token in enumerate(encode_text(tokenizer, sentence)):
            text = shown(tokenizer, token)
            wide = max(text_width(text, 11), text_width(str(token), 6.5)) + 10
            box(axes, x, y, wide - 2, 30, text, COLOURS[i % len(COLOURS)], 11)
            write(axes, x + wide / 2 - 1, y + 41, str(token), 6.5)
            x += wide
    return figure


def shown(tokenizer, token: int) -> str:
    """A token as text, its blanks made visible, or as hexadecimal bytes where it is a part of a character."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text.replace(" ", "␣")
    from tokenizers.pre_tokenizers import ByteLevel  # writes each byte as one character; here the way back

    letters = {ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(bytes([b]).decode("latin-1"))[0][0]: b
               for b in range(128)}  # fmt: skip
    return " ".join(f"{letters.get(c, ord(c)):02X}" for c in tokenizer.convert_ids_to_tokens(token))
