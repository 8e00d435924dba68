"""What a text costs with and without a KV cache: tokens through the layers, counted, and CPU seconds, measured."""

from figures.canvas import INK
from figures.records import result_of

WORDS = {
    "en": {"work": "tokens through the layers (counted)", "time": "CPU seconds (measured)", "x": "tokens written",
           "without": "without a cache", "with": "with a cache"},
    "zh": {"work": "经过各层的 token 数（数出来的）", "time": "CPU 秒（量出来的）", "x": "写了多少个 token",
           "without": "没有缓存", "with": "有缓存"},
}  # fmt: skip
LINES = {"without": "#b03a2e", "with": "#2e6da4"}


def draw(language: str):
    from matplotlib.figure import Figure

    words, curve = WORDS[language], result_of("cache")["curve"]
    figure = Figure(figsize=(8.2, 3.0))
    for panel, what in enumerate(("work", "time")):
        axes = figure.add_axes((0.08 + 0.5 * panel, 0.17, 0.39, 0.68))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
        for name, colour in LINES.items():
            values = [point[panel] for point in curve[name]]
            written = [10 * (i + 1) for i in range(len(values))]
            axes.plot(written, values, color=colour, lw=1.8)
            axes.text(written[-1], values[-1], words[name], ha="right", va="bottom", fontsize=8.5, color=colour)
        axes.set_title(words[what], fontsize=9.5, color=INK)
        axes.set_xlabel(words["x"], fontsize=8.5, color=INK)
        axes.set_ylim(0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == round(value) else f"{value:g}")
    return figure
