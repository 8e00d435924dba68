"""An all-reduce of four processes around a ring: what each holds before, between the two halves, and afterwards."""

from figures.canvas import COLOURS, PALE, arrow, box, canvas, write

SIZE = 4
WORDS = {
    "en": {"names": ("own gradients", "after reduce-scatter", "after all-gather"), "process": "process {}",
           "notes": ("each from its own rows", "each has one part's sum", "all have every sum"),
           "arrows": ("reduce-\nscatter", "all-\ngather"), "zero": "ZeRO updates the weights here"},
    "zh": {"names": ("各自的梯度", "reduce-scatter 之后", "all-gather 之后"), "process": "进程 {}",
           "notes": ("各由自己的行算出", "每个进程凑齐一份的和", "人人都有全部的和"),
           "arrows": ("reduce-\nscatter", "all-\ngather"), "zero": "ZeRO 在这里更新权重"},
}  # fmt: skip


def draw(language: str):
    words = WORDS[language]
    figure, axes = canvas(800, 270)
    for panel, (name, note) in enumerate(zip(words["names"], words["notes"], strict=True)):
        left = 80 + 250 * panel
        write(axes, left + 82, 20, name, 10, weight="bold")
        for rank in range(SIZE):
            if panel == 0:
                write(axes, 38, 58 + 40 * rank, words["process"].format(rank), 8.5)
            for part in range(SIZE):
                summed = panel == 2 or (panel == 1 and part == (rank + 1) % SIZE)
                known = summed or panel == 0
                text = f"Σ{'abcd'[part]}" if summed else f"{'abcd'[part]}{rank}" if known else ""
                colour = COLOURS[part] if summed else "white" if not known else PALE
                box(axes, left + 42 * part, 44 + 40 * rank, 38, 28, text, colour, 9)
        write(axes, left + 82, 216, note, 8.5)
        if panel < 2:
            arrow(axes, (left + 174, 128), (left + 240, 128))
            for i, line in enumerate(words["arrows"][panel].split("\n")):
                write(axes, left + 207, 92 + 16 * i, line, 8)
    write(axes, 80 + 250 + 82, 246, words["zero"], 8.5, style="italic")
    return figure
