"""The learning rate over a run: warmup, then a cosine, or level and a straight line down (record `optimizers`)."""

from figures.canvas import plot
from figures.records import result_of

TOTAL, WARMUP = 200, 20
WORDS = {
    "en": {"cosine": "cosine", "wsd": "wsd: warmup, stable, decay", "step": "step", "rate": "share of the peak rate"},
    "zh": {"cosine": "cosine（余弦）", "wsd": "wsd（预热、稳定、下降）", "step": "步", "rate": "占最高学习率的比例"},
}


def draw(language: str):
    words, schedules = WORDS[language], result_of("optimizers")["schedules"]
    figure, axes = plot(640, 230)
    for schedule, colour, style in (("cosine", "#2a6cb4", "-"), ("wsd", "#b4532a", "--")):
        axes.plot(schedules[schedule], style, color=colour, lw=1.8, label=words[schedule])
    axes.axvspan(0, WARMUP, color="#f3f5f7")
    axes.set(xlim=(0, TOTAL), ylim=(0, 1.08))
    axes.set_xlabel(words["step"], fontsize=9)
    axes.set_ylabel(words["rate"], fontsize=9)
    axes.legend(fontsize=8.5, frameon=False, loc="lower left", bbox_to_anchor=(0.12, 0.0))
    return figure
