"""Backpropagation through one block: forward from left to right above, gradients from right to left below."""

from figures.canvas import COLOURS, INK, arrow, box, canvas, write

NODES = ("x", "h = x W₁", "a = silu(h)", "r = x + a W₂", "z = r U", "L")
GRADIENTS = ("dx = dr + dh W₁ᵀ", "dh = da · silu′(h)", "da = dr W₂ᵀ", "dr = dz Uᵀ", "dz = p − y", "1")
WEIGHTS = {1: "dW₁ = xᵀ dh", 3: "dW₂ = aᵀ dr", 4: "dU = rᵀ dz"}
WORDS = {
    "en": {"forward": "forward", "backward": "backward", "weights": "gradients of the weights",
           "kept": "kept from the forward pass", "path": "residual path", "back": "its gradient comes back unchanged"},
    "zh": {"forward": "前向", "backward": "反向", "weights": "参数的梯度",
           "kept": "用到前向时留下的数", "path": "残差连接", "back": "梯度原样传回"},
}  # fmt: skip
WIDTH, STEP, LEFT = 112, 142, 100


def draw(language: str):
    words = WORDS[language]
    figure, axes = canvas(LEFT + STEP * len(NODES) + 6, 330)
    write(axes, 8, 92, words["forward"] + " →", 9, align="left", weight="bold")
    write(axes, 8, 212, words["backward"] + " ←", 9, align="left", weight="bold")
    write(axes, 8, 290, words["weights"], 8.5, align="left", weight="bold")
    for i, (node, gradient) in enumerate(zip(NODES, GRADIENTS, strict=True)):
        x = LEFT + STEP * i
        box(axes, x, 72, WIDTH, 40, node, COLOURS[0], 9)
        box(axes, x, 192, WIDTH, 40, gradient, COLOURS[1], 8.5)
        if i:
            arrow(axes, (x - STEP + WIDTH, 92), (x, 92))
            arrow(axes, (x, 212), (x - STEP + WIDTH, 212))
        if i in WEIGHTS:
            arrow(axes, (x + WIDTH / 2, 232), (x + WIDTH / 2, 270))
            box(axes, x, 270, WIDTH, 40, WEIGHTS[i], COLOURS[2], 9)
            before = LEFT + STEP * (i - 1) + WIDTH / 2
            axes.plot([before, x - 8, x - 8, x], [112, 150, 290, 290], color=INK, lw=0.8, ls=":")
    first, last = LEFT + WIDTH / 2, LEFT + STEP * 3 + WIDTH / 2
    for y, edge, label, ends in ((38, 72, words["path"], (first, last)), (172, 192, words["back"], (last, first))):
        axes.plot([ends[0], ends[0], ends[1]], [edge, y, y], color="#b4532a" if y > 100 else "#2a6cb4", lw=1.6)
        arrow(axes, (ends[1], y), (ends[1], edge), "#b4532a" if y > 100 else "#2a6cb4")
        write(axes, (first + last) / 2, y - 10, label, 8.5)
    write(axes, LEFT + STEP * 5 - 22, 290, "··· " + words["kept"], 8, align="left")
    return figure
