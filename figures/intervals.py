"""The 95% interval of a score against the number of questions, for a guesser and for a model that gets 60% right."""

from figures.canvas import INK, LINE, plot, write
from figures.records import result_of

SCORES = {0.25: "#c0562b", 0.60: "#2f6fb3"}
EXAMS = {44: ("one subject", "一科"), 308: ("sample exam", "样本考试"), 1346: ("C-Eval val", "C-Eval val"),
         12342: ("C-Eval test", "C-Eval test")}  # fmt: skip
WORDS = {"en": ("questions", "score"), "zh": ("题数", "得分")}


def draw(language: str):
    figure, axes = plot(760, 360)
    axes.set_position((0.09, 0.14, 0.88, 0.72))
    curve = {share: result_of("chance")["curve"][str(share)] for share in SCORES}  # (questions, low, high) each
    for share, colour in SCORES.items():
        numbers, low, high = zip(*curve[share], strict=True)
        axes.fill_between(numbers, low, high, color=colour, alpha=0.22, lw=0)
        axes.axhline(share, color=colour, lw=1)
    for n, names in EXAMS.items():
        axes.axvline(n, color=LINE, lw=0.7, ls=":")
        name = names[language == "zh"]
        write(axes, n, 1.1, name, 8)
        write(axes, n, 1.04, f"{n:,}", 8)
        for share in SCORES:
            low, high = next(ends for size, *ends in curve[share] if size == n)
            axes.plot([n, n], [low, high], color=INK, lw=1.4)
            write(axes, n * 1.07, high + 0.022, f"{100 * low:.0f}–{100 * high:.0f}%", 8, align="left")
    axes.set(xscale="log", xlim=(10, 33000), ylim=(0, 1))
    axes.set_yticks([0, 0.25, 0.5, 0.6, 0.75, 1], ["0", "25%", "50%", "60%", "75%", "100%"])
    axes.set_xticks([10, 100, 1000, 10000], ["10", "100", "1,000", "10,000"])
    axes.minorticks_off()
    axes.set_xlabel(WORDS[language][0], fontsize=8.5, color=INK)
    axes.set_ylabel(WORDS[language][1], fontsize=8.5, color=INK)
    return figure
