"""What each of eight GPUs keeps of a model of seven billion parameters, by ZeRO's stage. From the course's record."""

from figures.canvas import COLOURS, INK, LINE, box, canvas, write
from figures.records import result_of

MODEL, GPUS, CARD = "7B", "8", 24  # GB of an RTX 3090
COLOUR = {"weights": COLOURS[0], "gradients": COLOURS[2], "moments": COLOURS[1]}
WORDS = {
    "en": {"weights": "weights", "gradients": "gradients", "moments": "Adam's moments", "card": "a card of {} GB",
           "names": ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"),
           "divided": ("nothing divided", "moments divided", "and gradients", "and weights"),
           "title": "7 billion parameters on 8 GPUs: GB on each"},
    "zh": {"weights": "权重", "gradients": "梯度", "moments": "Adam 的两个矩", "card": "一张 {} GB 的卡",
           "names": ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"),
           "divided": ("都不分", "分矩", "再分梯度", "再分权重"),
           "title": "70 亿参数，8 张卡：每张卡上的 GB"},
}  # fmt: skip


def draw(language: str):
    words, stages = WORDS[language], result_of("zero_memory")[MODEL][GPUS]
    figure, axes = canvas(720, 330)
    write(axes, 360, 18, words["title"], 10, weight="bold")
    floor, unit = 265, 2.0  # where the bars stand; hundredths of an inch for a GB
    for i, parts in enumerate(stages):
        x, y = 60 + 130 * i, floor
        for kind, size in parts.items():
            height = unit * size / 1e9
            y -= height
            axes.bar(x + 35, -height, 70, y + height, color=COLOUR[kind], edgecolor=LINE, lw=0.8)
            if height > 18:
                write(axes, x + 35, y + height / 2, f"{size / 1e9:.1f}", 8)
        total = f"{sum(parts.values()) / 1e9:.1f}"
        write(axes, x + 35, y - 12, total, 9, weight="bold", bbox={"fc": "white", "ec": "none", "pad": 0.5})
        write(axes, x + 35, floor + 16, words["names"][i], 9, weight="bold")
        write(axes, x + 35, floor + 36, words["divided"][i], 8)
    line = floor - unit * CARD
    axes.plot([40, 560], [line, line], color=INK, lw=1, ls="--")
    write(axes, 566, line, words["card"].format(CARD), 8, align="left")
    for i, kind in enumerate(reversed(COLOUR)):
        box(axes, 572, 60 + 26 * i, 16, 16, colour=COLOUR[kind])
        write(axes, 596, 68 + 26 * i, words[kind], 8.5, align="left")
    return figure
