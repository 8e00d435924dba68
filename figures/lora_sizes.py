"""An update of low rank, drawn to scale, and how many numbers are trained at each rank. From the record of `lora`."""

from figures.canvas import COLOURS, INK, LINE, PALE, canvas, write
from figures.records import result_of

SIDE, RANK, WIDTH = 190, 8, 512  # W has 512 rows and columns; a side of the drawing has 190 units
WORDS = {
    "en": {"frozen": "frozen: {:,}", "trained": "trained: {:,}", "scale": "to scale: width 512, rank 8",
           "all": "all parameters", "rank": "rank {}", "numbers": "numbers trained, {}"},
    "zh": {"frozen": "冻结：{:,}", "trained": "训练：{:,}", "scale": "按比例画：宽度 512，秩 8",
           "all": "全部参数", "rank": "秩 {}", "numbers": "训练多少个数，{}"},
}  # fmt: skip


def draw(language: str):
    from matplotlib.patches import Rectangle

    words, size = WORDS[language], result_of("lora")["sizes"]
    figure, axes = canvas(940, 282)
    thin = max(SIDE * RANK / WIDTH, 3)

    def matrix(x, y, width, height, colour):
        axes.add_patch(Rectangle((x, y), width, height, fc=colour, ec=LINE, lw=0.8))

    top, x = 44, 20
    write(axes, x, 20, words["scale"], 9.5, align="left", weight="bold")
    matrix(x, top, SIDE, SIDE, PALE)
    write(axes, x + SIDE / 2, top + SIDE / 2, f"W  {WIDTH} × {WIDTH}", 10)
    write(axes, x + SIDE / 2, top + SIDE + 20, words["frozen"].format(WIDTH * WIDTH), 9)
    x += SIDE + 18
    write(axes, x, top + SIDE / 2, "+", 14)
    x += 22
    matrix(x, top, thin, SIDE, COLOURS[1])
    write(axes, x + 14, top + 12, f"B  {WIDTH} × {RANK}", 9, align="left")
    matrix(x + 40, top + SIDE / 2, SIDE, thin, COLOURS[1])
    write(axes, x + 40, top + SIDE / 2 - 14, f"A  {RANK} × {WIDTH}", 9, align="left")
    write(axes, x + 20, top + SIDE / 2, "×", 11)
    write(axes, x + 100, top + SIDE + 20, words["trained"].format(2 * WIDTH * RANK), 9)

    x = 590
    write(axes, x - 90, 20, words["numbers"].format(size["preset"]), 9.5, align="left", weight="bold")
    rows = [(words["rank"].format(rank), n) for rank, n in size["trained"].items()] + [(words["all"], size["all"])]
    for i, (name, n) in enumerate(rows):
        y, length = top + 4 + 34 * i, 230 * n / size["all"]
        write(axes, x, y + 11, name, 9, align="right")
        matrix(x + 10, y, length, 22, COLOURS[1] if i + 1 < len(rows) else PALE)
        write(axes, x + 18 + length, y + 11, f"{n:,}", 8.5, INK, align="left")
    return figure
