"""What all pages share: the languages, the choice of a model, errors in words.

Streamlit runs a page from top to bottom whenever somebody uses a control of it. What must last is kept in
st.session_state, which each visitor has for himself; models are shared by all.
"""

import threading

import streamlit as st

from pages.faults import explained
from pages.words import Words

LASTS = {"persist_state": "session"}  # of controls whose value outlives a visit to another page
NARROW = """<style>
.block-container {padding-top: 4.5rem}
@media (max-width: 640px) {.block-container {padding: 4.5rem 1rem 1rem 1rem}}
[data-testid="stText"] {white-space: pre-wrap; overflow-wrap: anywhere; font-family: inherit}
.tok {display: inline-block; padding: 0 .15em; margin: 1px; border-radius: 3px; white-space: pre-wrap;
      font-family: ui-monospace, monospace; border-bottom: 2px solid rgba(128,128,128,.35)}
.told {border-collapse: collapse; width: 100%}
.told td {padding: .3em .6em; border: 1px solid rgba(128,128,128,.3); white-space: pre-wrap; overflow-wrap: anywhere}
.told td:first-child {white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; width: 1%}
[class*="st-key-tokens-"] [role="radiogroup"] {gap: 4px 2px}
[class*="st-key-tokens-"] button {padding: 0 .3em; min-height: 1.8rem; border-radius: 3px; position: relative}
[class*="st-key-tokens-"] button[aria-checked="true"] {outline: 2px solid #d33}
[class*="st-key-tokens-"] button:hover::after {position: absolute; bottom: 100%; left: 0; z-index: 9; padding: 0 .4em;
      white-space: nowrap; border-radius: 3px; background: #333; color: #fff; font-size: .8rem}
</style>"""


def chosen_words() -> Words:
    """The words of the language that was chosen, before that of the visitor's browser."""
    chinese = (st.context.locale or "zh").startswith("zh")
    return Words(st.session_state.get("language") or ("zh" if chinese else "en"))


def shell(say: Words) -> None:
    """What stands on every page before its own content."""
    st.html(NARROW)
    names = {"zh": "中文", "en": "English"}
    with st.sidebar:
        st.segmented_control("语言 / Language", list(names), default=say.language, required=True, key="language",
                             format_func=names.get, **LASTS)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what takes long
IMPORTING = threading.Lock()


def load_rooms(say: Words) -> None:
    """Imports the rooms that need torch and transformers: seconds, the first time. One visitor after the other, because
    transformers fails where two threads import it at once."""
    with st.spinner(say("loading")), IMPORTING:
        import inspection.runs  # noqa: F401


# -------------------------------------------------------------------------------------------------------------- errors
def fault(error: Exception, say: Words) -> None:
    """An error in the page's language, with what to do, and the program's own words behind it."""
    key, values = explained(error)
    st.error(say(f"fault_{key}", **{name: escaped(value) for name, value in values.items()}))
    if key != "other":
        st.expander(say("details")).text(str(error))


# --------------------------------------------------------------------------------------------------------------- models
@st.cache_resource(max_entries=3, show_spinner=False)
def opened(path, changed: int):
    """(engine, abilities), shared by all visitors. changed: when the file was written, so a newer one is read again."""
    from chat import models

    return models.opened(path)


def choose_model(say: Words, label: str, key: str, paths):
    """A box to choose one of the files -> (path, engine, abilities), or None where it cannot be opened."""
    path = st.selectbox(label, paths, format_func=str, key=key, **LASTS)
    if path is None:
        return None
    try:
        with st.spinner(say("loading")):
            engine, can = opened(path, path.stat().st_mtime_ns)
    except (ValueError, OSError) as error:
        fault(error, say)
        return None
    return path, engine, can


def nothing_trained(say: Words) -> None:
    st.warning(say("untrained"))
    st.code("make demo\n# " + say("or") + "\npython 3-full_sft.py", language="bash")


# ----------------------------------------------------------------------------------------------------------- plain text
def escaped(text: str) -> str:
    """For places that Streamlit reads as Markdown: the text as it is, with no link and no picture in it."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|:$~&" else c for c in text)
