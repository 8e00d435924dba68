"""The curves of runs over one another, what differs between their settings, and what one run is."""

import json

import numpy as np
import streamlit as st

from pages.frame import escaped
from pages.words import Words

CHANCE = 0.25  # of four options
MOST_POINTS = 1200  # of a curve: as many as a screen has
FIRST = ("loss", "val_loss", "reward", "lr", "grad_norm", "tokens_per_second")


def curves(say: Words, runs, axis: str, log: bool, names: list[str]) -> None:
    """A chart for each number that was chosen, a line in it for each run."""
    held = dict.fromkeys(name for run in runs for name in run.log.names())
    offered = sorted(held, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    default = [name for name in offered if name in FIRST[:2]]
    chosen = st.multiselect(say("numbers"), offered, default=default, format_func=lambda name: number_name(say, name),
                            key="numbers of " + ",".join(offered))  # fmt: skip
    for number in chosen:
        from pages.charts import lines

        rows = [row for run, name in zip(runs, names) if number in run.log.names()
                for row in points(run.log.series(number), axis, name)]  # fmt: skip
        if not rows:
            st.caption(say("no_axis", number=number_name(say, number), axis=say(f"by_{axis}")))
            continue
        few = len(rows) < 60 * len(runs)
        titles = (say(f"by_{axis}"), number_name(say, number))
        st.altair_chart(lines(rows, "x", "y", "run", titles, points=few, log=log and number.endswith("loss")))


def points(series, axis: str, name: str) -> list[dict]:
    """Rows of a chart, so many that they can be told apart; none where the log has no such axis."""
    x, y = getattr(series, axis), series.value
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(int)) if len(x) else []
    return [{"x": float(x[i]), "y": float(y[i]), "run": name} for i in keep]


def number_name(say: Words, name: str) -> str:
    known = {"loss": "loss", "val_loss": "val_loss", "lr": "rate", "grad_norm": "grad_norm",
             "tokens_per_second": "speed_now", "reward": "reward"}  # fmt: skip
    return say(known[name]) if name in known else name


def settings_that_differ(say: Words, runs, names: list[str]) -> None:
    from inspection.runs import differences

    if len(runs) < 2:
        return
    st.subheader(say("differences"))
    found = differences(runs)
    if not found:
        st.caption(say("no_differences"))
        return
    rows = {say("setting"): list(found)}
    for i, name in enumerate(names):
        rows[name] = [shown(values[i]) for values in found.values()]
    st.dataframe(rows, hide_index=True)


def shown(value) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def one(say: Words, run) -> None:
    """How a run stands, why it ended, how to go on, and what it wrote."""
    st.subheader(escaped(run.name), anchor=False)
    sentence = say(f"is_{run.status}", stage=run.stage or "?", step=f"{run.log.step:,}")
    st.text(f"{sentence} {why(say, run)}".strip())
    if run.resume and run.status != "running":
        st.caption(say("resume", folder=escaped(run.folder)) if run.folder else say("resume_here"))
        st.code(run.resume, language="bash", wrap_lines=True)
    for text in run.faults[:5]:
        st.warning(say("fault_in_run"))
        st.text(text)
    samples(say, run)


def why(say: Words, run) -> str:
    """The reason a run ended; the two that the layer below words itself are in the catalogue."""
    from inspection.runs import KILLED, NOT_KNOWN

    known = {KILLED: "why_killed", NOT_KNOWN: "why_unknown"}
    if not run.why:
        return ""
    return say(known[run.why]) if run.why in known else say("why", why=run.why)


def samples(say: Words, run) -> None:
    """What the model wrote to one prompt, validation after validation; of GRPO also what it was rewarded for."""
    from inspection.run_log import read_samples
    from inspection.runs import SAMPLES
    from pages.charts import told

    found = read_samples(run.beside(SAMPLES))
    written = [sample for sample in found if sample.reward is None]
    if written:
        prompt = st.selectbox(say("samples"), list(dict.fromkeys(sample.prompt for sample in written)),
                              key=f"prompt of {run.log.path}")  # fmt: skip
        st.html(told([(f"{one.step:,}", one.text) for one in written if one.prompt == prompt]))
    rewarded = [sample for sample in found if sample.reward is not None]
    if rewarded:
        steps = list(dict.fromkeys(sample.step for sample in rewarded))
        key = f"rewarded step {run.log.path}"
        if st.session_state.get(key) not in steps:
            st.session_state.pop(key, None)
        step = st.select_slider(say("rewarded"), steps, steps[-1], key=key) if len(steps) > 1 else steps[0]
        group = [sample for sample in rewarded if sample.step == step]
        st.text(say("asked", question=group[0].prompt, answer=group[0].answer))
        group.sort(key=lambda sample: -sample.reward)
        st.html(told([(f"{one.reward:g}", one.text) for one in group], [one.reward for one in group]))
        st.caption(say("rewarded_help"))


def exams(say: Words, folder: str) -> None:
    """The exams that were written in the folder or in ceval/, the earliest first."""
    from inspection.exam_results import find_exams
    from pages import charts

    found = find_exams((folder.strip() or "out", "ceval"))
    if not found:
        return
    st.subheader(say("exams"), anchor=False)
    st.caption(say("exams_help"))
    rows = [{"when": f"{one.time[5:16].replace('T', ' ')} {one.weights.rsplit('/', 1)[-1]}", "exam": one.exam,
             "accuracy": one.accuracy, "low": one.low, "high": one.high} for one in found]  # fmt: skip
    st.altair_chart(charts.exams(rows, (say("when"), say("accuracy")), (CHANCE, say("chance"))))


def speed(run) -> int | None:
    if "tokens_per_second" not in run.log.names():
        return None
    try:
        return round(float(np.median(run.log.series("tokens_per_second").value[-50:])))
    except ValueError:
        return None


def time_left(say: Words, run) -> str:
    seconds = run.log.seconds_left(run.steps) if run.status == "running" else None
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    return say("minutes", m=minutes, s=f"{seconds:02d}")
