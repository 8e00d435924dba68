"""Chat: several chats with one model, two checkpoints side by side, or a text that a base model goes on with."""

import streamlit as st

from pages import chat_answer, chat_side, compare
from pages.frame import LASTS, fault, load_rooms
from pages.words import Words

MODES = ("talk", "compare", "continue")


def show(say: Words) -> None:
    mode = st.segmented_control(say("mode"), MODES, default="talk", required=True, format_func=say, key="mode",
                                label_visibility="collapsed", **LASTS)  # fmt: skip
    {"talk": talk, "compare": compare.two, "continue": compare.go_on}[mode](say)


def talk(say: Words) -> None:
    with st.sidebar:
        chat = chosen_chat(say)
    title, messages = st.empty(), chat["messages"]
    if not messages:
        title.title(say("chat_title"))  # before the model is opened, which takes seconds the first time
    load_rooms(say)
    with st.sidebar:
        source, can, settings = chat_side.source_and_settings(say, chat)
    drop_empty(messages)
    asked = st.chat_input(say("ask"), disabled=source is None or can.chats is False, key="ask")
    asked = asked or st.session_state.pop("example", None)
    if asked:
        messages.append({"role": "user", "content": asked})
    if messages:
        title.empty()
    else:
        welcome(say, source, can)
    for place, message in enumerate(messages):
        chat_answer.draw(message, say)
        if message["role"] == "user":
            edit(say, chat, place)
    if source and (asked or st.session_state.pop("again", None) == chat["number"]):
        chat_answer.answer(source, settings, messages, say, chat.pop("earlier", []))
        st.rerun()  # the chat has a name now, and its messages their buttons
    for error in st.session_state.pop("faults", []):
        fault(error, say)
    if messages:
        below(say, chat, settings)


# -------------------------------------------------------------------------------------------------------- several chats
def chosen_chat(say: Words) -> dict:
    """{"number", "messages", "system"} of the chat that is open; the visitor's own, gone with his session."""
    from chat.conversations import title_of

    chats = st.session_state.setdefault("chats", {})
    if not chats:
        new_chat()
    names = {number: f"{number}. {title_of(chat['messages']) or say('new_chat')}" for number, chat in chats.items()}
    numbers = list(reversed(names))
    # Streamlit knows a choice by its name, and a chat gets another one with its first question: the box is a new one
    # then, and the choice is kept here.
    number = st.selectbox(say("chats"), numbers, numbers.index(st.session_state["chat"]), format_func=names.get,
                          key=f"chat of {names}")  # fmt: skip
    st.session_state["chat"] = number
    new, read = st.columns(2)
    new.button(say("new_chat"), key="new", icon=":material/add:", on_click=new_chat, width="stretch")
    with read.popover(say("import"), icon=":material/upload:", width="stretch"):
        file = st.file_uploader(say("import_help"), type=["json"], key=f"file {len(chats)}")
    if file is not None:
        import_chat(file.getvalue())
    return chats[number]


def new_chat(messages=(), system: str = "") -> int:
    """Opens another chat; the others stay."""
    chats = st.session_state["chats"]
    number = max(chats, default=0) + 1
    chats[number] = {"number": number, "messages": list(messages), "system": system}
    st.session_state["chat"] = number
    return number


def import_chat(raw: bytes) -> None:
    from chat.conversations import imported

    try:
        messages, system = imported(raw)
    except ValueError as error:
        st.session_state.setdefault("faults", []).append(error)
        return
    chats = st.session_state["chats"]
    chats[max(chats) + 1] = {"number": max(chats) + 1, "messages": messages, "system": system}
    st.session_state["chat"] = max(chats)
    st.rerun()


def drop_empty(messages: list[dict]) -> None:
    """Removes an answer that was stopped before its first word."""
    if messages and messages[-1].get("stopped") and not messages[-1]["content"]:
        messages.pop()


# ------------------------------------------------------------------------------------------------ questions and answers
def welcome(say: Words, source, can) -> None:
    """An empty chat says what the model can do, and offers questions that it was taught."""
    if source is None:
        return
    st.caption(say("can_base") if can.chats is False else say("can_ask"))
    if can.chats is not False:
        compare.examples(can.examples)


def edit(say: Words, chat: dict, place: int) -> None:
    """A button to say it otherwise: the answer goes into a new chat, and this one stays as it is."""
    with st.popover(say("edit"), icon=":material/edit:", type="tertiary", key=f"edit {chat['number']} {place}"):
        text = st.text_area(say("edit_help"), chat["messages"][place]["content"],
                            key=f"text {chat['number']} {place}")  # fmt: skip
        st.button(say("send"), key=f"send {chat['number']} {place}", on_click=resend, args=(chat, place, text))


def resend(chat: dict, place: int, text: str) -> None:
    from chat.conversations import edited

    if text.strip():
        number = new_chat(edited(chat["messages"], place, text.strip()), chat["system"])
        st.session_state["again"] = number


def again(chat: dict) -> None:
    """Back to the last question, which talk() will answer; the answer so far is kept beside the new one."""
    from chat.conversations import asked_again

    chat["messages"][:], chat["earlier"] = asked_again(chat["messages"])
    st.session_state["again"] = chat["number"]


def below(say: Words, chat: dict, settings) -> None:
    from chat.sources import exported

    with st.container(horizontal=True):
        st.button(say("again"), key="regenerate", icon=":material/refresh:", on_click=again, args=(chat,))
        st.button(say("clear"), key="clear", icon=":material/delete:", on_click=chat["messages"].clear)
        st.download_button(say("export"), exported(chat["messages"], settings.system), "chat.json",
                           "application/json", key="export", on_click="ignore", icon=":material/download:")  # fmt: skip
        if chat["messages"][-1]["role"] == "assistant":
            with st.popover(say("copy"), icon=":material/content_copy:"):
                st.code(chat["messages"][-1]["content"], language=None, wrap_lines=True)
