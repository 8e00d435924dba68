"""Two checkpoints on one question side by side, and a text that a model goes on with."""

import streamlit as st

from pages.chat_answer import REDRAW, remarks
from pages.chat_side import sampling
from pages.frame import LASTS, choose_model, escaped, fault, load_rooms, nothing_trained
from pages.words import Words


def two(say: Words) -> None:
    """What training changed: the same question, the same settings, two models."""
    st.title(say("compare"))
    st.caption(say("compare_help"))
    load_rooms(say)
    from chat import models

    paths = models.found_models("out")
    if not paths:
        nothing_trained(say)
        return
    with st.sidebar:
        chosen = sampling(say, "compare")
    heading, sides = st.empty(), []
    for column, (key, order) in zip(st.columns(2), (("first", paths), ("second", paths[1:] + paths[:1]))):
        with column:
            sides.append((choose_model(say, say(key), key, order), st.empty(), st.empty()))
    question = st.chat_input(say("ask"), key="ask two") or st.session_state.pop("example", None)
    asked = st.session_state.setdefault("two", {})
    if not asked and not question:
        examples(next((can.examples for model, *_ in sides if model for can in model[2:] if can.chats), ()))
    if question:
        asked["question"], asked["answers"] = question, {}
    if not asked:
        return
    heading.text(f"{say('question')}{asked['question']}")
    for model, text, under in sides:
        if model is None:
            continue
        key = (str(model[0]), *chosen.values())
        if key not in asked["answers"]:
            asked["answers"][key] = written(say, model, asked["question"], chosen, text)
        if (answer := asked["answers"][key]) is not None:
            text.text(answer["content"])
            under.caption(" · ".join(remarks(answer, say)))


def examples(questions) -> None:
    """Buttons with questions that a model was taught."""
    with st.container(horizontal=True):
        for n, question in enumerate(questions):
            st.button(escaped(question), key=f"example {n}", on_click=ask, args=(question,))


def ask(question: str) -> None:
    st.session_state["example"] = question


def written(say: Words, model, question: str, chosen: dict, place) -> dict | None:
    """A model's answer, or how a base model goes on with the question, drawn as it comes; None after an error."""
    from chat import sources

    _, engine, can = model
    local, usage = sources.Local(engine), sources.Usage()
    settings = sources.Settings(history=0, **chosen)
    if can.chats is False:
        parts = (("content", text) for text in local.continued(question, settings, usage))
    else:
        parts = local.stream([{"role": "user", "content": question}], settings, usage)
    answer = {"role": "assistant", "content": "", "usage": usage}
    try:
        grow(answer, parts, place)
    except ValueError as error:
        fault(error, say)
        return None
    return answer


def grow(answer: dict, parts, place, before: str = "") -> None:
    import time

    drawn = 0.0
    for kind, part in parts:
        if kind == "call":
            continue
        answer["content"] += part
        if time.monotonic() - drawn > REDRAW:
            drawn = time.monotonic()
            place.text(before + answer["content"] + " ▌")
    place.text(before + answer["content"])


def go_on(say: Words) -> None:
    """A base model continues a text: it was taught no questions and answers."""
    st.title(say("continue"))
    st.caption(say("continue_help"))
    load_rooms(say)
    from chat import models, sources

    paths = sorted(models.found_models("out"), key=lambda path: not models.is_base(path))
    if not paths:
        nothing_trained(say)
        return
    with st.sidebar:
        model = choose_model(say, say("model"), "base", paths)
        chosen = sampling(say, "continue")
    if model is None:
        return
    _, engine, can = model
    with st.container(horizontal=True):
        for n, text in enumerate(can.examples):
            st.button(escaped(text), key=f"beginning {n}", on_click=begin_with, args=(text,))
    text = st.text_area(say("beginning"), key="beginning", height=100, **LASTS)
    if not st.button(say("go_on"), key="go on", type="primary", disabled=not text.strip()):
        return
    usage = sources.Usage()
    answer = {"role": "assistant", "content": "", "usage": usage}
    place, under = st.container(border=True).empty(), st.empty()
    try:
        pieces = sources.Local(engine).continued(text, sources.Settings(**chosen), usage)
        grow(answer, (("content", piece) for piece in pieces), place, before=text)
    except ValueError as error:
        fault(error, say)
        return
    under.caption(" · ".join(remarks(answer, say)))


def begin_with(text: str) -> None:
    st.session_state["beginning"] = text
