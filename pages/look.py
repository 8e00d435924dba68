"""Look inside: one text, one checkpoint, and what happens in it. What is drawn is computed in inspection/."""

import streamlit as st

from pages import look_changes, look_layers, look_space, look_tokens
from pages.frame import LASTS, choose_model, fault, nothing_trained
from pages.look_text import Look, read_text
from pages.words import Words

VIEWS = {
    "v_tokens": look_tokens.tokens, "v_next": look_tokens.next_token, "v_attention": look_layers.attention,
    "v_layers": look_layers.layers, "v_experts": look_layers.experts, "v_space": look_space.space,
    "v_two": look_changes.two, "v_lora": look_changes.lora, "v_dpo": look_changes.dpo,
}  # fmt: skip
WITHOUT_TEXT = ("v_space", "v_lora", "v_dpo")


def show(say: Words) -> None:
    from chat import models

    st.title(say("look_title"))
    st.caption(say("look_help"))
    paths = models.found_models("out")
    if not paths:
        nothing_trained(say)
        return
    with st.sidebar:
        model = choose_model(say, say("model"), "look_model", paths)
    if model is None:
        return
    view = st.segmented_control(say("view"), VIEWS, default="v_tokens", required=True, format_func=say, key="view",
                                label_visibility="collapsed", **LASTS)  # fmt: skip
    st.markdown(say(f"{view}_help"))  # the catalogue's own words
    path, engine, can = model
    look = Look(say, path, engine, can, paths)
    try:
        if view in WITHOUT_TEXT or read_text(look):
            VIEWS[view](look)
    except Exception as error:
        from common.errors import UserError

        if not isinstance(error, UserError | ValueError):
            raise
        fault(error, say)
