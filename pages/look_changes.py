"""What training changed: two checkpoints on one text, an adapter's size by layer, a preference pair token by token."""

import numpy as np
import streamlit as st

from common.errors import UserError
from data.reading import check_file, raw_rows
from data.row_shapes import as_pair, parse_record
from inspection import changes
from inspection.next_token import next_tokens
from inspection.tokens import own_model
from inspection.trace import trace
from pages import charts
from pages.frame import LASTS, choose_model
from pages.look_text import Look, choose_place, paint

SAMPLE = "dataset/sample/dpo_heldout.jsonl"
PARTED = 4  # nats of KL divergence at which a token has its full colour


def two(look: Look) -> None:
    """Both models read the same tokens; what they expect next is shown side by side."""
    say = look.say
    others = [path for path in look.paths if path != look.path]
    if not others:
        st.info(say("one_model"))
        return
    other = choose_model(say, say("second"), "look_second", others)
    if other is None:
        return
    _, second, _ = other
    if note := changes.tokenizers_differ(look.engine, second):
        raise ValueError(note)
    theirs = trace(own_model(second), look.ids)
    apart = changes.divergence(look.traced, theirs)
    place = choose_place(look, "two place", 1, len(look.ids), min(look.answer, len(look.ids)))
    # Row t is about the token after token t, which is where the models part.
    paint("two place", charts.by_strength(apart / PARTED, 30), [f"{x:.2f} nats" for x in apart])
    for column, name, traced in zip(st.columns(2), (look.path, other[0]), (look.traced, theirs)):
        expected = next_tokens(traced, 8)
        names = charts.labels(look.tokenizer, expected.best[place - 1])
        with column:
            st.text(str(name))
            st.altair_chart(charts.columns(names, expected.probability[place - 1], say("probability")))
    st.altair_chart(charts.strip([*look.names, "…"], [np.nan, *apart], say("divergence")))


def lora(look: Look) -> None:
    say = look.say
    adapters = [path for path in look.paths if path.parent.name == "lora"]
    if not adapters:
        st.info(say("no_adapter"))
        return
    path = st.selectbox(say("adapter"), adapters, format_func=str, key="adapter", **LASTS)
    found = changes.adapter_changes(changes.open_adapter(path))
    layers = sorted({change.layer for change in found})
    kinds = list(dict.fromkeys(change.projection for change in found))
    values = np.zeros((len(layers), len(kinds)))
    for change in found:
        values[layers.index(change.layer), kinds.index(change.projection)] = change.relative
    names = [say("outside") if layer < 0 else say("after_layer", n=layer + 1) for layer in layers]
    texts = [[f"{value:.1%}" for value in row] for row in values]
    st.altair_chart(charts.heat(values, names, kinds, (say("layer"), say("projection"), say("relative")), texts))
    st.caption(say("relative_help"))


def dpo(look: Look) -> None:
    """A pair of answers under the chosen model and the one it is compared with."""
    say = look.say
    others = [path for path in look.paths if path != look.path]
    if not others:
        st.info(say("one_model"))
        return
    reference = choose_model(say, say("reference"), "reference", others)
    texts = example_pair()
    question = st.text_input(say("pair_question"), texts[0], key="pair question", **LASTS)
    chosen = st.text_input(say("chosen"), texts[1], key="chosen", **LASTS)
    rejected = st.text_input(say("rejected"), texts[2], key="rejected", **LASTS)
    if reference is None or not all(text.strip() for text in (question, chosen, rejected)):
        st.caption(say("pair_help"))
        return
    asked = {"role": "user", "content": question}
    pair = ([asked, {"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    found = changes.preference(look.engine, reference[1], *pair)
    st.metric(say("margin"), f"{found.margin:+.2f}")
    for name, answer in (("chosen", found.chosen), ("rejected", found.rejected)):
        gained = answer.policy - answer.reference
        names = charts.labels(look.tokenizer, answer.ids)
        st.markdown(f"**{say(name)}**: {answer.gained:+.2f}")
        colours = [charts.by_strength([abs(g) / 3], 130 if g > 0 else 0)[0] for g in gained]
        st.html(charts.coloured(names, colours, [f"{g:+.2f}" for g in gained]))
    st.caption(say("gained_help"))


def example_pair() -> tuple[str, str, str]:
    """A question, the chosen and the rejected answer of the embedded sample, held out; "" where it is not there."""
    try:
        pair = as_pair(parse_record(next(raw_rows(check_file(SAMPLE)))[1]))
    except UserError:
        return "", "", ""
    return pair["chosen"][0]["content"], *(pair[side][-1]["content"] for side in ("chosen", "rejected"))
