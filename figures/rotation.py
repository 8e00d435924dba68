"""Rotation angles: four points of a head at positions 0 to 7, as model/attention.py rotates them."""

from math import cos, degrees, pi, sin

from figures.canvas import COLOURS, INK, LINE, canvas, write

PRESET, POSITIONS, POINTS = "minimind2-small", range(8), (0, 2, 4, 8)
WORDS = {"en": "point {i}: {turn:.1f} tokens a turn", "zh": "第 {i} 个点：{turn:.1f} 个 token 转一圈"}
RADIUS = 78


def draw(language: str):
    from matplotlib.patches import Circle

    from model.attention import inverse_frequencies
    from model.LMConfig import LMConfig

    frequency = inverse_frequencies(LMConfig.from_preset(PRESET))[0].tolist()
    figure, axes = canvas(220 * len(POINTS), 228)
    for column, i in enumerate(POINTS):
        x, y, numbered = 110 + 220 * column, 130, -pi
        write(axes, x, 20, WORDS[language].format(i=i, turn=2 * pi / frequency[i]), 8.5)
        axes.add_patch(Circle((x, y), RADIUS, fc="#ffffff", ec=LINE, lw=0.8))
        for p in POSITIONS:
            angle = p * frequency[i]  # radians
            end = (x + RADIUS * cos(angle), y - RADIUS * sin(angle))
            axes.plot([x, end[0]], [y, end[1]], color=INK if p == 0 else LINE, lw=1.1)
            if degrees(angle - numbered) > 12:  # nearer ones would cover each other
                numbered = angle
                axes.add_patch(Circle(end, 9, fc=COLOURS[p % len(COLOURS)], ec=INK, lw=0.6, zorder=3))
                write(axes, *end, str(p), 7, zorder=4)
    return figure
