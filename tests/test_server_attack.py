"""Clients that mean no good, or know no better: silence, half a request, half a connection, more than fits."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import pytest
import torch
from serve import serve, user, wait_until
from stage import ROOT

from inference.engine import Engine
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import save_weights


def small_model():
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_seq_len=1024, initializer_range=0.2)
    return MiniMindForCausalLM(config).eval()


@pytest.fixture(scope="module")
def live():
    with serve(Engine(small_model(), load_tokenizer()), patience=0.4) as server:
        yield server
        wait_until(server.idle)


def connect(live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=20)


def request(body: dict, path="/v1/chat/completions") -> bytes:
    content = json.dumps({"model": "tiny", "max_tokens": 5} | body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode() + (
        f"Content-Length: {len(content)}\r\n\r\n".encode() + content
    )


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------------- slow and silent
@pytest.mark.parametrize("head", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_a_client_that_sends_no_head_is_left(live, head):
    begin = time.monotonic()
    with connect(live) as connection:
        connection.sendall(head)
        assert read_all(connection) == b""
    assert 0.3 < time.monotonic() - begin < 5


def test_a_byte_now_and_then_buys_no_time(live):
    begin = time.monotonic()
    with connect(live) as connection, pytest.raises(OSError):
        for byte in b"GET /health HTTP/1.1\r\nX: " + b"y" * 200:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - begin < 5


def test_an_answer_may_take_longer_than_a_head(live):
    """And a connection is used again after it, within the same time for its next head."""
    with httpx.Client(base_url=live.url, timeout=60) as client:
        for _ in range(2):
            body = {"model": "tiny", "messages": user("hi"), "ignore_eos": True, "max_tokens": 900}
            begin = time.monotonic()
            assert client.post("/chat/completions", json=body).json()["usage"]["completion_tokens"] == 900
            assert time.monotonic() - begin > 0.5
            time.sleep(0.2)


# ------------------------------------------------------------------------------------------------------- half-closed
@pytest.mark.parametrize("stream", [False, True])
def test_a_sender_that_half_closes_gets_its_answer(live, stream):
    with connect(live) as connection:
        body = {"messages": user("hi"), "stream": stream, "max_tokens": 900, "ignore_eos": True}
        connection.sendall(request(body))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    status, _, rest = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").partition(b"\r\n")
    assert status == b"HTTP/1.1 200 OK"
    assert b"data: [DONE]" in rest if stream else json.loads(rest.partition(b"\r\n\r\n")[2])["choices"]
    wait_until(live.idle)


def test_a_sender_that_half_closes_waits_in_the_queue_too(live):
    with serve(live.engine, slots=1) as one:
        first = connect(one)
        first.sendall(request({"messages": user("hi"), "stream": True, "max_tokens": 1000, "ignore_eos": True}))
        wait_until(lambda: one.scheduler.stats()["running"] == 1)
        waiting = connect(one)
        waiting.sendall(request({"messages": user("hi"), "stream": True}))
        waiting.shutdown(socket.SHUT_WR)
        gone = connect(one)
        gone.sendall(request({"messages": user("hi"), "stream": True}))
        wait_until(lambda: one.scheduler.stats()["waiting"] == 2)
        gone.close()
        wait_until(lambda: one.scheduler.stats()["cancelled"] == 1)
        first.close()
        assert b"data: [DONE]" in read_all(waiting)
        waiting.close()
        wait_until(one.idle)
        assert one.scheduler.stats()["cancelled"] == 2


def test_half_a_request_and_then_nothing(live):
    with connect(live) as connection:
        connection.sendall(request({"messages": user("hi")})[:-5])
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""


# -------------------------------------------------------------------------------------------------------- descriptors
def start(tmp_path, limits: tuple[int, int]):
    """The program with so many descriptors (soft, hard) -> (process, port, file of its log)."""
    weights, log = tmp_path / "full_sft_32.pth", tmp_path / "log"
    save_weights(weights, small_model(), load_tokenizer(), {"stage": "full_sft"})
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
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=ROOT, env=os.environ, stderr=file,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
        )  # fmt: skip
    wait_until(lambda: " serves " in log.read_text(), 120)
    return server, int(re.search(r":(\d+)/v1 serves", log.read_text())[1]), log


@pytest.mark.slow  # a program starts
@pytest.mark.parametrize("limits", [(128, 4096), (128, 128)])
def test_idle_connections_do_not_keep_others_out(tmp_path, limits):
    server, port, log = start(tmp_path, limits)
    try:
        said = log.stat().st_size
        idle, done = [], threading.Event()

        def occupy():  # 200 at any time: those that are closed are opened anew
            while not done.is_set():
                while len(idle) < 200:
                    idle.append(socket.create_connection(("127.0.0.1", port), timeout=20))
                time.sleep(0.2)
                for connection in list(idle):
                    connection.setblocking(False)
                    try:
                        if connection.recv(1) == b"":
                            connection.close()
                            idle.remove(connection)
                    except BlockingIOError:
                        pass
                    except OSError:
                        connection.close()
                        idle.remove(connection)

        def wait() -> float:
            body = {"model": "minimind", "messages": user("hi"), "max_tokens": 5}
            begin = time.monotonic()
            assert httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=20).status_code == 200
            return time.monotonic() - begin

        wait()  # the first answer of a process takes longer, whoever else is connected
        thread = threading.Thread(target=occupy)
        thread.start()
        wait_until(lambda: len(idle) == 200)
        waits = [wait() for _ in range(8)]
        done.set()
        thread.join()
        for connection in idle:
            connection.close()
        assert max(waits) < (1 if limits[1] > 200 else 10), waits
        assert log.stat().st_size - said < 20_000 and (limits[1] > 200) == (log.stat().st_size == said)
    finally:
        server.kill()
        server.wait()


# --------------------------------------------------------------------------------------------------------- long texts
def test_long_prompts_are_refused_before_they_are_tokenised(live):
    """Nine of 0.9 MB: in processor time, of which a busy machine takes no more."""
    text = "一只猫和一只狗在花园里。" * 25_000
    assert len(text.encode()) < 2**20
    bodies = [
        ("/chat/completions", {"messages": user(text)}),
        ("/completions", {"prompt": text}),
        (
            "/chat/completions",
            {
                "messages": user("hi"),
                "tools": [{"type": "function", "function": {"name": "f", "description": text}}],
                "tool_choice": "required",
            },
        ),
    ]
    wait_until(live.idle)
    begin = time.process_time()
    for path, body in bodies * 3:
        refused = httpx.post(live.url + path, json={"model": "tiny"} | body, timeout=60)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        assert re.search(r"maximum context length is 1024 tokens\. However, .* at least \d{4,}", refused.text)
    taken = time.process_time() - begin
    begin = time.process_time()
    live.engine.encode(text)
    assert taken / 9 < (time.process_time() - begin) / 2
