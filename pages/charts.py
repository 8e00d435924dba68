"""The drawings: Altair's charts, tokens as coloured text, attention maps as images."""

import base64
import html
import io
import re

import altair as alt
import numpy as np
from PIL import Image

from inspection.tokens import pieces

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})
HUES = (210, 30, 130, 280, 0, 180)  # of neighbouring tokens, degrees
# Dark blue to yellow, even in lightness; read on light and on dark ground alike.
MAP = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)
SHADES = np.stack([np.interp(np.linspace(0, 4, 256), range(5), channel) for channel in MAP.T], axis=1).astype(np.uint8)
UNSEEN = str.maketrans("01", "\u200b\u200c")  # characters without width
UNSAFE = re.compile(r"[^\w .,:%+·-]")  # in a string of CSS
SQUARE = 8  # characters that are written into a square of a chart
AXES = 130  # pixels that the axes of a chart of squares take of its height
SIDE = 420  # pixels of a map's side, about


# --------------------------------------------------------------------------------------------------- tokens as text
def labels(tokenizer, ids) -> list[str]:
    """Tokens as short names: blanks are made visible, and bytes that are no whole character are written \\xe6."""
    return [piece.text.translate(VISIBLE) for piece in pieces(tokenizer, list(map(int, ids)))]


def places(names: list[str], first: int = 0) -> list[str]:
    """Names of tokens with their places, so that no two are alike."""
    return [f"{i} {name}" for i, name in enumerate(names, start=first)]


def unlike(name: str, place: int) -> str:
    """The name and, unseen, its place: Streamlit tells buttons of a row apart by what they say alone."""
    return name + f"{place:b}".translate(UNSEEN)


def shortened(text: str) -> str:
    return text if len(text) <= SQUARE else text[: SQUARE - 1] + "…"


def coloured(names: list[str], colours: list[str], hints: list[str]) -> str:
    """HTML of tokens side by side. What they say is escaped: it stays text.

    hints: shown when the mouse rests on one.
    """
    spans = []
    for name, colour, hint in zip(names, colours, hints, strict=True):
        spans.append(f'<span class="tok" style="background: {colour}" title="{html.escape(hint)}">'
                     f"{html.escape(name)}</span>" + ("<br>" if "⏎" in name else ""))  # fmt: skip
    return f'<div style="line-height: 2">{"".join(spans)}</div>'


def painted(row: str, colours: list[str], hints: list[str]) -> str:
    """A style sheet for the tokens that can be clicked, the buttons in the container with the key `row`: a colour for
    each, and a hint while the mouse rests on it. Of the hints only what cannot end a string of CSS is kept."""
    rules = []
    for i, (colour, hint) in enumerate(zip(colours, hints, strict=True), start=1):
        button = f".st-key-{row} button:nth-of-type({i})"
        rules.append(f'{button} {{background: {colour}}} {button}:hover::after {{content: "{UNSAFE.sub("", hint)}"}}')
    return f"<style>{' '.join(rules)}</style>"


def by_turns(groups: list[int]) -> list[str]:
    """A colour for each token; tokens that share a character have the same."""
    return [f"hsla({HUES[group % len(HUES)]}, 80%, 55%, .25)" for group in groups]


def by_strength(values, hue: int = 0) -> list[str]:
    """From nothing at 0 to full colour at 1; NaN has none."""
    strong = np.clip(np.nan_to_num(np.asarray(values, float)), 0, 1)
    return [f"hsla({hue}, 85%, 55%, {0.75 * x:.2f})" for x in strong]


def told(rows: list[tuple[str, str]], strengths=None) -> str:
    """HTML of a table with a short name and a text a row. All is escaped; strengths: of the names' colour, 0 to 1."""
    colours = by_strength([0] * len(rows) if strengths is None else strengths, 130)
    cells = (f'<tr><td style="background: {colour}">{html.escape(name)}</td><td>{html.escape(text)}</td></tr>'
             for (name, text), colour in zip(rows, colours, strict=True))  # fmt: skip
    return f'<table class="told">{"".join(cells)}</table>'


# --------------------------------------------------------------------------------------------------------- images
def attention_image(weights: np.ndarray, side: int = SIDE) -> str:
    """(T, S) weights -> a PNG as a data URI, a square a pair. The root of a weight is drawn: most of them are small.

    A data URI, because Streamlit's own image files are gone as soon as another view is chosen, perhaps before the
    browser has asked for them.
    """
    size = max(1, side // max(weights.shape))
    shade = (255 * np.sqrt(np.clip(weights, 0, 1))).astype(np.uint8).repeat(size, axis=0).repeat(size, axis=1)
    image, png = Image.fromarray(shade), io.BytesIO()
    image.putpalette(SHADES.tobytes())
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------- charts
def rivals(names: list[str], model: np.ndarray, drawn: np.ndarray, said: tuple[str, str]):
    """Bars of the likeliest next tokens: as the model has them, and as they are drawn with the sampling's settings."""
    rows = [
        {"token": f"{i + 1}. {name}", "p": float(p), "kind": kind}
        for kind, values in zip(said, (model, drawn))
        for i, (name, p) in enumerate(zip(names, values))
    ]
    order = [f"{i + 1}. {name}" for i, name in enumerate(names)]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            y=alt.Y("token:N", sort=order, title=None, axis=alt.Axis(labelOverlap=False)),
            x=alt.X("p:Q", title=None, axis=alt.Axis(format="%")),
            yOffset=alt.YOffset("kind:N", sort=list(said)),
            color=alt.Color(
                "kind:N", sort=list(said), title=None, legend=alt.Legend(orient="bottom", columns=1, labelLimit=300)
            ),
            tooltip=["token:N", "kind:N", alt.Tooltip("p:Q", format=".2%")],
        )
        .properties(height=90 + 26 * len(names))
    )


def strip(names: list[str], values, title: str, others=None, other_title: str = ""):
    """A bar for each place; a line of other values over it."""
    rows = [{"place": i, "token": name, "value": None if np.isnan(v) else float(v)}
            for i, (name, v) in enumerate(zip(names, values))]  # fmt: skip
    if others is not None:
        for row, v in zip(rows, others):
            row["other"] = float(v)
    x = alt.X("place:O", title=None, axis=alt.Axis(labelOverlap=True))
    tips = ["place:O", "token:N", alt.Tooltip("value:Q", format=".2f", title=title)]
    base = alt.Chart(alt.Data(values=rows))
    bars = base.mark_bar().encode(x=x, y=alt.Y("value:Q", title=title), tooltip=tips)
    if others is None:
        return bars.properties(height=160)
    line = base.mark_line(color="#e8710a", point=True).encode(
        x=x, y=alt.Y("other:Q", title=other_title), tooltip=["place:O", "token:N", alt.Tooltip("other:Q", format=".2f")]
    )
    return alt.layer(bars, line).properties(height=240)


def heat(values: np.ndarray, rows: list[str], columns: list[str], titles: tuple[str, str, str], texts=None,
         height: int = 0):  # fmt: skip
    """(rows, columns) numbers as coloured squares that say their pair under the mouse; texts: written into them.

    rows, columns: names, no two of them alike. titles: of rows, columns and values.
    """
    data = [
        {"r": r, "c": c, "v": float(values[i, j]), "t": shortened(texts[i][j]) if texts else ""}
        for i, r in enumerate(rows)
        for j, c in enumerate(columns)
    ]
    x = alt.X("c:N", sort=None, title=titles[1], axis=alt.Axis(labelAngle=-60, labelLimit=90))
    y = alt.Y("r:N", sort=None, title=titles[0], axis=alt.Axis(labelLimit=110))
    tips = [alt.Tooltip("r:N", title=titles[0]), alt.Tooltip("c:N", title=titles[1]),
            alt.Tooltip("v:Q", title=titles[2], format=".3f")]  # fmt: skip
    base = alt.Chart(alt.Data(values=data)).encode(
        x=x, y=y, tooltip=[*tips, *([alt.Tooltip("t:N", title="=")] if texts else [])]
    )
    squares = base.mark_rect().encode(color=alt.Color("v:Q", scale=alt.Scale(scheme="viridis"), legend=None))
    if texts:
        inside = alt.ExprRef("bandwidth('x') - 2")  # pixels: on a phone a square is narrow
        light = alt.condition(alt.datum.v > 0.6 * float(np.nanmax(values)), alt.value("black"), alt.value("white"))
        squares = alt.layer(squares, base.mark_text(fontSize=11, limit=inside).encode(text="t:N", color=light))
    return squares.properties(height=height or AXES + 30 * len(rows))


def lines(rows: list[dict], x: str, y: str, group: str, titles: tuple[str, str], points=False, log=False):
    """Lines of rows [{x, y, group}], one a group. titles: of the axes."""
    several = len({row[group] for row in rows}) > 1
    legend = alt.Legend(orient="bottom", columns=1, labelLimit=300) if several else None
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=points)
        .encode(
            x=alt.X(f"{x}:Q", title=titles[0], axis=alt.Axis(tickMinStep=1)),
            y=alt.Y(f"{y}:Q", title=titles[1], scale=scale),
            color=alt.Color(f"{group}:N", title=None, legend=legend),
            tooltip=[f"{group}:N", alt.Tooltip(f"{x}:Q", format=",.6~g"), alt.Tooltip(f"{y}:Q", format=".4~g")],
        )
        .properties(height=320 if several else 220)
        .interactive(bind_y=False)
    )


def columns(names: list[str], values, title: str):
    """Bars side by side, in the order of the names."""
    rows = [{"name": name, "value": float(value)} for name, value in zip(names, values)]
    x = alt.X("name:N", sort=None, title=None, axis=alt.Axis(labelAngle=0, labelOverlap=True))
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(x=x, y=alt.Y("value:Q", title=title), tooltip=["name:N", alt.Tooltip("value:Q", format=",.4~g")])
        .properties(height=220)
    )


def exams(rows: list[dict], titles: tuple[str, str], chance: tuple[float, str]):
    """Rows [{when, exam, accuracy, low, high}] as points with their intervals, in their order; chance as a line."""
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("when:N", sort=None, title=titles[0], axis=alt.Axis(labelAngle=-30, labelLimit=160)),
        color=alt.Color("exam:N", title=None, legend=alt.Legend(orient="bottom", columns=1, labelLimit=300)),
        tooltip=["when:N", "exam:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("accuracy", "low", "high"))],
    )
    y = alt.Y("accuracy:Q", title=titles[1], scale=alt.Scale(domain=(0, 1)), axis=alt.Axis(format="%"))
    level = alt.Chart(alt.Data(values=[{"p": chance[0], "what": chance[1]}]))
    return alt.layer(
        level.mark_rule(strokeDash=[4, 4], color="#888").encode(y="p:Q", tooltip=["what:N"]),
        base.mark_rule(strokeWidth=3, opacity=0.5).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_point(filled=True, size=70).encode(y=y),
    ).properties(height=400)


def token_map(names: list[str], points: np.ndarray):
    """Tokens as words on a plane."""
    rows = [{"token": name, "x": float(x), "y": float(y)} for name, (x, y) in zip(names, points)]
    axis = alt.Axis(labels=False, ticks=False, title=None)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("x:Q", axis=axis, scale=alt.Scale(zero=False)), y=alt.Y("y:Q", axis=axis, scale=alt.Scale(zero=False))
    )
    words = base.mark_text(fontSize=12, color="#4c8bf5").encode(text="token:N", tooltip=["token:N"])
    return words.properties(height=520).interactive()
