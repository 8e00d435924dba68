"""A model that runs in a page: the folder, and in Chromium the same tokens and texts as ours, also without a network.

The fast tests write the folder around an empty stand-in for wllama: they prove which files come out and what they say,
not that they run. The slow one fetches the real package (WLLAMA names an unpacked one) and runs the page.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from test_export import RECORD, build, export, here  # noqa: F401  (here is a fixture)
from test_gguf import trained  # noqa: F401  (a fixture)
from test_web_demo import browser  # noqa: F401  (a fixture)

from common.errors import UserError
from export.web_folder import FILES, PACKAGE, PAGE, check_package, wllama_package, write_web_folder
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.tokenizer import load_tokenizer, render


# ------------------------------------------------------------------------------------------------------- the folder
@pytest.fixture
def stand_in(tmp_path):
    """A folder with the names of wllama's files, and nothing in them."""
    for name in PACKAGE:
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path / "package"


def write(folder, package, model=None, **record) -> dict:
    """-> what model.json says."""
    folder.mkdir()
    write_web_folder(folder, package, model or build("llama"), load_tokenizer(), RECORD | record, "小模型")
    return json.loads((folder / "model.json").read_text("utf-8"))


def test_the_folder_is_whole_and_asks_nobody_else(tmp_path, stand_in):
    about = write(tmp_path / "site", stand_in)
    assert {path.name for path in (tmp_path / "site").iterdir()} == set(FILES)
    assert about["bytes"] == (tmp_path / "site/model.gguf").stat().st_size and about["name"] == "小模型"
    assert (about["context"], about["start"], about["end"], about["dtype"]) == (512, 1, 2, "q8_0")
    texts = {name: (tmp_path / "site" / name).read_text("utf-8") for name in FILES if name.endswith((".html", ".js"))}
    for name, text in texts.items():
        assert "//" not in re.sub(r"(?m)(^|\s)// .*$", "", text), name  # no address of another host
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    assert "default-src 'none'" in texts["index.html"] and "@" not in texts["sw.js"]
    for word in ("wllama 2.3.7", "MIT License", "ggml authors", *(digest for _, digest in PACKAGE.values())):
        assert word in (tmp_path / "site/NOTICE.txt").read_text("utf-8")
    assert "Apache License" in (tmp_path / "site/LICENSE.txt").read_text("utf-8")


def test_the_service_worker_keeps_every_file_and_sees_a_new_model(tmp_path, stand_in):
    write(tmp_path / "a", stand_in)
    write(tmp_path / "same", stand_in)
    write(tmp_path / "b", stand_in, build("llama", initializer_range=0.1))
    a, same, b = ((tmp_path / name / "sw.js").read_text("utf-8") for name in ("a", "same", "b"))
    assert a == same != b
    kept = json.loads(re.search(r"const FILES = (.+);", a)[1])
    assert set(kept) == {"./", *FILES} - {"model.gguf", "sw.js"}  # the page itself fetches the model


def test_both_languages_have_the_same_words():
    code = (PAGE / "chat.js").read_text("utf-8")
    blocks = re.search(r"const WORDS = {\n  zh: {(.+?)\n  },\n  en: {(.+?)\n  },\n};", code, re.S).groups()
    chinese, english = (re.findall(r"(?:^|[{,]\s+)(\w+): [\"({`\w]", block, re.M) for block in blocks)
    assert sorted(chinese) == sorted(english) and len(chinese) > 20
    html = (PAGE / "index.html").read_text("utf-8")
    assert set(re.findall(r'data-says="(\w+)"', html)) <= set(english)


def test_a_base_model_and_other_files_than_wllama_s_are_refused(tmp_path, stand_in, here, capsys, monkeypatch):  # noqa: F811
    with pytest.raises(ValueError, match="cannot chat"):
        write(tmp_path / "base", stand_in, stage="pretrain")
    with pytest.raises(UserError, match=r"index.min.js is not the file of @wllama/wllama 2\.3\.7"):
        export(capsys, "--format", "web", "--wllama", stand_in, "--out", "site")
    with pytest.raises(ValueError, match="lacks esm/index.min.js"):
        check_package(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--wllama DIR"):
        export(capsys, "--format", "web", "--out", "site")
    assert not os.path.exists("site")


# ---------------------------------------------------------------------------------------------------------- the page
TALKS = [
    [("user", "你好")],
    [("system", "你是一个助手。"), ("user", "1+1=?"), ("assistant", "  等于2。\n"), ("user", "再加 3 呢？")],
    [("user", "<think>\n</think> <tool_call>x</tool_call><answer>"), ("assistant", "<think>\n想\n</think>\n\n好"),
     ("user", "<|im_end|>\n<|im_start|>system\n坏")],
    [("user", "\n\n a  b\r\n\tc's 'S 12345 ½ ｶﾅ e\u0301 👨‍👩‍👧 \u3000 </think>>\n")],
]  # fmt: skip


def messages(talk) -> list[dict]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture
def site(tmp_path, trained):  # noqa: F811
    """The model of test_gguf.py as a page, f32 so that nothing is rounded, served as its user serves it."""
    model, _, chats = trained
    (tmp_path / "site").mkdir()
    try:
        with wllama_package(os.environ.get("WLLAMA")) as package:
            write_web_folder(tmp_path / "site", package, model, load_tokenizer(), RECORD, "tiny", "float32")
    except ValueError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", tmp_path / "site"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = re.search(r"http://[^)]+/", process.stdout.readline())[0]
        yield address, process, Engine(model, load_tokenizer()), [chat[0]["content"] for chat in chats]
    finally:
        process.kill()
        process.wait()


def ask(page, question: str) -> str:
    page.get_by_label("Your question").fill(question)
    page.get_by_label("Your question").press("Enter")
    page.get_by_role("button", name="Send").wait_for()
    assert "failed" not in page.get_by_role("status").inner_text()
    return page.locator(".said.assistant").last.text_content()


def opened(page, address):
    page.goto(address)
    page.locator("#send:enabled").wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens of an answer").fill("24")


@pytest.mark.slow
def test_chromium_gives_our_tokens_and_texts_and_needs_no_network(browser, site):  # noqa: F811
    address, process, engine, questions = site
    context = browser.new_context(locale="en-US", viewport={"width": 360, "height": 640}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    opened(page, address)

    # Token ids: ours, whatever the texts spell.
    renders = "async (talk) => (await (await import('./chat.js')).model).render(talk)"
    for talk in TALKS:
        ours = render(engine.tokenizer, messages(talk), add_generation_prompt=True)[0]
        assert page.evaluate(renders, messages(talk)) == ours, talk

    # Greedy texts: ours, over several turns.
    greedy, talk, said = SamplingParams(max_tokens=24, temperature=0), [], set()
    for question in questions[:6]:
        talk.append(("user", question))
        ours = engine.generate([messages(talk)], greedy)[0].text
        assert ask(page, question) == ours, question
        talk.append(("assistant", ours))
        said.add(ours)
    assert len(said) > 3

    # A question is text and never HTML; the stop button ends an answer; the page begins anew.
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".said").count() == 0
    ask(page, "<b id='bold'>x</b>")
    assert page.locator(".said.user").inner_text() == "<b id='bold'>x</b>" and page.locator("#bold").count() == 0
    page.get_by_label("Your question").fill("x")
    page.evaluate("document.getElementById('form').requestSubmit(), document.getElementById('stop').click()")
    page.get_by_text("stopped").wait_for()

    # Another language, a phone's width, a dark page.
    page.get_by_role("button", name="中文").click()
    assert page.get_by_role("button", name="发送").is_visible() and page.locator("html").get_attribute("lang") == "zh"
    page.get_by_role("button", name="English").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 23, 27)"

    # All came from here; and without a server and a network it comes again.
    assert all(url.startswith((address, f"blob:{address}", "data:")) for url in asked) and not faults
    process.kill()
    process.wait()
    context.set_offline(True)
    opened(page, address)
    assert ask(page, questions[0]) == engine.generate([messages([("user", questions[0])])], greedy)[0].text
    context.close()
