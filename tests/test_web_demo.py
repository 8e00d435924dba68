"""The chat page: its tools against hostile calls, its sources, the page itself, and the page in a real browser."""

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stage
import torch
from page import clean, open_page, said
from stub_api import StubApi

from chat import demo_tools, sources
from chat.demo_tools import calculate
from data.row_shapes import as_chat
from inference.engine import Engine
from inference.grammar import Grammar
from inference.stream_text import ToolCall
from model.LMConfig import LMConfig
from model.tokenizer import encode_text, load_tokenizer, render
from model.weights import load_model, save_weights
from pages.look import VIEWS
from pages.words import Words

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "scripts" / "web_demo.py"
ASK = [{"role": "user", "content": "你好"}]


# ------------------------------------------------------------------------------------------------------------- tools
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7), ("(1+2)*3", 9), ("2^10", 1024), ("-3**2", -9), ("7//2", 3), ("7%4", 3), ("1/8", 0.125),
        ("3×（4＋5）÷9", 3), ("2**-3", 0.125), ("(" * 80 + "1" + ")" * 80, 1), ("2**1000", 2**1000),
    ],
)  # fmt: skip
def test_calculator_by_hand(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9", "9**999999999", "(10**1000)*(10**1000)", "1e308*10", "1e400", "5.0**1e9", "(-8)**0.5", "1/0",
        "2**4096", "9" * 201, "(" * 100_000, "-" * 150 + "x", "1 if 1 else 2", "[1][0]", "'a'*9", "True", "1j",
        "__import__('os').system('true')", "(1).__class__", "abs(1)", "x:=1", "lambda: 1", "f'{1}'", "1;2", "", "\0",
        "0**-1", "(" * 150, "1<<99", "1&1", "~1", "...", "None",
    ],
)  # fmt: skip
def test_calculator_refuses_in_a_sentence(expression):
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"\w"):
        calculate(expression)
    assert time.process_time() - begin < 0.5


def test_calculator_equals_python_on_random_expressions():
    import random

    rng = random.Random(0)
    for _ in range(300):
        text = str(rng.randint(0, 20))
        for _ in range(rng.randint(1, 5)):
            text = f"({text}) {rng.choice(['+', '-', '*', '//', '%', '/'])} {rng.randint(1, 9)}"
        assert math.isclose(calculate(text), eval(text))  # the test's own text


def test_tools_answer_whatever_they_are_sent():
    assert demo_tools.run("calculator", '{"expression": "6*7"}') == "42"
    assert demo_tools.run("clock", '{"zone": "+8"}').endswith("+0800") and demo_tools.run("clock", "")
    calls = [("calculator", text) for text in ("[1]", "{", "[" * 100_000)] + [("rm", "{}")]
    for name, arguments in calls + [("clock", json.dumps({"zone": zone})) for zone in ("99", "1e300", "nan", "east")]:
        assert demo_tools.run(name, arguments).startswith("error: ")


def test_the_names_a_model_is_told_are_the_names_that_run():
    for tool in demo_tools.SIGNATURES:
        assert not demo_tools.run(tool["function"]["name"], '{"expression": "1"}').startswith("error")


# ----------------------------------------------------------------------------------------------------------- sources
class Scripted(torch.nn.Module):
    """Says one text after a prompt of known length, whatever the prompt is, and then ends."""

    def __init__(self, tokenizer, text, prompt_tokens):
        super().__init__()
        self.config = LMConfig(dim=16, n_layers=1, n_heads=1, n_kv_heads=1, max_seq_len=2048)
        self.weight, self.device = torch.nn.Parameter(torch.zeros(1)), torch.device("cpu")
        self.ids, self.prompt = [*tokenizer.encode(text), tokenizer.eos_token_id], prompt_tokens

    def forward(self, input_ids, position_ids, logits_to_keep, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, positions in zip(logits, position_ids.tolist(), strict=True):
            for line, position in zip(row, positions, strict=True):
                line[self.ids[min(max(position + 1 - self.prompt, 0), len(self.ids) - 1)]] = 10
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def said_by(text, **settings):
    """The pairs of Local.stream for a model that says `text`, neighbours of one kind joined."""
    tokenizer = load_tokenizer()
    settings = sources.Settings(temperature=0, **settings)
    prompt, _ = render(tokenizer, ASK, list(settings.tools), True, settings.thinking)
    source = sources.Local(Engine(Scripted(tokenizer, text, len(prompt)), tokenizer))
    return joined(source.stream(ASK, settings))


def joined(pairs):
    result = []
    for kind, part in pairs:
        part = (part.name, json.loads(part.arguments)) if kind == "call" else part
        if result and kind != "call" and result[-1][0] == kind:
            part = result.pop()[1] + part
        result.append((kind, part))
    return result


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1<2"}}\n</tool_call>'
TOOLS = tuple(demo_tools.SIGNATURES)


@pytest.mark.parametrize(
    ("text", "settings", "pairs"),
    [
        ("一二三", {}, [("content", "一二三")]),
        ("<think>\n想\n</think>\n\n二", {}, [("reasoning", "想"), ("content", "二")]),
        ("想\n</think>\n\n二", {"thinking": True}, [("reasoning", "想"), ("content", "二")]),
        (f"算：{CALL}", {"tools": TOOLS}, [("content", "算："), ("call", ("calculator", {"expression": "1<2"}))]),
        (CALL * 2, {"tools": TOOLS}, [("call", ("calculator", {"expression": "1<2"}))] * 2),
        (CALL, {}, [("content", CALL)]),
        ("a <tool_call> b", {"tools": TOOLS}, [("content", "a <tool_call> b")]),
        ("<tool_call>[1]</tool_call>", {"tools": TOOLS}, [("content", "<tool_call>[1]</tool_call>")]),
        ("a < b <tool", {"tools": TOOLS}, [("content", "a < b <tool")]),
    ],
)
def test_what_a_model_here_says_is_told_apart(text, settings, pairs):
    assert said_by(text, **settings) == pairs


def test_history_is_cut_by_the_setting_and_by_the_context():
    chat = [m for i in range(9) for m in ({"role": "user", "content": f"问{i}" * 5}, {"role": "assistant",
            "content": f"答{i}" * 5, "reasoning_content": "想", "stopped": True})] + ASK  # fmt: skip
    sent = sources.visible(chat, sources.Settings(system="简短", history=2))
    assert [m["role"] for m in sent] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert sent[1]["content"] == "问7" * 5 and sent[-1] == ASK[0] and set(sent[2]) == {"role", "content"}
    assert sources.visible(chat, sources.Settings(history=0)) == ASK
    engine = Engine(Scripted(load_tokenizer(), "x", 0), load_tokenizer())
    engine.context = 200
    ids = sources.Local(engine).prompt(chat, sources.Settings(history=9, max_tokens=100))
    assert len(ids) + 100 <= 200 and encode_text(engine.tokenizer, "你好")[0] in ids and len(ids) > 50


def test_an_api_is_asked_and_heard():
    call = sources.as_message(ToolCall("calculator", '{"expression": "1<2"}'))

    def reply(request):
        return {"content": "<think>嗯</think>好", "reasoning_content": None} if "tools" not in request else {
            "reasoning_content": "先算", "content": "算：", "tool_calls": [call]}  # fmt: skip

    with StubApi(reply) as stub:
        source = sources.Remote(stub.address, "secret", "stub")
        assert source.models() == ["stub"]
        assert joined(source.stream(ASK, sources.Settings())) == [("reasoning", "嗯"), ("content", "好")]
        settings = sources.Settings(system="s", tools=TOOLS, top_k=5, thinking=False, seed=3, repetition_penalty=1.1)
        assert joined(source.stream(ASK, settings)) == [
            ("reasoning", "先算"), ("content", "算："), ("call", ("calculator", {"expression": "1<2"}))]  # fmt: skip
        plain, full = stub.requests
        assert "top_k" not in plain and "seed" not in plain and stub.keys == ["Bearer secret"] * 2
        assert (full["top_k"], full["seed"], full["repetition_penalty"]) == (5, 3, 1.1)
        chosen = source.request(ASK, sources.Settings(form=Grammar.choice(["a", "b"])))
        assert chosen["extra_body"] == {"structured_outputs": {"choice": ["a", "b"]}}
        assert full["chat_template_kwargs"] == {"enable_thinking": False, "open_thinking": False} and full[
            "tools"
        ] == list(TOOLS)


@pytest.mark.parametrize(("reply", "message"), [(401, "stub refuses"), ({"content": "abc", "breaks": True}, "broke")])
def test_an_api_that_fails_says_so_in_one_line(reply, message):
    with StubApi(lambda request: reply) as stub, pytest.raises(ValueError, match=message) as caught:
        list(sources.Remote(stub.address, "", "stub").stream(ASK, sources.Settings()))
    assert "\n" not in str(caught.value)


def test_a_web_page_is_no_api():
    with StubApi(lambda request: b"<html>hello</html>") as stub:
        stub.models = b"<html>hello</html>"
        source = sources.Remote(stub.address, "", "stub")
        for asked in (source.models, lambda: list(source.stream(ASK, sources.Settings()))):
            with pytest.raises(ValueError, match="does not answer as OpenAI's API does"):
                asked()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/v1", "no address", "", "http://[", "http://127.0.0.1:99999/v1"]
)
def test_an_address_where_nobody_answers(address):
    with pytest.raises(ValueError, match=re.escape(f"{address}: ")) as caught:
        sources.Remote(address, "").models()
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- page
@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = {"chat max_tokens": 16, "chat seed": 1}
TAUGHT = {"full_sft": {"kind": "chat", "turns": {"1": 0.93, "2": 0.07}, "thinking": 0, "tools": 0,
                       "examples": ["![x](http://127.0.0.1:9/x.png)", "1+1=?"]}}  # fmt: skip


def taught_weights(folder, **record):
    """Weights whose record says what they were taught."""
    path = stage.chat_weights(folder, seed=1)
    model, tokenizer, old = load_model(path)
    save_weights(path, model, tokenizer, old | record)
    return path


def test_a_chat_on_the_page(here):
    stage.chat_weights(here / "out", seed=1)
    stage.chat_weights(here / "out" / "demo", seed=2)
    stage.chat_weights(here / "out", name="pretrain_32.pth")
    app = open_page("chat", "en", **SHORT)
    assert app.title[0].value == "Talk to the model you trained" and len(app.selectbox("weight").options) == 3
    app.chat_input[0].set_value("你好").run()
    (_, asked), (_, answer) = said(app)
    assert asked == "你好" and answer and "▌" not in answer and "tokens read, 16 written" in app.caption[-1].value
    app.button("regenerate").click().run()
    message = app.session_state["chats"][1]["messages"][-1]
    assert message["content"] == answer and message["earlier"] == [answer]  # the same seed
    learned = as_chat(json.loads(sources.exported(app.session_state["chats"][1]["messages"], "s")))
    assert [m["role"] for m in learned] == ["system", "user", "assistant"] and render(load_tokenizer(), learned)
    app.radio("thinking").set_value("off")
    app.session_state["form choice"] = "甲\n乙"
    app.radio("form").set_value("choice").run()
    app.chat_input[0].set_value("甲还是乙？").run()
    assert said(app).pop()[1] in ("甲", "乙")
    app.radio("form").set_value("schema").run()
    app.text_area("form schema").set_value("{").run()
    assert "form" in app.error[0].value
    app.radio("form").set_value("any")
    app.segmented_control("language").set_value("zh").run()
    assert (app.slider("chat max_tokens").value, app.radio("thinking").value) == (16, "off")  # what was set stays set
    assert app.button("clear").label == "清空" and len(said(app)) == 4
    app.button("clear").click().run()
    assert said(app) == []


def test_several_chats_are_kept_and_a_question_is_said_otherwise(here):
    stage.chat_weights(here / "out")
    app = open_page("chat", "en", **SHORT)
    app.chat_input[0].set_value("one").run()
    app.button("new").click().run()
    app.chat_input[0].set_value("two").run()
    assert said(app)[0] == ("user", "two")
    next(box for box in app.selectbox if "chat of" in box.key).set_value(1).run()
    assert said(app)[0] == ("user", "one")
    app.text_area("text 1 0").set_value("three").run()
    app.button("send 1 0").click().run()
    assert said(app)[0] == ("user", "three") and len(said(app)) == 2
    assert [chat["messages"][0]["content"] for chat in app.session_state["chats"].values()] == ["one", "two", "three"]


def test_what_was_not_taught_is_not_offered_and_the_reason_stands_there(here):
    taught_weights(here / "out", taught=TAUGHT)
    app = open_page("chat", "en", **SHORT)
    assert app.radio("thinking").disabled and app.multiselect("tools").disabled and app.slider("history").disabled
    told = " ".join(caption.value for caption in app.caption)
    assert "cannot think" in told and "cannot use tools" in told and "the current one only" in told
    assert app.session_state["history"] == 0
    assert app.button("example 0").label == r"\!\[x\]\(http\://127\.0\.0\.1\:9/x\.png\)"  # no picture in a label
    app.button("example 1").click().run()
    assert said(app)[0] == ("user", "1+1=?") and len(said(app)) == 2


def test_a_base_model_continues_texts(here):
    path = stage.chat_weights(here / "out", name="pretrain_32.pth")
    model, tokenizer, _ = load_model(path)
    save_weights(path, model, tokenizer, {"stage": "pretrain"})
    app = open_page("chat", "en", mode="talk")
    assert app.chat_input[0].disabled and "base model" in " ".join(caption.value for caption in app.caption)
    app = open_page("chat", "en", mode="continue", beginning="春天", **{"continue max_tokens": 16})
    app.button("go on").click().run()
    assert clean(app).text[-1].value.startswith("春天") and "written" in app.caption[-1].value


def test_two_checkpoints_answer_one_question(here):
    stage.chat_weights(here / "out", seed=1)
    stage.chat_weights(here / "out", seed=2, name="dpo_32.pth")
    app = open_page("chat", "en", mode="compare", **{"compare max_tokens": 16, "compare seed": 1})
    app.chat_input[0].set_value("你好").run()
    question, first, second = (text.value for text in clean(app).text)
    assert question == "Question: 你好" and first and second and first != second
    app.run()
    assert [text.value for text in clean(app).text] == [question, first, second]  # drawn anew, not asked anew


def test_tools_are_called_in_sight(here):
    def reply(request):
        if request["messages"][-1]["role"] == "tool":
            return f"等于{request['messages'][-1]['content']}"
        call = sources.as_message(ToolCall("calculator", '{"expression": "12*12"}'))
        return {"reasoning_content": "要算", "content": "", "tool_calls": [call]}

    with StubApi(reply) as stub:
        app = open_page("chat", source="api", address=stub.address)
        app.multiselect("tools").set_value(["calculator"]).run()
        app.chat_input[0].set_value("12*12=?").run()
        for _ in range(2):  # as it came, and drawn anew
            assert [code.value for code in app.code][:2] == ['{"expression": "12*12"}', "144"]
            assert said(app)[-1] == ("assistant", "等于144") and "要算" in said(app)[1][1]
            app.run()
        sent = stub.requests[-1]["messages"]
        assert [m["role"] for m in sent] == ["user", "assistant", "tool"]
        assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] and "reasoning_content" not in sent[1]
        assert all(m["role"] != "system" or m["content"] for m in sent)


def test_a_model_that_calls_for_ever_is_ended(here):
    call = sources.as_message(ToolCall("clock", "{}"))
    with StubApi(lambda request: {"tool_calls": [call]}) as stub:
        app = open_page("chat", "en", source="api", address=stub.address)
        app.chat_input[0].set_value("x").run()
        assert len(stub.requests) == 4 and "that is enough" in app.error[0].value


def test_a_fresh_clone_is_told_what_to_run(here):
    app = open_page("chat", "en")
    assert "make demo" in app.warning[0].value and app.chat_input[0].disabled
    app.session_state["address"] = "http://127.0.0.1:9/v1"
    app.radio("source").set_value("api").run()
    assert "serve_openai_api.py" in app.error[0].value and "Nothing answers" in app.error[0].value
    app.segmented_control("language").set_value("zh").run()
    assert "没有应答" in app.error[0].value  # in the page's language


def test_mistakes_are_said_on_the_page(here):
    path = stage.chat_weights(here / "out", max_seq_len=64)
    app = open_page("chat", **SHORT)
    app.chat_input[0].set_value("很长" * 200).run()
    assert "上下文只有 64" in app.error[0].value and [name for name, _ in said(app)] == ["user"]
    path.write_bytes(b"no weights")
    assert "full\\_sft\\_32\\.pth 读不出来" in open_page("chat").error[0].value


def test_two_visitors_have_chats_of_their_own(here):
    stage.chat_weights(here / "out")
    one, two = open_page("chat", "en", **SHORT), open_page("chat", "zh", **SHORT)
    one.chat_input[0].set_value("one").run()
    assert said(two.run()) == [] and said(one)[0] == ("user", "one")


def test_the_page_stays_on_this_machine():
    config = (ROOT / "scripts" / ".streamlit" / "config.toml").read_text()
    assert 'address = "127.0.0.1"' in config and "gatherUsageStats = false" in config


# ----------------------------------------------------------------------------------------------------------- browser
@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright (pip install)")
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox", "--disable-gpu"])
        except sync_api.Error:
            pytest.skip("no Chromium here: apt install chromium, or playwright install chromium")
        yield chromium
        chromium.close()


@pytest.fixture
def served(here):
    """The page as a user starts it, beside an out/ of its own -> its address."""
    taught_weights(here / "out", taught=TAUGHT)
    stage.chat_weights(here / "out", seed=2, name="dpo_32.pth")
    with serving(here) as address:
        yield address


@contextlib.contextmanager
def serving(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", PAGE, "--server.port", str(port)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        while "http://" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        log = (folder / "log").read_text()
        assert "127.0.0.1" in log and "Network URL" not in log and "Traceback" not in log and not stage.warned(log)
    finally:
        process.terminate()
        process.wait(20)


def opened(browser, address, locale="en-US", width=1100, theme="light"):
    """A visitor's page, which notes what its console calls an error and what it asks of other machines."""
    page = browser.new_page(locale=locale, viewport={"width": width, "height": 800}, color_scheme=theme)
    page.set_default_timeout(60_000)
    page.faults = []
    page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:", address.replace("http", "ws")))
            else page.faults.append(r.url))  # fmt: skip
    page.goto(address)
    return page


@pytest.mark.slow
def test_a_chat_in_a_browser(browser, served, here):
    page = opened(browser, served)
    ask, answers = page.get_by_placeholder("Say something …"), page.get_by_test_id("stChatMessage")
    ask.fill("你好，世界")
    ask.press("Enter")
    page.get_by_role("button", name="Regenerate").wait_for()
    assert answers.count() == 2 and "你好，世界" in answers.first.inner_text()
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("Earlier answers").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["conversations"]
    assert [m["role"] for m in exported] == ["user", "assistant"] and exported[0]["content"] == "你好，世界"
    download.value.save_as(here / "chat.json")
    page.get_by_role("button", name="Clear").click()
    answers.first.wait_for(state="detached")
    page.get_by_role("button", name="Import").click()
    page.locator("input[type=file]").set_input_files(here / "chat.json")
    answers.nth(1).wait_for()
    settled(page)
    assert exported[1]["content"].strip() in answers.nth(1).inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New chat").click()
    answers.first.wait_for(state="detached")

    text = "".join(f"{i} " for i in range(500))
    with StubApi(lambda request: text, pause=0.02) as stub:
        page.get_by_text("an API address", exact=True).click()
        page.get_by_text("Nothing answers").wait_for()
        page.get_by_label("Address (OpenAI-compatible)").fill(stub.address)
        page.get_by_label("Address (OpenAI-compatible)").press("Enter")
        page.get_by_text("Nothing answers").wait_for(state="detached")
        settled(page)
        ask.fill("count")
        ask.press("Enter")
        seen = set()
        while len(seen) < 5:  # the answer grows before one's eyes
            seen.add(answers.last.inner_text() if answers.count() == 2 else "")
            page.wait_for_timeout(100)
        answers.last.get_by_role("button", name="Stop").click()
        page.get_by_text("(stopped)").wait_for()
        settled(page)
        said = answers.last.get_by_test_id("stText").first.inner_text()
        assert text.startswith(said.strip()) and 0 < len(said) < len(text) / 2
        page.wait_for_timeout(1000)
        assert stub.hung_up == 1 and len(stub.requests) == 1  # the server has been told, and nothing was asked anew
    assert not page.faults


@pytest.mark.slow
def test_an_answer_loads_nothing_from_anywhere(browser, served):
    """A picture, a link's icon, HTML: what a model writes is shown as it was written."""
    hostile = "![p](http://127.0.0.1:9/p.png) <img src='http://127.0.0.1:9/i.png'> <script>alert(1)</script> $x^2$"
    page = opened(browser, served)
    with StubApi(lambda request: {"content": hostile, "reasoning_content": hostile}) as stub:
        page.get_by_text("an API address", exact=True).click()
        page.get_by_label("Address (OpenAI-compatible)").fill(stub.address)
        page.get_by_label("Address (OpenAI-compatible)").press("Enter")
        page.get_by_text("Nothing answers").wait_for(state="detached")
        settled(page)
        page.get_by_placeholder("Say something …").fill(hostile)
        page.get_by_placeholder("Say something …").press("Enter")
        page.get_by_role("button", name="Regenerate").wait_for()
        answers = page.get_by_test_id("stChatMessage")
        assert hostile in answers.first.inner_text() and hostile in answers.last.inner_text()
        assert answers.locator("img[src*='127.0.0.1:9']").count() == 0
    assert not page.faults


WAYS = [("zh-CN", 1200, "light"), ("en-US", 390, "dark")]
TITLES = {
    "zh-CN": (("看进模型", "看进模型"), ("训练", "看训练"), ("数据", "看数据")),
    "en-US": (("Look inside", "Look inside"), ("Watch", "Watch the training"), ("Data", "Look at the data")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("locale", "width", "theme"), WAYS)
def test_every_page_in_a_browser(browser, here, locale, width, theme):
    """Of a model trained by the stages: each page and each view is drawn, without an error on the console."""
    flags = [*stage.TINY, "--from_weight", "none", "--data_path", str(stage.write_chats(here / "c.jsonl")),
             "--max_steps", "6", "--val_split", "0.2", "--out_dir", str(here / "out")]  # fmt: skip
    stage.load("3-full_sft.py").main(flags)
    (here / "out" / "bad.jsonl").write_text("no log\n")
    say = Words(locale[:2])
    with serving(here) as address:
        page = opened(browser, address, locale, width, theme)
        page.get_by_test_id("stChatInputTextArea").wait_for()
        for link, title in TITLES[locale]:
            if width < 640:  # the way to the pages is folded there
                page.get_by_test_id("stExpandSidebarButton").click()
            page.get_by_test_id("stTopNavLink" if width > 640 else "stSidebarNavLink").filter(has_text=link).click()
            page.get_by_role("heading", name=title).wait_for()
            if width < 640 and page.get_by_test_id("stSidebarCollapseButton").is_visible():
                page.get_by_test_id("stSidebarCollapseButton").click()
            if title in ("看进模型", "Look inside"):
                for view in VIEWS:
                    page.get_by_test_id("stMain").get_by_text(say(view), exact=True).first.click()
                    settled(page)
            settled(page)
            wide = page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth")
            assert wide <= width and page.get_by_test_id("stException").count() == 0
        assert not page.faults


@pytest.mark.slow
def test_a_run_is_watched_while_it_trains(browser, here):
    flags = [*stage.TINY, "--from_weight", "none", "--data_path", stage.write_chats(here / "c.jsonl"), "--val_split", 0,
             "--max_steps", 100_000, "--out_dir", here / "out"]  # fmt: skip
    run = stage.popen("3-full_sft.py", flags, here / "train.txt")
    try:
        with serving(here) as address:
            page = opened(browser, address)
            page.get_by_test_id("stTopNavLink").filter(has_text="Watch").click()
            at = page.get_by_text(re.compile(r"training, at step [\d,]+"))
            at.wait_for()
            first = at.inner_text()
            while at.inner_text() == first:  # drawn anew, without a touch of the page
                page.wait_for_timeout(200)
            run.terminate()
            page.get_by_text(re.compile("stopped at step .* Why: SIGTERM")).wait_for()
            assert "--resume" in page.get_by_test_id("stCode").inner_text()
            assert not page.faults
    finally:
        run.kill()
        run.wait()


def settled(page) -> None:
    """Waits until the page's script has run to its end."""
    page.wait_for_timeout(400)
    page.get_by_test_id("stStatusWidget").wait_for(state="detached")
    page.get_by_test_id("stSpinner").first.wait_for(state="detached")
