"""Tokens as coloured pieces with their bytes and merges; the next token's rivals at every place, and "what if"."""

import math

import numpy as np
import streamlit as st

from inference.sampling import SamplingParams
from inspection.next_token import next_tokens, what_if
from inspection.tokens import merges_of_token, pieces, shown
from pages import charts
from pages.frame import LASTS, escaped
from pages.look_text import Look, choose_place, paint

BITS = 1 / math.log(2)
GO_ON = 48  # tokens at most that follow another one
SURPRISED = 8  # bits at which a token has its full colour: expected with 1 in 256


def tokens(look: Look) -> None:
    say, found = look.say, pieces(look.tokenizer, look.ids)
    st.markdown(say("n_tokens", n=len(found), bytes=sum(len(piece.bytes) for piece in found if not piece.special)))
    place = choose_place(look, "token place", 0, len(found) - 1, min(len(found) - 1, look.answer))
    hints = [f"id {piece.id} · {piece.bytes.hex(' ')}" for piece in found]
    paint("token place", charts.by_turns([piece.group for piece in found]), hints)
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
        {say("merge"): [f"{part(step.left)} + {part(step.right)}" for step in steps],
         say("rank"): [step.rank for step in steps],
         say("after"): [" · ".join(map(part, step.after)) for step in steps]},
        hide_index=True,
    )  # fmt: skip


def part(raw: bytes) -> str:
    return shown(raw).translate(charts.VISIBLE)


def next_token(look: Look) -> None:
    say = look.say
    with st.sidebar:
        n = st.slider(say("n_best"), 5, 20, 10, key="n_best", **LASTS)
        temperature = st.slider(say("temperature"), 0.0, 2.0, 1.0, 0.05, key="look temperature", **LASTS)
        top_p = st.slider("top_p", 0.05, 1.0, 1.0, 0.05, key="look top_p", **LASTS)
    params = SamplingParams(max_tokens=GO_ON, temperature=temperature, top_p=top_p, seed=0)
    expected = next_tokens(look.traced, n, params)
    surprise = np.concatenate([[np.nan], -expected.came[:-1] * BITS])  # of each token, given those before it
    entropy = np.concatenate([[np.nan], expected.entropy[:-1] * BITS])
    place = choose_place(look, "next place", 1, len(look.ids), min(look.answer, len(look.ids)))
    paint("next place", charts.by_strength(surprise[1:] / SURPRISED), [f"{s:.2f} bits" for s in surprise[1:]])
    best = expected.best[place - 1]
    names = charts.labels(look.tokenizer, best)
    probability = expected.probability[place - 1]
    drawn = say("with_sampling", t=temperature, p=top_p)
    st.altair_chart(charts.rivals(names, probability, expected.drawn[place - 1], (say("of_model"), drawn)))
    other_way(look, place, best, [f"{name} {share(p)}" for name, p in zip(names, probability)], params)
    st.markdown(say("along"))
    st.altair_chart(charts.strip(look.names, surprise, say("surprise"), np.nan_to_num(entropy), say("entropy")))
    if look.as_chat and look.answer < len(look.ids):
        said = surprise[look.answer :]
        st.caption(say("answer_bits", n=len(said), bits=f"{said.sum():.1f}", each=f"{said.mean():.2f}"))


def share(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.001 else "<0.1%"


def other_way(look: Look, place: int, best, names: list[str], params: SamplingParams) -> None:
    """What the model goes on with after another token, at a click on it."""
    chosen = st.pills(look.say("what_if"), range(len(best)), format_func=lambda i: charts.unlike(escaped(names[i]), i),
                      key=f"what if {place}")  # fmt: skip
    if chosen is None:
        return
    said = what_if(look.engine, look.ids, place, int(best[chosen]), params)
    before = "".join(look.names[look.answer if place >= look.answer else 0 : place])
    with st.container(border=True):
        st.text(f"{before}【{charts.labels(look.tokenizer, best[chosen : chosen + 1])[0]}】{said.text}")
