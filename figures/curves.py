"""Loss, held-out loss and gradient norm of two recorded runs: on most of the text, and on little of it (`read_log`)."""

from figures.records import result_of

WORDS = {
    "en": {"many": "95% of the text", "few": "10% of it", "norm": "gradient norm", "train": "training, each step",
           "mean": "training, mean of 10", "held": "held out", "step": "step", "loss": "loss"},
    "zh": {"many": "95% 的文本", "few": "10% 的文本", "norm": "梯度的长度", "train": "训练，每一步",
           "mean": "训练，10 步平均", "held": "留出集", "step": "步", "loss": "损失"},
}  # fmt: skip


def draw(language: str):
    from matplotlib.figure import Figure

    words, result = WORDS[language], result_of("read_log")
    figure = Figure(figsize=(9.4, 2.9))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.17, top=0.88, wspace=0.22)
    for axes, name in zip((panels[0], panels[2]), ("many", "few"), strict=True):
        run = result[name]
        steps = range(1, len(run["loss"]) + 1)
        axes.plot(steps, run["loss"], color="#9db9d8", lw=0.8, label=words["train"])
        axes.plot(steps, run["mean"], color="#2a6cb4", lw=1.6, label=words["mean"])
        axes.plot(*zip(*run["held_out"], strict=True), "o-", color="#b4532a", lw=1.2, ms=4, label=words["held"])
        axes.set(ylim=(0, 8))
        axes.set_title(f"{words['loss']}: {words[name]}", fontsize=9.5)
    panels[0].legend(fontsize=8, frameon=False)
    panels[1].plot(range(1, len(result["many"]["grad_norm"]) + 1), result["many"]["grad_norm"], color="#2a8c4a", lw=1)
    panels[1].axhline(1, color="#7b8794", lw=0.8, ls="--")
    panels[1].set(ylim=(0, None))
    panels[1].set_title(f"{words['norm']}: {words['many']}", fontsize=9.5)
    for axes in panels:
        axes.set_xlabel(words["step"], fontsize=8.5)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
