"""Query heads and the key/value heads they share: multi-head, grouped-query (the preset's own) and multi-query."""

from figures.canvas import COLOURS, LINE, box, canvas, write

PRESET = "minimind2-small"
WORDS = {
    "en": {"names": ("multi-head (MHA)", "grouped-query (GQA)", "multi-query (MQA)"), "q": "queries",
           "kv": "keys and\nvalues", "cache": "{:,} numbers a token in the cache"},
    "zh": {"names": ("多头注意力 MHA", "分组查询注意力 GQA", "多查询注意力 MQA"), "q": "查询",
           "kv": "键和值", "cache": "每个 token 缓存 {:,} 个数"},
}  # fmt: skip


def draw(language: str):
    from model.LMConfig import LMConfig

    config, words = LMConfig.from_preset(PRESET), WORDS[language]
    H, step = config.n_heads, 30
    figure, axes = canvas(100 + 3 * (H * step + 24), 190)
    write(axes, 14, 62, words["q"], align="left")
    for i, line in enumerate(words["kv"].split("\n")):
        write(axes, 14, 122 + 17 * i, line, align="left")
    for panel, (name, G) in enumerate(zip(words["names"], (H, config.n_kv_heads, 1), strict=True)):
        x, group = 90 + panel * (H * step + 24), H // G
        write(axes, x + H * step / 2, 20, name, 10, weight="bold")
        for head in range(H):
            colour, middle = COLOURS[head // group % len(COLOURS)], x + step * (head // group * group + group / 2)
            axes.plot([x + step * (head + 0.5), middle], [74, 110], color=LINE, lw=1)
            box(axes, x + step * head + 2, 48, step - 4, 26, f"Q{head}", colour, 7)
        for kv in range(G):
            middle = x + step * (kv * group + group / 2)
            box(axes, middle - 13, 110, 26, 26, f"K{kv}", COLOURS[kv % len(COLOURS)], 7)
            box(axes, middle - 13, 138, 26, 26, f"V{kv}", COLOURS[kv % len(COLOURS)], 7)
        numbers = 2 * config.n_layers * G * config.head_dim
        write(axes, x + H * step / 2, 178, words["cache"].format(numbers), 8)
    return figure
