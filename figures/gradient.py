"""One update by hand: three candidates with logits 2, 1, 0, of which the second is right, before and after a step."""

from math import exp, log

from figures.canvas import COLOURS, INK, canvas, write

LOGITS, RIGHT, RATE = (2.0, 1.0, 0.0), 1, 1.0
WORDS = {
    "en": ("before: p", "gradient: p − what came", "after one step: p", "loss {:.2f}", "right answer"),
    "zh": ("更新前：概率 p", "梯度：p 减去实际来的", "更新后：概率 p", "损失 {:.2f}", "正确答案"),
}


def softmax(logits):
    return [exp(z) / sum(map(exp, logits)) for z in logits]


def draw(language: str):
    before, gradient, after, loss, right = WORDS[language]
    p = softmax(LOGITS)
    error = [p_j - (j == RIGHT) for j, p_j in enumerate(p)]
    q = softmax([z - RATE * e for z, e in zip(LOGITS, error, strict=True)])
    figure, axes = canvas(760, 250)
    panels = ((before, p, loss.format(-log(p[RIGHT]))), (gradient, error, ""), (after, q, loss.format(-log(q[RIGHT]))))
    for column, (head, values, foot) in enumerate(panels):
        left, zero = 30 + 250 * column, 120  # bars stand on the line y = 120, or hang from it
        write(axes, left + 100, 18, head, 10, weight="bold")
        axes.plot([left, left + 200], [zero, zero], color=INK, lw=0.8)
        for j, value in enumerate(values):
            x = left + 18 + 60 * j
            axes.bar(x + 22, -80 * value, 44, zero, color=COLOURS[2 if j == RIGHT else 0], edgecolor=INK, lw=0.6)
            write(axes, x + 22, zero - 80 * value + (-12 if value > 0 else 12), f"{value:.3f}", 8.5)
        write(axes, left + 100, 235, foot, 10)
        write(axes, left + 100, 212, right, 8, INK)
    return figure
