"""The chat's settings: which model, and what it is asked for. What the model was not taught is not offered."""

import streamlit as st

from pages.frame import LASTS, choose_model, fault, nothing_trained
from pages.words import Words

TOOLS = ("calculator", "clock")
SCHEMA = """{"type": "object",
 "properties": {"answer": {"type": "string", "maxLength": 20},
                "sure": {"type": "boolean"}},
 "required": ["answer", "sure"]}"""
FORMS = {"choice": "是\n不是", "schema": SCHEMA}  # to begin with


def source_and_settings(say: Words, chat: dict):
    """-> (source or None, abilities, sources.Settings)."""
    from chat.abilities import Abilities

    place = st.radio(say("source"), ("here", "api"), format_func=say, horizontal=True, key="source", **LASTS)
    found = local_source(say) if place == "here" else remote_source(say)
    name, source, can = found or ("", None, Abilities())
    if st.session_state.get("settings for") != name:  # another model: what its record says is best for it
        st.session_state["settings for"], st.session_state["history"] = name, can.history
    return source, can, settings(say, can, chat)


def local_source(say: Words):
    from chat import models, sources

    paths = models.found_models("out")
    if not paths:
        nothing_trained(say)
        return None
    chosen = choose_model(say, say("model"), "weight", paths)
    if chosen is None:
        return None
    path, engine, can = chosen
    return str(path), sources.Local(engine), can


def remote_source(say: Words):
    from chat import sources
    from chat.abilities import Abilities

    address = st.text_input(say("address"), "http://127.0.0.1:8998/v1", key="address", **LASTS)
    key = st.text_input(say("key"), type="password", key="api_key", **LASTS)
    try:
        names = model_names(address, key)
        if not names:
            return None
        name = st.selectbox(say("model"), names, key="remote_model", **LASTS)
        return address + name, sources.Remote(address, key, name), Abilities()
    except ValueError as error:
        fault(error, say)
        return None


@st.cache_data(ttl=60, show_spinner=False)
def model_names(address: str, key: str) -> list[str]:
    from chat import sources

    return sources.Remote(address, key).models()


def settings(say: Words, can, chat: dict):
    from chat import demo_tools, sources

    system = st.text_area(say("system"), chat["system"], key=f"system {chat['number']}", height=80, **LASTS)
    chat["system"] = system
    history = st.slider(say("history"), 0, 20, key="history", disabled=can.several_turns is False, **LASTS)
    if can.several_turns is False and can.chats is not False:
        history = 0
        st.caption(say("no_turns"))
    thinking = st.radio(say("thinking"), ("free", "on", "off"), format_func=say, horizontal=True, key="thinking",
                        disabled=can.thinking is False, **LASTS)  # fmt: skip
    if can.thinking is False:
        thinking = "free"
        st.caption(say("no_thinking"))
    names = st.multiselect(say("tools"), TOOLS, format_func=say, key="tools", placeholder=say("none"),
                           disabled=can.tools is False, **LASTS)  # fmt: skip
    if can.tools is False:
        names = []
        st.caption(say("no_tools"))
    with st.expander(say("form")):
        wanted = form(say)
    with st.expander(say("sampling")):
        chosen = sampling(say, "chat", can.sampling)
    tools = tuple(tool for tool in demo_tools.SIGNATURES if tool["function"]["name"] in names)
    think = {"free": None, "on": True, "off": False}[thinking]
    return sources.Settings(system, history, think, tools, form=wanted, **chosen)


def form(say: Words):
    """The grammar that answers must match, None for free text."""
    from chat.forms import KINDS, form_of

    kind = st.radio(
        say("form_kind"), ("any", *KINDS), format_func=lambda name: say(f"form_{name}"), key="form", **LASTS
    )
    if kind == "any":
        return None
    text = st.text_area(say(f"form_{kind}_help"), FORMS[kind], key=f"form {kind}", height=140, **LASTS)
    try:
        with st.spinner(say("loading")):
            return form_of(kind, text)
    except ValueError as error:
        fault(error, say)
        return None


def sampling(say: Words, place: str, begin: tuple[float, float] = (0.85, 0.85)) -> dict:
    """Controls of the sampling -> keyword arguments of sources.Settings. begin: temperature and top_p before anything
    is chosen; models with other ones have controls of their own."""
    warmth, top_p = begin
    seed = st.number_input(say("seed"), -1, 2**31 - 1, -1, key=f"{place} seed", **LASTS)
    return {
        "max_tokens": st.slider(say("max_tokens"), 16, 4096, 512, 16, key=f"{place} max_tokens", **LASTS),
        "temperature": st.slider(say("temperature"), 0.0, 2.0, warmth, 0.05, key=f"{place} temperature {warmth}",
                                 **LASTS),
        "top_p": st.slider("top_p", 0.05, 1.0, top_p, 0.05, key=f"{place} top_p {top_p}", **LASTS),
        "top_k": st.slider("top_k", 0, 100, 0, key=f"{place} top_k", **LASTS),
        "repetition_penalty": st.slider(say("repetition_penalty"), 1.0, 2.0, 1.0, 0.05, key=f"{place} penalty",
                                        **LASTS),
        "seed": None if seed < 0 else seed,
    }  # fmt: skip
