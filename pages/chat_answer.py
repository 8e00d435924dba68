"""One answer on the page: drawn while it comes, stopped, with its tools, its thinking, its counts.

The stop button needs no code of its own: pressing it starts the page again, which ends the run that was generating,
between two pieces of the answer. What had come by then is in the chat already.

What a model writes is drawn as plain text. Markdown in it could load a picture from anywhere.
"""

import time

import streamlit as st

from pages.frame import escaped
from pages.words import Words

REDRAW = 0.05  # seconds between two drawings of a growing answer
ROUNDS = 4  # answers in a row that may call tools


def draw(message: dict, say: Words) -> None:
    if message["role"] == "tool":
        st.code(message["content"], language=None)
        return
    with st.chat_message(message["role"]):
        if message.get("reasoning_content"):
            st.expander(say("thought")).text(message["reasoning_content"])
        earlier = message.get("earlier", [])
        if earlier:
            now, before = st.columns(2)
            now.text(message["content"])
            with before.container(border=True):
                st.caption(say("earlier"))
                for text in reversed(earlier):
                    st.text(text)
        else:
            st.text(message["content"])
        draw_calls(message, say)
        if message["role"] == "assistant":
            st.caption(" · ".join(remarks(message, say)))


def remarks(message: dict, say: Words) -> list[str]:
    """What stands in small letters under an answer."""
    usage, found = message.get("usage"), []
    if message.get("stopped"):
        found.append(say("stopped"))
    elif not message["content"] and not message.get("tool_calls"):
        found.append(say("empty_thinking" if message.get("reasoning_content") else "empty"))
    if usage is None:
        return found
    if usage.ended == "length":
        found.append(say("cut"))
    if usage.broken:
        found.append(say("broken", n=usage.broken))
    if usage.written is not None:
        found.append(say("counts", read=usage.read, written=usage.written))
    if usage.per_second:
        found.append(say("speed", n=f"{usage.per_second:.0f}"))
    return found


def draw_calls(message: dict, say: Words) -> None:
    for call in message.get("tool_calls", []):
        st.caption(f"{say('call')}: {escaped(call['function']['name'])}")
        st.code(call["function"]["arguments"], language="json")


def answer(source, settings, messages: list[dict], say: Words, earlier=()) -> None:
    """Answers, runs the tools that were called, and answers again, up to ROUNDS times. Errors go to st.session_state.

    earlier: answers that were given to this question before.
    """
    from chat.sources import Usage

    for _ in range(ROUNDS):
        # It counts as stopped until it is complete: after a press of the stop button no line of this run is executed.
        message = {"role": "assistant", "content": "", "stopped": True, "usage": Usage()}
        message |= {"earlier": list(earlier)} if earlier else {}
        asked = list(messages)
        messages.append(message)
        with st.chat_message("assistant"):
            fold, text, stop = st.empty(), st.empty(), st.empty()
            stop.button(say("stop"), key=f"stop {len(messages)}", icon=":material/stop_circle:")
            try:
                results = grow(messages, source.stream(asked, settings, message["usage"]), fold, text, say)
            except ValueError as error:
                messages.remove(message)
                st.session_state.setdefault("faults", []).append(error)
                return
            stop.empty()
            draw_calls(message, say)
        for result in results:
            draw(result, say)
        if not results:
            return
    st.session_state.setdefault("faults", []).append(ValueError(say("rounds")))


def grow(messages: list[dict], pairs, fold, text, say: Words) -> list[dict]:
    """Draws the last message as it comes, runs the tools it calls, appends their results and returns them.

    Text goes into `messages` before it is drawn: Streamlit ends a stopped run in a call that draws.
    """
    from chat import demo_tools, sources

    message, thought, calls, drawn = messages[-1], None, [], 0.0
    for kind, part in pairs:
        if kind == "call":
            calls.append(sources.as_message(part))
            continue
        key = "reasoning_content" if kind == "reasoning" else "content"
        message[key] = message.get(key, "") + part
        if kind == "reasoning" and thought is None:
            thought = fold.expander(say("thought")).empty()
        if time.monotonic() - drawn > REDRAW:  # drawing costs more than a token of a small model
            drawn = time.monotonic()
            (thought if kind == "reasoning" else text).text(message[key] + " ▌")
    del message["stopped"]
    results = []
    if calls:
        message["tool_calls"] = calls
        for call in calls:
            said = demo_tools.run(call["function"]["name"], call["function"]["arguments"])
            results.append({"role": "tool", "content": said, "tool_call_id": call["id"]})
    messages += results
    if thought:
        thought.text(message["reasoning_content"])
    text.text(message["content"])
    return results
