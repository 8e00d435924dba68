"""Pages: cross-origin requests with and without leave, a page in Chromium, and the tools that Open-WebUI offers."""

import functools
import http.server
import json
import logging
import shutil
import threading

import httpx2 as httpx
import openai
import pytest
from serve import ADD, CALLS, HELLO, learned_model, serve, user, wait_until

from inference.engine import Engine

PAGE = "https://my.page"


@pytest.fixture(scope="module")
def engine():
    return Engine(*learned_model())


# ------------------------------------------------------------------------------------------------------------ origins
def preflight(live, origin=PAGE):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    return httpx.request("OPTIONS", f"{live.url}/chat/completions", headers=headers)


def test_a_page_of_a_named_origin_may_ask(engine):
    body = {"model": "tiny", "messages": user("你好"), "temperature": 0}
    with serve(engine, api_key="secret", cors_origins=[PAGE]) as live:
        asked = preflight(live)  # a browser sends no key with it
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        assert preflight(live, "https://other.page").status_code == 400
        with_key = {"Origin": PAGE, "Authorization": "Bearer secret"}
        for stream in (False, True):
            answer = httpx.post(f"{live.url}/chat/completions", json=body | {"stream": stream}, headers=with_key)
            assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        refused = httpx.post(f"{live.url}/chat/completions", json=body, headers={"Origin": PAGE})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE
    with serve(engine, cors_origins=["*"]) as live:
        assert preflight(live, "https://other.page").headers["access-control-allow-origin"] == "*"


def test_without_leave_nothing_is_said(engine):
    with serve(engine) as live:
        assert preflight(live).status_code == 405
        answer = httpx.get(f"{live.url}/models", headers={"Origin": PAGE})
        assert not [name for name in answer.headers if name.startswith("access-control")]


CHAT_PAGE = """<!doctype html><meta charset="utf-8"><pre id="said"></pre><script>
async function ask(url, key) {
  const response = await fetch(url + "/chat/completions", {method: "POST",
    headers: {"Content-Type": "application/json", "Authorization": "Bearer " + key},
    body: JSON.stringify({model: "tiny", stream: true, temperature: 0, messages: [{role: "user", content: "你好"}]})});
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) text += part.value;
  return text.split("\\n\\n").filter(line => line.startsWith("data: {")).map(line => JSON.parse(line.slice(6)))
    .map(chunk => chunk.choices[0].delta.content || "").join("");
}
</script>"""


@pytest.mark.slow  # a browser starts
def test_a_page_on_another_origin_chats_in_chromium(engine, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright (pip install)")
    (tmp_path / "index.html").write_text(CHAT_PAGE, encoding="utf-8")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{pages.server_address[1]}"
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox", "--disable-gpu"])
        except sync_api.Error:
            pytest.skip("no Chromium here: apt install chromium, or playwright install chromium")
        page = browser.new_page()
        page.goto(f"{origin}/index.html")
        with serve(engine, api_key="secret", cors_origins=[origin]) as live:
            assert page.evaluate("([url, key]) => ask(url, key)", [live.url, "secret"]) == HELLO
        with serve(engine, api_key="secret") as live, pytest.raises(sync_api.Error, match="Failed to fetch"):
            page.evaluate("([url, key]) => ask(url, key)", [live.url, "secret"])
        browser.close()
    pages.shutdown()


# -------------------------------------------------------------------------------------------------------------- tools
BUILT_IN = (  # what Open-WebUI's page offers with every chat where its tools are on
    "get_current_timestamp", "calculate_timestamp", "search_web", "fetch_url", "generate_image", "edit_image",
    "execute_code", "search_memories", "add_memory", "replace_memory_content", "delete_memory", "list_memories",
    "search_notes", "view_note", "write_note", "replace_note_content", "search_chats", "view_chat", "search_channels",
    "search_channel_messages", "view_channel_message", "view_channel_thread", "list_knowledge_bases",
    "search_knowledge_bases", "query_knowledge_bases", "search_knowledge_files", "query_knowledge_files", "view_file",
)  # fmt: skip


def offered(name: str) -> dict:
    words = f"What {name.replace('_', ' ')} does for the user, when to call it and what it gives back. " * 5
    count = {"type": "integer", "description": "How many results to give back at most", "default": 5}
    query = {"type": "string", "description": f"What {name} looks for, in words"}
    parameters = {"type": "object", "properties": {"query": query, "count": count}, "required": ["query"]}
    return {"type": "function", "function": {"name": name, "description": words, "parameters": parameters}}


TOOLS = [offered(name) for name in BUILT_IN]
CHAT = {
    "stream": True, "model": "tiny", "messages": user("你好"), "temperature": 0, "tools": TOOLS,
    "stream_options": {"include_usage": True}, "metadata": {"chat_id": "c"}, "session_id": "s", "files": None,
}  # fmt: skip


def said(response) -> str:
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def test_tools_that_alone_overflow_the_context_are_left_out(engine, caplog):
    assert len(TOOLS) == 28 and len(json.dumps(TOOLS)) > 20_000
    with serve(engine) as live, caplog.at_level(logging.WARNING):
        for choice in ({}, {"tool_choice": "auto"}):
            answer = httpx.post(f"{live.url}/chat/completions", json=CHAT | choice, timeout=60)
            assert answer.status_code == 200 and said(answer) == HELLO
            assert answer.headers["x-tools-left-out"].startswith("28 tools take ")
            assert answer.headers["x-tools-left-out"].endswith("the context has 1024")
        assert len([r for r in caplog.records if "tools are left out" in r.message]) == 1
        refused = httpx.post(f"{live.url}/chat/completions", json=CHAT | {"tool_choice": "required"})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=0)
        fitting = client.chat.completions.with_raw_response.create(
            model="tiny", messages=user("1+2, 3+4"), tools=[ADD], temperature=0
        )
        assert "x-tools-left-out" not in fitting.headers
        assert len(fitting.parse().choices[0].message.tool_calls) == len(CALLS)
        # Where messages and tools overflow together, the tools are no page's: the client is told.
        long = httpx.post(f"{live.url}/chat/completions", json=CHAT | {"tools": [ADD], "messages": user("好" * 2200)})
        assert long.json()["error"]["code"] == "context_length_exceeded"
        wait_until(live.idle)


def test_a_server_that_ignores_tools(engine):
    with serve(engine, ignore_tools=True) as live:
        plain = httpx.post(f"{live.url}/chat/completions", json=CHAT | {"tools": [], "stream": False}).json()
        answer = httpx.post(f"{live.url}/chat/completions", json=CHAT | {"tools": [ADD], "stream": False})
        assert answer.json()["usage"] == plain["usage"] and "ignores tools" in answer.headers["x-tools-left-out"]
        refused = httpx.post(f"{live.url}/chat/completions", json=CHAT | {"tools": [ADD], "tool_choice": "required"})
        assert refused.status_code == 400 and "ignores tools" in refused.json()["error"]["message"]
