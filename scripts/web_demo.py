"""A chat page in the browser, for the models in out/ or for any server that speaks OpenAI's API.

    streamlit run scripts/web_demo.py          then open http://127.0.0.1:8501

Streamlit runs this file from top to bottom whenever somebody uses a control of the page. What must last is kept in
st.session_state. So the stop button needs no code of its own: pressing it starts the file again, which ends the run
that was generating, between two pieces of the answer. What had come by then is in the chat already.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import streamlit as st

from chat import demo_tools, sources
from common.flags import Parser
from inference import open_model
from model.weights_file import all_weights

REDRAW = 0.05  # seconds between two drawings of a growing answer
ROUNDS = 4  # answers in a row that may call tools

WORDS = {
    "中文": {
        "title": "MiniMind 聊天", "source": "模型来源", "here": "本机 out/", "api": "API 地址", "model": "模型",
        "address": "地址（OpenAI 兼容）", "key": "密钥", "system": "系统提示", "history": "记住的对话轮数",
        "thinking": "思考", "free": "由模型决定", "on": "开", "off": "关", "tools": "工具", "calculator": "计算器",
        "clock": "时钟", "none": "不用", "max_tokens": "最多生成的 token 数", "temperature": "温度（0：贪心）",
        "repetition_penalty": "重复惩罚", "seed": "随机种子（-1：每次不同）", "ask": "说点什么……", "stop": "停止",
        "sampling": "采样", "again": "重新回答", "clear": "清空", "export": "导出 JSON", "thought": "思考过程",
        "call": "调用工具", "stopped": "（已停止）", "loading": "正在加载模型……",
        "rounds": "模型一直在调用工具，到此为止。",
        "untrained": "out/ 里还没有聊天模型。先训练一个：`make demo`（几分钟，自带样例数据）或 `python 3-full_sft.py`；"
                     "也可以在左侧选择“API 地址”。",
        "unserved": "左侧的地址没有应答。本项目的服务这样启动：`python scripts/serve_openai_api.py`",
    },
    "English": {
        "title": "MiniMind chat", "source": "Model from", "here": "out/, here", "api": "an API address",
        "model": "Model", "address": "Address (OpenAI-compatible)", "key": "Key", "system": "System prompt",
        "history": "Exchanges remembered", "thinking": "Thinking", "free": "as the model likes", "on": "on",
        "off": "off", "tools": "Tools", "calculator": "calculator", "clock": "clock", "none": "none",
        "sampling": "Sampling", "max_tokens": "Tokens at most", "temperature": "Temperature (0: greedy)",
        "repetition_penalty": "Repetition penalty", "seed": "Seed (-1: a new one each time)",
        "ask": "Say something …", "stop": "Stop", "again": "Regenerate", "clear": "Clear", "export": "Export JSON",
        "thought": "Thinking", "call": "Tool call", "stopped": "(stopped)", "loading": "Loading the model …",
        "rounds": "The model keeps calling tools; that is enough.",
        "untrained": "There is no chat model in out/ yet. Train one first: `make demo` (minutes, on the sample that "
                     "comes with the project) or `python 3-full_sft.py`; or choose “an API address” on the left.",
        "unserved": "Nobody answers at the address on the left. This project's server is started by "
                    "`python scripts/serve_openai_api.py`",
    },
}  # fmt: skip


def main():
    st.set_page_config("MiniMind", page_icon="💬")
    messages = st.session_state.setdefault("messages", [])
    with st.sidebar:
        words, source, settings = sidebar()
    st.title(words["title"])
    drop_empty(messages)
    for message in messages:
        draw(message, words)
    asked = st.chat_input(words["ask"], disabled=source is None)
    if asked:
        messages.append({"role": "user", "content": asked})
        draw(messages[-1], words)
    if source and (asked or st.session_state.pop("again", False)):
        answer(source, settings, messages, words)
    if messages:
        buttons(messages, settings, words)


# ----------------------------------------------------------------------------------------------------------- sidebar
def sidebar():
    """-> the words of the chosen language, a source or None, sources.Settings."""
    chinese = (st.context.locale or "zh").startswith("zh")
    words = WORDS[st.radio("语言 / Language", list(WORDS), 0 if chinese else 1, horizontal=True, key="language")]
    place = st.radio(words["source"], ("here", "api"), format_func=words.get, horizontal=True, key="source")
    source = local_source(words) if place == "here" else remote_source(words)
    system = st.text_area(words["system"], key="system", height=80)
    history = st.slider(words["history"], 0, 20, 4, key="history")
    thinking = st.radio(words["thinking"], ("free", "on", "off"), format_func=words.get, horizontal=True,
                        key="thinking")  # fmt: skip
    names = st.multiselect(words["tools"], ("calculator", "clock"), format_func=words.get, key="tools",
                           placeholder=words["none"])  # fmt: skip
    with st.expander(words["sampling"]):
        sampling = {
            "max_tokens": st.slider(words["max_tokens"], 16, 4096, 512, 16, key="max_tokens"),
            "temperature": st.slider(words["temperature"], 0.0, 2.0, 0.85, 0.05, key="temperature"),
            "top_p": st.slider("top_p", 0.05, 1.0, 0.85, 0.05, key="top_p"),
            "top_k": st.slider("top_k", 0, 100, 0, key="top_k"),
            "repetition_penalty": st.slider(words["repetition_penalty"], 1.0, 2.0, 1.0, 0.05, key="penalty"),
        }
        seed = st.number_input(words["seed"], -1, 2**31 - 1, -1, key="seed")
    tools = tuple(tool for tool in demo_tools.SIGNATURES if tool["function"]["name"] in names)
    think = {"free": None, "on": True, "off": False}[thinking]
    return words, source, sources.Settings(system, history, think, tools, seed=None if seed < 0 else seed, **sampling)


def local_source(words):
    found = [path for path in all_weights("out") if not path.name.startswith("pretrain_")]
    if not found:
        st.warning(words["untrained"])
        return None
    path = st.selectbox(words["model"], found, format_func=str, key="weight")
    try:
        with st.spinner(words["loading"]):
            return sources.Local(engine_of(path, path.stat().st_mtime_ns))
    except (ValueError, OSError) as error:
        st.error(str(error))
        return None


@st.cache_resource(max_entries=2, show_spinner=False)
def engine_of(path: Path, changed: int):
    """All visitors share an engine. changed: when the file was written, so that a newer file is loaded again."""
    parser = Parser()
    open_model.add_model_flags(parser)
    return open_model.open_engine(parser.parse_args([]), path)[0]


def remote_source(words):
    address = st.text_input(words["address"], "http://127.0.0.1:8998/v1", key="address")
    key = st.text_input(words["key"], type="password", key="api_key")
    try:
        names = model_names(address, key)
        return sources.Remote(address, key, st.selectbox(words["model"], names, key="remote_model")) if names else None
    except ValueError as error:
        st.error(str(error))
        st.info(words["unserved"])
        return None


@st.cache_data(ttl=60, show_spinner=False)
def model_names(address: str, key: str) -> list[str]:
    return sources.Remote(address, key).models()


# -------------------------------------------------------------------------------------------------------------- chat
def drop_empty(messages: list[dict]) -> None:
    """Removes an answer that was stopped before its first word."""
    if messages and messages[-1].get("stopped") and not messages[-1]["content"]:
        messages.pop()


def draw(message: dict, words) -> None:
    if message["role"] == "tool":
        st.code(message["content"], language=None)
        return
    with st.chat_message(message["role"]):
        if message.get("reasoning_content"):
            st.expander(words["thought"]).markdown(message["reasoning_content"])
        st.markdown(message["content"])
        draw_calls(message, words)
        if message.get("stopped"):
            st.caption(words["stopped"])


def draw_calls(message: dict, words) -> None:
    for call in message.get("tool_calls", []):
        st.caption(f"{words['call']}: {call['function']['name']}")
        st.code(call["function"]["arguments"], language="json")


def answer(source, settings, messages: list[dict], words) -> None:
    """Answers, runs the tools that were called, and answers again, up to ROUNDS times."""
    for _ in range(ROUNDS):
        # It counts as stopped until it is complete: after a press of the stop button no line of this run is executed.
        message = {"role": "assistant", "content": "", "stopped": True}
        asked = list(messages)
        messages.append(message)
        with st.chat_message("assistant"):
            fold, text, stop = st.empty(), st.empty(), st.empty()
            stop.button(words["stop"], key=f"stop {len(messages)}", icon=":material/stop_circle:")
            try:
                results = grow(messages, source.stream(asked, settings), fold, text, words)
            except ValueError as error:
                messages.remove(message)
                stop.empty()
                st.error(str(error))
                return
            stop.empty()
            draw_calls(message, words)
        for result in results:
            draw(result, words)
        if not results:
            return
    st.warning(words["rounds"])


def grow(messages: list[dict], pairs, fold, text, words) -> list[dict]:
    """Draws the last message as it comes, runs the tools it calls, appends their results and returns them.

    Text goes into `messages` before it is drawn: Streamlit ends a stopped run in a call that draws.
    """
    message, thought, calls, drawn = messages[-1], None, [], 0.0
    for kind, part in pairs:
        if kind == "call":
            calls.append(sources.as_message(part))
            continue
        key = "reasoning_content" if kind == "reasoning" else "content"
        message[key] = message.get(key, "") + part
        if kind == "reasoning" and thought is None:
            thought = fold.expander(words["thought"]).empty()
        if time.monotonic() - drawn > REDRAW:  # drawing costs more than a token of a small model
            drawn = time.monotonic()
            (thought if kind == "reasoning" else text).markdown(message[key] + " ▌")
    del message["stopped"]
    results = []
    if calls:
        message["tool_calls"] = calls
        for call in calls:
            said = demo_tools.run(call["function"]["name"], call["function"]["arguments"])
            results.append({"role": "tool", "content": said, "tool_call_id": call["id"]})
    messages += results
    if thought:
        thought.markdown(message["reasoning_content"])
    text.markdown(message["content"])
    return results


def buttons(messages: list[dict], settings, words) -> None:
    again, clear, export = st.columns(3)
    again.button(words["again"], key="regenerate", icon=":material/refresh:", on_click=ask_again, args=(messages,))
    clear.button(words["clear"], key="clear", icon=":material/delete:", on_click=messages.clear)
    export.download_button(words["export"], sources.exported(messages, settings.system), "chat.json",
                           "application/json", key="export", on_click="ignore", icon=":material/download:")  # fmt: skip


def ask_again(messages: list[dict]) -> None:
    """Back to the last question, which main() will answer."""
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    st.session_state["again"] = bool(messages)


if __name__ == "__main__":
    main()
