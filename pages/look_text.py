"""The text that is looked at: a question with the model's answer, or any text; and its trace, computed once."""

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from chat.abilities import Abilities
from inference.engine import Engine
from inference.sampling import SamplingParams
from inspection.tokens import own_model, read
from inspection.trace import Trace, trace
from pages import charts
from pages.frame import LASTS, escaped
from pages.words import Words

ANSWER = 64  # tokens of an answer that is looked at


@dataclass
class Look:
    """What a view needs. names: the tokens as they are shown; answer: the place where the model's answer begins."""

    say: Words
    path: Path
    engine: Engine
    can: Abilities
    paths: list[Path]
    as_chat: bool = False
    text: str = ""
    traced: Trace | None = None
    names: tuple[str, ...] = ()
    answer: int = 0

    @property
    def ids(self) -> list[int]:
        return self.traced.ids

    @property
    def tokenizer(self):
        return self.engine.tokenizer


def read_text(look: Look) -> bool:
    """Asks what to look at, and fills it in; False where there is nothing yet."""
    say = look.say
    kinds = ("as_text", "as_question") if look.can.chats is False else ("as_question", "as_text")
    kind = st.radio(say("read_as"), kinds, format_func=say, horizontal=True, key=f"read_as {kinds[0]}", **LASTS)
    first = look.can.examples[1:2] or (say("example_text"),)
    text = st.text_area(say("text"), first[0], key=f"look_text {kinds[0]}", height=80, **LASTS)
    look.text, look.as_chat = text, kind == "as_question"
    with st.spinner(say("computing")):
        changed = look.path.stat().st_mtime_ns
        look.traced, look.answer = traced(str(look.path), changed, text, look.as_chat, look.engine)
    look.names = tuple(charts.labels(look.tokenizer, look.ids))
    return True


@st.cache_resource(max_entries=6, show_spinner=False)
def traced(path: str, changed: int, text: str, as_chat: bool, _engine: Engine) -> tuple[Trace, int]:
    """One pass over the text; of a question with the model's best answer -> (trace, where the answer begins)."""
    ids = read(_engine, [{"role": "user", "content": text}] if as_chat and text.strip() else text)
    begins = len(ids)
    if as_chat:
        room = min(ANSWER, _engine.context - begins)
        ids = ids + _engine.generate([ids], SamplingParams(max_tokens=room, temperature=0))[0].token_ids
        ids = read(_engine, ids)
    return trace(own_model(_engine), ids), begins


def choose_place(look: Look, key: str, first: int, last: int, begin: int) -> int:
    """The tokens from `first` to `last`, to click on -> the place that is chosen; `begin` before anything is."""
    if st.session_state.get(key) not in range(first, last + 1):
        st.session_state[key] = begin
    names = [charts.unlike(escaped(name), i) for i, name in enumerate((*look.names, "…"))]
    with st.container(key=row_of(key)):
        return st.pills(look.say("place"), range(first, last + 1), key=key, format_func=names.__getitem__,
                        required=True, label_visibility="collapsed")  # fmt: skip


def paint(key: str, colours: list[str], hints: list[str]) -> None:
    """Colours the tokens of choose_place, from the first of them on. It may come after: it may depend on the choice."""
    st.html(charts.painted(row_of(key), colours, hints))


def row_of(key: str) -> str:
    return f"tokens-{key.replace(' ', '-')}"
