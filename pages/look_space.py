"""The embedding as a space: a token's neighbours, and a flat map of a few hundred tokens."""

import streamlit as st

from inspection.embeddings import embedding_map, neighbours
from inspection.tokens import own_model, visible_tokens
from model.tokenizer import encode_text
from pages import charts
from pages.frame import LASTS, escaped
from pages.look_text import Look

NEAR = 12  # neighbours shown


def space(look: Look) -> None:
    say, tokenizer = look.say, look.tokenizer
    model = own_model(look.engine)
    word = st.text_input(say("word"), "春" if say.language == "zh" else "one", key="word", **LASTS)
    if word.strip():
        ids = encode_text(tokenizer, word.strip())
        names = charts.labels(tokenizer, ids)
        place = st.radio(say("token"), range(len(ids)), format_func=lambda i: escaped(f"{names[i]} ({ids[i]})"),
                         horizontal=True, key=f"token of {word}") if len(ids) > 1 else 0  # fmt: skip
        whole = set(visible_tokens(tokenizer, len(tokenizer)))
        near = [one for one in neighbours(model, ids[place], len(tokenizer)) if one.token in whole][:NEAR]
        st.dataframe({say("token"): charts.labels(tokenizer, [one.token for one in near]),
                      "id": [one.token for one in near], say("cosine"): [round(one.cosine, 3) for one in near]},
                     hide_index=True)  # fmt: skip
        st.caption(say("near_help"))
    n = st.slider(say("map_tokens"), 50, 500, 250, 50, key="map tokens", **LASTS)
    first = st.slider(say("map_first"), 0, max(1, len(tokenizer) - n), min(300, len(tokenizer) // 4), key="map first")
    found = embedding_map(model, visible_tokens(tokenizer, n, first))
    st.altair_chart(charts.token_map(charts.labels(tokenizer, found.tokens), found.points))
    st.caption(say("explained", share=f"{found.explained:.0%}"))
