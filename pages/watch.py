"""Watch: the training runs of a folder, live while they go. It reads their files and changes nothing."""

from pathlib import Path

import streamlit as st

from pages import watch_run
from pages.frame import LASTS, fault
from pages.words import Words

LIVE, STILL = 2, 10  # seconds between two looks: while a run is at work, and else
MARKS = {"running": "●", "finished": "✓", "stopped": "‖", "failed": "✗", "lost": "?"}


def show(say: Words) -> None:
    st.title(say("watch_title"))
    st.caption(say("watch_help"))
    with st.sidebar:
        folder = st.text_input(say("folder"), "out", key="folder", **LASTS)
        axis = st.radio(say("axis"), ("step", "tokens", "seconds"), format_func=lambda name: say(f"by_{name}"),
                        key="axis", **LASTS)  # fmt: skip
        log = st.toggle(say("log_scale"), key="log scale", **LASTS)
    at_work = st.session_state.get("at work", False)
    st.fragment(board, run_every=LIVE if at_work else STILL)(say, folder, axis, log)


def look(say: Words, folder: str):
    """The runs as they are now, read on from where the last look ended; None where there is no such folder."""
    from common.errors import UserError
    from inspection.runs import find_runs

    seen = st.session_state.setdefault("seen", {})
    try:
        seen[folder] = find_runs(folder.strip() or "out", before=seen.get(folder))
    except UserError as error:
        fault(error, say)
        return None
    return seen[folder]


def board(say: Words, folder: str, axis: str, log: bool) -> None:
    """All that changes while a run goes: drawn anew every few seconds."""
    found = look(say, folder)
    if found is None:
        return
    at_work = any(run.status == "running" for run in found.runs)
    if at_work != st.session_state.get("at work", False):  # a run has begun or ended: look more often, or less
        st.session_state["at work"] = at_work
        st.rerun()
    if not found.runs:
        st.info(say("no_runs"))
    else:
        runs = {str(run.log.path): run for run in found.runs}
        st.dataframe(table(say, found.runs, folder), hide_index=True)
        chosen = st.multiselect(say("runs"), list(runs), default=list(runs)[:1], key=f"runs in {folder}",
                                format_func=lambda path: named(path, folder))  # fmt: skip
        chosen = [runs[path] for path in chosen if path in runs]
        watch_run.curves(say, chosen, axis, log, [named(str(run.log.path), folder) for run in chosen])
        watch_run.settings_that_differ(say, chosen, [named(str(run.log.path), folder) for run in chosen])
        for run in chosen:
            watch_run.one(say, run)
    watch_run.exams(say, folder)
    if found.others:
        with st.expander(say("other_files", n=len(found.others))):
            for path, why in found.others:
                st.text(f"{path}: {why}")


def named(path: str, folder: str) -> str:
    """A run's name, with the folder in `folder` that it is in."""
    try:
        return str(Path(path).relative_to(folder.strip() or "out").with_suffix(""))
    except ValueError:
        return path


def table(say: Words, runs, folder: str) -> dict[str, list]:
    last = [run.log.steps[-1] if run.log.steps else {} for run in runs]
    checked = [next((row["val_loss"] for row in reversed(run.log.rows) if row.get("val_loss")), None) for run in runs]
    return {
        say("run"): [named(str(run.log.path), folder) for run in runs],
        say("status"): [f"{MARKS[run.status]} {say('status_' + run.status)}" for run in runs],
        say("step"): [f"{run.log.step:,} / {run.steps:,}" if run.steps else f"{run.log.step:,}" for run in runs],
        say("loss"): [row.get("loss") for row in last],
        say("val_loss"): checked,
        say("speed_now"): [watch_run.speed(run) for run in runs],
        say("time_left"): [watch_run.time_left(say, run) for run in runs],
    }
