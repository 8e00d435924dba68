"""What all pictures are drawn with: a plain surface, boxes, arrows, and an SVG file that is the same on every machine.

Text stays text in the file, so it can be searched and takes the reader's own fonts. matplotlib measures with its own
font, which has no Chinese: widths come from `text_width`, and the file names fonts that have it.
"""

import io
import warnings
from pathlib import Path

from common.files import replaced

LANGUAGES = ("en", "zh")
INK, PALE, LINE = "#1f2933", "#f3f5f7", "#7b8794"
COLOURS = ("#cfe3f7", "#fbdcc4", "#d3ecd0", "#f7d4dc", "#e2d8f3", "#faeebf")  # pale, so that dark text stands on them
FONTS = "'DejaVu Sans', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
SETTINGS = {
    "svg.fonttype": "none",  # text, not outlines
    "svg.hashsalt": "minimind",  # names inside the file do not change from run to run
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same measures everywhere
}


def canvas(width: float, height: float):
    """A surface of width x height units, a unit a hundredth of an inch, y downwards -> (Figure, Axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def plot(width: float, height: float, left: float = 60, bottom: float = 48):
    """A surface for a diagram with a horizontal and a vertical scale -> (Figure, Axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100))
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + 16) / width, 1 - (bottom + 16) / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    return figure, axes


def text_width(text: str, size: float = 9) -> float:
    """The width of a text in units: a Chinese character is as wide as the font is high, a Latin one about 0.6 of it."""
    return sum(1.0 if ord(char) > 0x2E7F else 0.6 for char in text) * size * 100 / 72


def write(axes, x: float, y: float, text: str, size: float = 9, colour: str = INK, align: str = "center", **style):
    axes.text(x, y, text, fontsize=size, color=colour, ha=align, va="center", **style)


def box(axes, x: float, y: float, width: float, height: float, text: str = "", colour: str = PALE, size: float = 9):
    """A box whose upper left corner is (x, y); the lines of the text stand in its middle."""
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=4", fc=colour, ec=LINE, lw=0.8)
    axes.add_patch(shape)
    lines = text.split("\n") if text else []
    step = size * 1.75
    for i, line in enumerate(lines):
        write(axes, x + width / 2, y + height / 2 + (i - (len(lines) - 1) / 2) * step, line, size)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], colour: str = LINE):
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    )


def texts(figure) -> set[str]:
    """All that is written in a picture: what the file must hold, whatever version of matplotlib wrote it."""
    from matplotlib.text import Text

    return {t.get_text() for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()}


def save(figure, path: Path) -> None:
    """Writes the picture as SVG: without a date, so that the same picture is the same file."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts have it
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    with replaced(path, text=True) as out:
        out.write(file.getvalue().replace("'DejaVu Sans'", FONTS))
