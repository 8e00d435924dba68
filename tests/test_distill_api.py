"""Answers from a teacher behind HTTP: a stub server speaks the protocol, fails in every way, and counts."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cleaning.distill import distill
from common.chat_api import ChatApi
from common.errors import RunFailed, UserError
from data.reading import iter_rows
from data_process import main


class Stub(ThreadingHTTPServer):
    """Answers "答：" + the last message, 10 tokens each; `plan` maps a prompt to what goes wrong with it first."""

    daemon_threads = True

    def __init__(self, plan=None, slow=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.slow = plan or {}, slow
        self.asked, self.now, self.most, self.requests = Counter(), 0, 0, []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def teacher(self, **flags):
        return ChatApi(f"http://127.0.0.1:{self.server_port}/v1", "stub", **{"timeout": 5} | flags)


ODD = {  # in place of a message
    "parts": {"content": [{"type": "text", "text": "答"}]},
    "no object": "答",
    "half a character": {"content": "\ud83d"},
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        stub = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        with stub.lock:
            stub.asked[prompt] += 1
            stub.requests.append((self.path, self.headers.get("Authorization"), request))
            stub.now += 1
            stub.most = max(stub.most, stub.now)
        time.sleep(stub.slow)
        with stub.lock:
            stub.now -= 1
        wrong = stub.plan.get(prompt, [])[stub.asked[prompt] - 1 : stub.asked[prompt]] or stub.plan.get(None, [])
        self.answer(prompt, wrong[0] if wrong else "well")

    def answer(self, prompt, how):
        if how == "hang up":
            self.connection.close()
            return
        status = how if isinstance(how, int) else 200
        message = {"role": "assistant", "content": "" if how == "empty" else f"答：{prompt}"}
        if how in ODD:
            message = ODD[how]
        if how == "thinks":
            message["reasoning_content"] = "想一想"
        reason = {"long": "length", "filtered": "content_filter"}.get(how, "stop")
        choice = {"index": 0, "message": message, "finish_reason": reason}
        reply = {"object": "chat.completion", "choices": [choice]}
        reply |= {} if how == "uncounted" else {"usage": {"total_tokens": 10}}
        body = b"<html>" if how == "nonsense" else json.dumps(reply if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "0.01")
        if status in (301, 302, 303, 307, 308):
            self.send_header("Location", self.server.moved_to)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization"), None))
        self.answer("", "well")

    def log_message(self, *args):
        pass


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"问题{i}\n" for i in range(12)), encoding="utf-8")
    return path


def answers(path):
    return [messages[-1]["content"] for messages in iter_rows([path], "chat")]


def test_rows_come_in_the_order_of_the_prompts_after_retries(prompts, tmp_path):
    stub = Stub({"问题1": [429, 500], "问题2": ["hang up", 503], "问题4": ["thinks"]}, slow=0.02)
    out = tmp_path / "out.jsonl"
    result = distill(prompts, out, stub.teacher(api_key="secret"), system="简短", in_flight=3)
    assert answers(out) == [f"答：问题{i}" for i in range(12)]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"conversations": [
        {"role": "user", "content": "问题0"}, {"role": "assistant", "content": "答：问题0"}]}  # fmt: skip
    assert rows[4]["conversations"][1]["reasoning_content"] == "想一想"
    assert stub.asked["问题1"] == stub.asked["问题2"] == 3
    assert 2 <= stub.most <= 3  # requests in flight
    path, key, request = stub.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and request["max_tokens"] == 1024
    assert request["messages"][0] == {"role": "system", "content": "简短"}
    assert result["complete"] and result["rows"] == 12 and result["tokens"] == 120
    assert not (tmp_path / "out.jsonl.answers").exists()


def test_the_command(prompts, tmp_path, monkeypatch, capsys):
    stub, out = Stub(), tmp_path / "out.jsonl"
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    prompts.write_text("一\u2028二\r\n三\n", encoding="utf-8")
    main(["distill", str(prompts), "--out", str(out), "--base_url", stub.teacher().base_url,
                       "--model", "m", "--max_tokens", "9"])  # fmt: skip
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 2
    assert answers(out) == ["答：一\u2028二", "答：三"]
    assert [(key, r["model"], r["max_tokens"]) for _, key, r in stub.requests] == [("Bearer k", "m", 9)] * 2


def test_limits_stop_a_run_and_the_next_goes_on_without_asking_twice(prompts, tmp_path):
    stub, out = Stub(), tmp_path / "out.jsonl"
    teacher = stub.teacher(max_tokens=10)
    first = distill(prompts, out, teacher, in_flight=2, max_requests=5)
    assert (first["rows"], first["complete"], first["asked"]) == (5, False, 5) and len(answers(out)) == 5
    second = distill(prompts, out, teacher, in_flight=2, token_budget=90)
    assert second["rows"] == 9 and second["tokens"] == 90
    with pytest.raises(UserError, match="other prompts or settings"):
        distill(prompts, out, stub.teacher(max_tokens=11))
    journal = tmp_path / "out.jsonl.answers"
    journal.write_bytes(journal.read_bytes()[:-7])  # as a kill in the middle of a line leaves it
    third = distill(prompts, out, teacher)
    assert third["complete"] and answers(out) == [f"答：问题{i}" for i in range(12)]
    assert max(stub.asked.values()) == 2 and sum(stub.asked.values()) == 13  # the torn answer alone was asked twice


def test_answers_that_are_no_good_are_counted_and_asked_again_later(prompts, tmp_path):
    stub = Stub({"问题0": ["long"], "问题1": ["empty"], "问题2": [403], "问题3": ["parts"],
                 "问题4": ["no object"], "问题5": ["nonsense"], "问题6": ["half a character"],
                 "问题7": ["filtered"]})  # fmt: skip
    out = tmp_path / "out.jsonl"
    result = distill(prompts, out, stub.teacher(retries=0), in_flight=1)
    wrong = {"cut at max_tokens": 1, "empty answer": 1, "status 403": 1, "no chat completion in the reply": 4,
             "cut by the server's filter": 1}  # fmt: skip
    assert result["failed"] == wrong and result["rows"] == 4 and not result["complete"]
    result = distill(prompts, out, stub.teacher(), in_flight=1)
    assert result["failed"] == {} and len(answers(out)) == 12 and stub.asked["问题8"] == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_server(status, prompts, tmp_path):
    stub, other = Stub({None: [status]}), Stub()
    stub.moved_to = f"{other.teacher().base_url}/chat/completions"
    with pytest.raises(UserError, match=f"answers {status}: moved to {stub.moved_to}; name where it is"):
        distill(prompts, tmp_path / "out.jsonl", stub.teacher(api_key="secret"))
    assert not other.requests


def test_a_budget_that_the_server_does_not_count_is_refused_and_what_was_paid_is_kept(prompts, tmp_path):
    stub, out = Stub({None: ["uncounted"]}), tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="--token_budget: the server does not say"):
        distill(prompts, out, stub.teacher(), in_flight=1, token_budget=10_000)
    assert stub.asked.total() == len(answers(out)) == 1
    assert distill(prompts, out, stub.teacher())["complete"] and stub.asked.total() == 12


def test_a_finished_file_is_not_asked_for_again_nor_lost(prompts, tmp_path):
    stub, out = Stub(), tmp_path / "out.jsonl"
    distill(prompts, out, stub.teacher())
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"out\.jsonl is there, and no run"):
        distill(prompts, out, Stub({None: [401]}).teacher())
    assert out.read_bytes() == before and sum(stub.asked.values()) == 12


def test_answers_under_way_when_a_run_ends_are_kept(prompts, tmp_path):
    stub, out = Stub({"问题0": [401], "问题1": [500, 500]}, slow=0.2), tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="answers 401"):
        distill(prompts, out, stub.teacher(), in_flight=4)
    assert set(answers(out)) == {f"答：{prompt}" for prompt in stub.asked} - {"答：问题0"} and len(answers(out)) >= 2


def test_what_no_retry_can_mend_is_one_line(prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="answers 401"):
        distill(prompts, out, Stub({None: [401]}).teacher())
    many = tmp_path / "many.txt"
    many.write_text("".join(f"{i}\n" for i in range(40)), encoding="utf-8")
    stub = Stub({None: [500]})
    with pytest.raises(RunFailed, match=r"20 prompts failed one after another \(status 500 "):
        distill(many, tmp_path / "many.jsonl", stub.teacher(retries=0), in_flight=1)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="no prompts"):
        distill(empty, out, ChatApi("http://x", "x"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--base_url", "localhost:1/v1"), "write it as http://HOST:PORT/v1"),
        (("--base_url", "http://127.0.0.1:8998x/v1"), "write it as http://HOST:PORT/v1"),
        (("--api_key", "sk-abc\n"), "--api_key"),
        (("--temperature", "nan"), "--temperature must be at least 0"),
        (("--timeout", "0"), "--timeout must be at least 0.1"),
        (("--timeout", "inf"), "--timeout must be at least 0.1"),
        (("--retries", "-1"), "--retries must be at least 0"),
        (("--max_requests", "-1"), "--max_requests must be at least 1"),
        (("--in_flight", "0"), "--in_flight must be from 1"),
    ],
)
def test_what_no_request_can_be_made_of(flags, message, prompts, tmp_path):
    out = str(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=message):
        main(["distill", str(prompts), "--out", out, "--model", "x", "--base_url", "http://h/v1", *flags])
    assert not list(tmp_path.glob("out*"))


def test_prompts_are_not_written_over(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl is there"):
        distill(path, path, Stub().teacher(), max_requests=1)
    assert len(path.read_text().splitlines()) == 2


def test_a_conversation_with_tools_is_refused(tmp_path):
    user, path = {"role": "user", "content": "甲"}, tmp_path / "p.jsonl"
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    for row, key in (
        ({"messages": [user], "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [user, called, user]}, "tool_calls"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=f'p.jsonl:1: "{key}" in the conversation'):
            distill(path, tmp_path / "out.jsonl", ChatApi("http://x", "x"))
