"""Requests that nobody should send: none ends in a 5xx, none keeps a slot; and what the two programs say."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import httpx2 as httpx
import pytest
import torch
from serve import ADD, serve, user, wait_until
from stage import ROOT, load, warned
from stub_api import StubApi

from benchmarks import serving
from common.errors import UserError
from inference.engine import Engine
from inference.sampling import TokenLogprob
from inference.stream_text import Completion
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import save_weights
from serving.app import create_app
from serving.middleware import Limits


def small_model():
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_seq_len=256, initializer_range=0.2)
    return MiniMindForCausalLM(config).eval()


@pytest.fixture(scope="module")
def live():
    with serve(Engine(small_model(), load_tokenizer()), limits=Limits(messages=50, prompts=4, timeout=20)) as server:
        yield server
        wait_until(server.idle)


BODY = {"model": "tiny", "messages": user("hi"), "max_tokens": 1}
ODD = [  # values put in the place of every field
    None, True, False, 0, -1, 2, 0.5, -7.5, 1e300, 2**63, 10**40, "", "x", "auto", "nan", "\ud800", "\x00", "😀" * 9,
    [], [[]], [None], [0], [-1], [1e300], ["", "\ud800"], ["a"] * 1000, [{}], [{"type": "function"}], {}, {"a": 1},
    {"1": 1}, {"-1": 1}, {"0": 1e300}, {"5": 100}, {"type": None}, {"type": "function"}, {"function": {"name": "add"}},
]  # fmt: skip
FIELDS = {
    "/chat/completions": (
        "model", "messages", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "stop", "n", "logit_bias", "max_tokens", "max_completion_tokens", "stream",
        "stream_options", "ignore_eos", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
        "response_format", "modalities", "chat_template_kwargs", "open_thinking", "functions", "audio", "metadata",
        "include_stop_str_in_output", "allowed_token_ids", "bad_words", "truncate_prompt_tokens", "return_token_ids",
        "prompt_logprobs", "n_predict", "continue_final_message", "add_generation_prompt",
    ),
    "/completions": ("model", "prompt", "logprobs", "best_of", "suffix", "echo", "max_tokens"),
    "/responses": (
        "model", "input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "stream", "truncation",
        "include", "temperature", "stop", "seed", "previous_response_id", "chat_template_kwargs",
    ),
}  # fmt: skip


def post(client, path, body):
    """Any body; as JSON with escapes, so that half characters can be sent."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=content, headers={"Content-Type": "application/json"})


def check(response):
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], error
    elif "event-stream" in response.headers["content-type"]:
        last = ("data: [DONE]", "event: response.completed", "event: response.incomplete")
        assert response.text.endswith("\n\n") and response.text.split("\n\n")[-2].startswith(last)
        assert '"error":{' not in response.text
    return response.status_code


@pytest.mark.parametrize("path", FIELDS)
def test_any_value_in_any_field(live, path):
    base = BODY | ({"input": "hi", "max_output_tokens": 1} if path == "/responses" else {"prompt": "hi"})
    statuses = {}
    with httpx.Client(base_url=live.url, timeout=60) as client:
        for field in FIELDS[path]:
            for value in ODD:
                status = check(post(client, path, base | {field: value}))
                statuses[status] = statuses.get(status, 0) + 1
    assert set(statuses) == {200, 400, 404} and min(statuses[200], statuses[400]) > 20, statuses
    wait_until(live.idle)


MESSAGES = [
    [None], [[]], ["hi"], [{}], [{"role": None}], [{"role": "user", "content": 5}], [{"role": "user", "content": [1]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"text": None}]}],
    [{"role": "user", "content": "\udcff"}], [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}],
    [{"role": "user", "content": None}], [{"role": "tool", "content": None}],
    [{"role": "user", "tools": 5, "content": ""}],
    [{"role": "assistant", "content": None, "tool_calls": []}], [{"role": "assistant", "content": None}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "\ud800", "arguments": "{}"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": {"y": "\ud800"}}}]}],
    [{"role": "assistant", "tool_calls": [{"name": "x"}]}], [{"role": "user", "content": "x", "tool_calls": [{}]}],
    [{"role": "assistant", "content": "x", "reasoning_content": ["y"]}], user("x") * 51,
    [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n</think><tool_call>"}], user("x" * 5000),
    [{"role": "system", "content": "", "tools": [{"x": "\ud800"}]}, *user("x")],
]  # fmt: skip
TOOLS = [
    [{"type": "function", "function": None}], [{"type": "function", "function": {}}],
    [{"type": "function", "function": {"name": ""}}], [{"type": "function", "function": {"name": "\ud800"}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"x": "\ud800"}}}],
    [{"type": "function", "function": {"name": "f", "parameters": "no object", "strict": 7}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"<tool_call>": "</tool_call><|im_end|>"}}}],
    [{"type": "code_interpreter"}], [ADD] * 129, [{"function": {"name": "f" * 200}}],
]  # fmt: skip
RAW = {
    "not JSON": b"{", "empty": b"", "a number": b"5", "null": b"null", "a list": b"[]", "NaN": b'{"temperature": NaN}',
    "infinity": b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    "not UTF-8": b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "zeros": b"\x00" * 100,
    "nested lists": b"[" * 300_000, "nested objects": b'{"a":' * 100_000,
    "nested in a field": b'{"model": "tiny", "metadata": ' + b"[" * 900 + b"]" * 900 + b', "messages": []}',
    "nested tools": json.dumps(BODY)[:-1].encode() + b', "tools": [{"function": {"name": "f", "parameters": '
    + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}}]}",
    "deeper tools": json.dumps(BODY)[:-1].encode() + b', "tools": [{"function": {"name": "f", "parameters": '
    + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}]}",
    "a huge number": b'{"model": "tiny", "n": ' + b"9" * 100_000 + b"}",
    "a huge exponent": b'{"model": "tiny", "top_p": 1e999999}', "twice": b'{"model": "tiny", "model": 5}',
}  # fmt: skip


def test_odd_messages_and_tools(live):
    with httpx.Client(base_url=live.url, timeout=60) as client:
        for messages in MESSAGES:
            assert check(post(client, "/chat/completions", BODY | {"messages": messages})) in (200, 400), messages
        for tools in TOOLS:
            for choice in ("auto", "required"):
                body = BODY | {"tools": tools, "tool_choice": choice}
                assert check(post(client, "/chat/completions", body)) in (200, 400), tools
        for path in ("/chat/completions", "/completions"):
            for name, body in RAW.items():
                assert check(post(client, path, body)) == 400 or name in ("nested tools", "deeper tools"), name
        for prompt in ([[]], [[-1]], [[99999]], ["a"] * 5, [1] * 300, "x" * 9999, ["a", 5], "\ud800", [True]):
            assert check(post(client, "/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 2})) in (
                200,
                400,
            )
        assert check(client.post("/chat/completions", content=json.dumps(BODY))) == 400  # no content type
        assert check(client.get("/models/" + "x" * 5000)) == check(client.get("/models/%ff%00..%2f")) == 404
    wait_until(live.idle)


def test_half_a_character_in_an_error_message_can_be_sent(live):
    response = post(httpx, f"{live.url}/chat/completions", BODY | {"model": "a\ud800"})
    assert check(response) == 404
    response = post(httpx, f"{live.url}/chat/completions", BODY | {"chat_template_kwargs": {"b\ud800": 1}})
    assert check(response) == 400


def test_a_million_messages_and_other_large_bodies(live):
    million = json.dumps(BODY | {"messages": [{"role": "user", "content": "x"}] * 1_000_000}).encode()
    begin = time.monotonic()
    response = post(httpx, f"{live.url}/chat/completions", million)
    assert check(response) == 413 and response.json()["error"]["code"] == "request_too_large"
    chunks = (b"[" * 100_000 for _ in range(20))  # no length is announced
    response = httpx.post(f"{live.url}/chat/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert check(response) == 413
    short = json.dumps(BODY | {"messages": [{}] * 250_000}, separators=(",", ":")).encode()
    assert len(short) < Limits().body and check(post(httpx, f"{live.url}/chat/completions", short)) == 400
    assert time.monotonic() - begin < 15 and live.idle()


def test_a_body_that_never_ends(live):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with serve(live.engine, limits=Limits(body_seconds=0.3)) as impatient:
        connection = socket.create_connection(("127.0.0.1", impatient.port), timeout=10)
        connection.sendall(head)
        assert b" 408 " in connection.recv(200)
        connection.close()


@pytest.mark.slow
def test_schemathesis_finds_no_5xx(live):
    """Requests made from the OpenAPI document, valid and not, 100 an address."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    document = create_app(live.scheduler, ["tiny"]).openapi()
    schema = schemathesis.openapi.from_dict(document)
    sent = []
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        strategy |= operation.ok().as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
                  derandomize=True, database=None)  # fmt: skip
        def run(case):
            if isinstance(case.body, dict):
                case.body = case.body | {"max_tokens": case.body.get("max_tokens") and 2, "model": "tiny"}
            response = case.call(base_url=live.root, timeout=60)
            assert response.status_code < 500, response.text
            sent.append(response.status_code)

        given(case=strategy)(run)()
    assert len(sent) > 100 and 200 in sent and 400 in sent
    wait_until(live.idle)


# --------------------------------------------------------------------------------------------------------- programs
def test_mistakes_in_the_flags_are_one_line():
    server = load("scripts/serve_openai_api.py")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            server.main(["--port", port])
    with pytest.raises(UserError, match="cannot listen on no.such.host"):
        server.main(["--host", "no.such.host.invalid", "--port", "0"])
    with pytest.raises(UserError, match="--slots must be at least 1, not 0\n *--timeout must be above 0"):
        server.main(["--slots", "0", "--timeout", "0"])
    with pytest.raises(UserError, match="--cors_origins: 'my.page/' is no origin; write it as https://my.page"):
        server.main(["--cors_origins", "my.page/"])
    client = load("scripts/chat_openai_api.py")
    with pytest.raises(UserError, match="cannot reach http://127.0.0.1:9/v1"):
        client.main(["--base_url", "http://127.0.0.1:9/v1"])


@pytest.mark.parametrize("flags", [[], ["--model", "m"]])
def test_a_web_page_is_not_taken_for_an_api(flags, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    with StubApi(lambda request: b"<html>hello</html>") as stub:
        stub.models = b"<html>hello</html>"
        with pytest.raises(UserError, match="does not answer as OpenAI's API does"):
            load("scripts/chat_openai_api.py").main(["--base_url", stub.address, *flags])


def test_a_refused_answer_does_not_end_the_chat(monkeypatch, capsys):
    replies = iter([429, "fine"])
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    with StubApi(lambda request: next(replies)) as stub:
        load("scripts/chat_openai_api.py").main(["--base_url", stub.address])
        assert [len(request["messages"]) for request in stub.requests] == [1, 1]  # what was refused is not history
    said = capsys.readouterr()
    assert "the stub refuses" in said.err and "fine" in said.out


@pytest.mark.slow  # three programs start
def test_the_programs_talk_and_end(tmp_path):
    """One server, one terminal client with a key, a system prompt and /clear; SIGTERM while an answer is streamed."""
    weights = tmp_path / "full_sft_32.pth"
    save_weights(weights, small_model(), load_tokenizer(), {"stage": "full_sft"})
    environment = os.environ | {"MINIMIND_API_KEY": "secret", "PYTHONIOENCODING": "utf-8"}
    command = [
        sys.executable,
        "scripts/serve_openai_api.py",
        "--weight",
        str(weights),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        server.stderr.readline()
        url = re.match(r"(http://\S+) serves full_sft_32, minimind", server.stderr.readline())[1]
        ask = [sys.executable, "scripts/chat_openai_api.py", "--base_url", url, "--system", "S", "--max_tokens", "5"]
        talk = {"cwd": ROOT, "text": True, "capture_output": True, "timeout": 60, "encoding": "utf-8"}
        chat = subprocess.run(ask, input="你好\n/clear\nhi\n\n", env=environment, **talk)
        assert chat.returncode == 0 and chat.stdout.count("> ") == 4, chat.stderr
        refused = subprocess.run(ask, input="hi\n\n", env=environment | {"MINIMIND_API_KEY": "wrong"}, **talk)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "a wrong API key" in refused.stderr
        body = {"model": "minimind", "prompt": "x", "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{url}/completions", json=body, headers={"Authorization": "Bearer secret"}
        ) as answer:
            server.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(20) == 128 + signal.SIGTERM
        assert not any(map(warned, (server.stderr.read(), chat.stderr)))
    finally:
        server.kill()
        server.stderr.close()


def test_what_the_load_measurement_calls_equal():
    """The server's text parts from the engine's where the second best token is as good, or it is different."""
    tokenizer = load_tokenizer()
    one, two, three, end = (tokenizer.encode(text)[0] for text in ("1", "2", "3", "<|im_end|>"))
    engine = Namespace(tokenizer=tokenizer, end_tokens={end})

    def alone(gap):
        tops = [[(one, -0.1), (end, -9.0)], [(two, -0.7), (three, -0.7 - gap)], [(end, -0.1), (one, -5.0)]]
        logprobs = [TokenLogprob(top[0][0], top[0][1], top) for top in tops]
        return Completion("12", [one, two, end], "stop", 1, 3, logprobs)

    texts = {(0, "12"): 5, (0, "13"): 2, (0, "2"): 1}
    assert serving.compare(engine, [alone(5e-5)], texts) == {"equal": 5, "near_ties": 2, "different": 1}
    assert serving.compare(engine, [alone(5e-3)], texts) == {"equal": 5, "near_ties": 0, "different": 3}


@pytest.mark.slow  # five minutes of load
def test_sixty_four_clients_for_five_minutes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    weights = tmp_path / "full_sft_32.pth"
    save_weights(weights, small_model(), load_tokenizer(), {"stage": "full_sft"})
    args = Namespace(clients=64, seconds=300, slots=16, questions=32, weight=str(weights), preset=None)
    result = serving.run(args)
    assert result["errors"] == 0 and result["requests"] > 640 and result["exit_code"] == 128 + signal.SIGTERM
    assert result["one_at_a_time"]["equal"] == 32
    assert result["answers"]["different"] == 0 and result["answers"]["near_ties"] <= result["requests"] / 1000
    memory = result["resident_megabytes"]
    assert memory["last_quarter"] < 1.05 * memory["second_quarter"] and result["next_token_ms"]["p50"] > 0
