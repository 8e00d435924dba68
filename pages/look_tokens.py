"""Tokens as coloured pieces with their bytes and merges; the next token's rivals at every place, and "what if"."""

import math

import numpy as np
import streamlit as st

from inference.sampling import SamplingParams
from inspection.next_token import next_tokens, what_if
from inspection.tokens import merges_of_token, pieces, shown
from pages import charts
from pages.frame import LASTS
from pages.look_text import Look, choose_place

BITS = 1 / math.log(2)
SURPRISED = 8  # bits at which a token has its full colour: expected with 1 in 256


def tokens(look: Look) -> None:
    say, found = look.say, pieces(look.tokenizer, look.ids)
    st.markdown(say("n_tokens", n=len(found), bytes=sum(len(piece.bytes) for piece in found if not piece.special)))
    hints = [f"id {piece.id} · {piece.bytes.hex(' ')}" for piece in found]
    st.html(charts.coloured(look.names, charts.by_turns([piece.group for piece in found]), hints))
    place = choose_place(look, "token place", 0, len(found) - 1, min(len(found) - 1, look.answer))
    merges(look, found[place])
    with st.expander(say("table")):
        st.dataframe(
            {say("place"): list(range(len(found))), say("token"): list(look.names), "id": look.ids,
             say("bytes"): [piece.bytes.hex(" ") for piece in found]}, hide_index=True,
        )  # fmt: skip


def merges(look: Look, piece) -> None:
    """How byte-pair encoding made a token, merge by merge."""
    say, steps = look.say, merges_of_token(look.tokenizer, piece.id)
    if not steps:
        st.caption(say("no_merges"))
        return
    st.dataframe(
        {say("merge"): [f"{shown(step.left)} + {shown(step.right)}".translate(charts.VISIBLE) for step in steps],
         say("rank"): [step.rank for step in steps],
         say("after"): [" · ".join(map(shown, step.after)).translate(charts.VISIBLE) for step in steps]},
        hide_index=True,
    )  # fmt: skip


def next_token(look: Look) -> None:
    say = look.say
    with st.sidebar:
        n = st.slider(say("n_best"), 5, 20, 10, key="n_best", **LASTS)
        temperature = st.slider(say("temperature"), 0.0, 2.0, 1.0, 0.05, key="look temperature", **LASTS)
        top_p = st.slider("top_p", 0.05, 1.0, 1.0, 0.05, key="look top_p", **LASTS)
    expected = next_tokens(look.traced, n, SamplingParams(temperature=temperature, top_p=top_p))
    surprise = np.concatenate([[np.nan], -expected.came[:-1] * BITS])  # of each token, given those before it
    entropy = np.concatenate([[np.nan], expected.entropy[:-1] * BITS])
    place = clicked(look, surprise, entropy)
    hints = [f"{name}: {s:.2f} bits" for name, s in zip(look.names, surprise)]
    st.html(charts.coloured(look.names, charts.by_strength(surprise / SURPRISED), hints, marked=place))
    if look.as_chat and look.answer < len(look.ids):
        said = surprise[look.answer :]
        st.caption(say("answer_bits", n=len(said), bits=f"{said.sum():.1f}", each=f"{said.mean():.2f}"))
    best = expected.best[place - 1]
    names = charts.labels(look.tokenizer, best)
    drawn = say("with_sampling", t=temperature, p=top_p)
    st.altair_chart(charts.rivals(names, expected.probability[place - 1], expected.drawn[place - 1],
                                  (say("of_model"), drawn)))  # fmt: skip
    other_way(look, place, best, names, temperature, top_p)


def clicked(look: Look, surprise, entropy) -> int:
    """The place that was chosen, on the chart or with the slider."""
    say, key = look.say, "next place"
    chart = charts.strip(look.names, surprise, say("surprise"), np.nan_to_num(entropy), say("entropy"))
    event = st.altair_chart(chart, on_select="rerun", key="strip")
    picked = [point.get("place") for point in event.get("selection", {}).get("pick", [])]
    if picked and picked != st.session_state.get("picked") and 1 <= picked[0] <= len(look.ids):
        st.session_state[key] = picked[0]
    st.session_state["picked"] = picked
    return choose_place(look, key, 1, len(look.ids), min(look.answer, len(look.ids)))


def other_way(look: Look, place: int, best, names, temperature: float, top_p: float) -> None:
    """What the model would have gone on with after another token."""
    say = look.say
    choice, button = st.columns([3, 1], vertical_alignment="bottom")
    chosen = choice.selectbox(say("what_if"), range(len(best)), format_func=lambda i: f"{i + 1}. {names[i]}",
                              key="what if")  # fmt: skip
    if button.button(say("go_on"), key="what if go", width="stretch"):
        params = SamplingParams(max_tokens=48, temperature=temperature, top_p=top_p, seed=0)
        said = what_if(look.engine, look.ids, place, int(best[chosen]), params)
        before = "".join(look.names[look.answer if place >= look.answer else 0 : place])
        with st.container(border=True):
            st.text(f"{before} [{names[chosen]}] {said.text}")
