"""A judge behind an API: both orders, agreement, scores by hand, and everything that can go wrong with it."""

import contextlib
import importlib
import json
import re
import socket
import threading

import pytest
import stage
from stub_api import StubApi

from common.errors import RunFailed, UserError
from exams import judge

chat = importlib.import_module("2-eval")
QUESTIONS = ["q0", "q1", "q2"]
COLUMNS = [["xx", "x", "xx"], ["x", "xx", "yy"]]
PARTS = re.compile(r"\[Answer \d\]\n(.*?)\n\[End of answer", re.DOTALL)


def answers_of(request) -> list[str]:
    return PARTS.findall(request["messages"][-1]["content"])


def by_length(request):
    """An honest judge: the longer the better, in both orders."""
    first, second = map(len, answers_of(request))
    scores = {"answer_1": min(first + 2, 10), "answer_2": min(second + 2, 10)}
    return f'Well, {{"answer_1": 1, "answer_2": 2}}? No:\n{json.dumps(scores)}'


def judged(reply, columns=COLUMNS, names=("A", "B")):
    with StubApi(reply) as stub:
        api = judge.connect(stub.address, None, "secret")
        assert api.model == "stub" and api.temperature == 0
        told = []
        verdicts = judge.judge(api, QUESTIONS, columns, lambda *of: told.append(of))
        pairs = len(QUESTIONS) * len(columns) * (len(columns) - 1) // 2
        assert told == [(i, pairs) for i in range(1, pairs + 1)] and set(stub.keys) == {"Bearer secret"}
        return judge.summarise(verdicts, names), verdicts, stub.requests


def test_an_honest_judge():
    summary, verdicts, requests = judged(by_length)
    assert summary["pairs"] == [{
        "a": "A", "b": "B", "wins_a": 1, "wins_b": 1, "ties": 1, "no_verdict": 0, "agreement": 1.0,
        "first_preferred": 2, "verdicts": 6,
    }]  # fmt: skip
    assert summary["scores"] == {"A": pytest.approx(11 / 3), "B": pytest.approx(11 / 3)}  # 4, 3, 4 and 3, 4, 4, twice
    assert [v.scores for v in verdicts] == [((4, 3), (4, 3)), ((3, 4), (3, 4)), ((4, 4), (4, 4))]
    seen = sorted(tuple(answers_of(request)) for request in requests)
    assert seen == sorted([("xx", "x"), ("x", "xx")] * 2 + [("xx", "yy"), ("yy", "xx")])  # each pair in both orders
    assert "| `A` | `B` | 1 | 1 | 1 | 0 | 100% |" in judge.table(summary)


def test_a_judge_that_likes_what_it_reads_first_decides_nothing():
    summary, _, _ = judged(lambda request: '{"answer_1": 9, "answer_2": 1.5}')
    (pair,) = summary["pairs"]
    assert (pair["wins_a"], pair["wins_b"], pair["ties"], pair["agreement"]) == (0, 0, 3, 0.0)
    assert pair["first_preferred"] == pair["verdicts"] == 6 and summary["scores"] == {"A": 5.25, "B": 5.25}


def test_three_models_are_three_pairs():
    summary, _, requests = judged(by_length, [["x"] * 3, ["xx"] * 3, ["xxx"] * 3], ("A", "B", "C"))
    assert [(p["a"], p["b"], p["wins_b"]) for p in summary["pairs"]] == [("A", "B", 3), ("A", "C", 3), ("B", "C", 3)]
    assert summary["scores"] == {"A": 3, "B": 4, "C": 5} and len(requests) == 18


@pytest.mark.parametrize(
    "said", ["the first one", '{"answer_1": 0, "answer_2": 11}', '{"answer_1": 1.2.3, "answer_2": 1}', "", 400]
)
def test_a_reply_without_scores_is_no_verdict(said):
    summary, verdicts, _ = judged(lambda request: said if answers_of(request) == ["xx", "x"] else by_length(request))
    (pair,) = summary["pairs"]
    # "xx" before "x" stands in question 0 as it is and in question 1 swapped: question 2 is left, a tie
    assert (pair["no_verdict"], pair["wins_a"], pair["wins_b"], pair["ties"], pair["verdicts"]) == (2, 0, 0, 1, 2)
    assert [v.scores for v in verdicts] == [(None, (4, 3)), ((3, 4), None), ((4, 4), (4, 4))]
    assert summary["scores"] == {"A": (4 + 3 + 4 + 4) / 4, "B": (3 + 4 + 4 + 4) / 4}
    with pytest.raises(RunFailed, match="no verdict in 6 replies"):
        judged(lambda request: said)


@contextlib.contextmanager
def silent_server(said: bytes):
    """A server that says this to whoever comes first, and no more -> its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(said)

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def test_a_server_that_cannot_be_asked():
    with pytest.raises(UserError, match="is the server running"):
        judge.connect("http://127.0.0.1:9/v1", None, "")
    with pytest.raises(UserError, match="http://HOST:PORT"):
        judge.connect("127.0.0.1:9", None, "")
    for address in ("http://127.0.0.1:8998x/v1", "http://[::1/v1", "http://"):
        with pytest.raises(UserError, match="http://HOST:PORT"):
            judge.connect(address, "m", "")
    with silent_server(b"\0no HTTP at all\r\n\r\n") as address, pytest.raises(UserError, match="is the server running"):
        judge.connect(address, None, "")
    with StubApi(lambda request: 401) as stub, pytest.raises(UserError, match="answers 401"):
        judge.judge(judge.connect(stub.address, "m", ""), QUESTIONS, COLUMNS, lambda *of: None)
    with StubApi(by_length) as stub:
        stub.models = {"data": []}
        with pytest.raises(UserError, match="--judge_model"):
            judge.connect(stub.address, None, "")
        stub.models = 404
        with pytest.raises(UserError, match="--judge_model"):
            judge.connect(stub.address, None, "")
        assert judge.connect(stub.address, "mine", "").model == "mine"
        stub.models = 401
        with pytest.raises(UserError, match="OPENAI_API_KEY"):
            judge.connect(stub.address, "mine", "")


def test_the_program_judges_what_it_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    paths = [str(stage.chat_weights(tmp_path / name, seed).relative_to(tmp_path)) for seed, name in enumerate("ab", 1)]
    turns = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    rows = [{"prompt": "你好"}, {"conversations": turns}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with StubApi(by_length) as stub:
        flags = ["--prompts", "p.jsonl", "--max_new_tokens", "8", "--judge", stub.address]
        chat.main([*flags, "--compare", *paths])
        printed = capsys.readouterr().out
        result = json.loads(printed.splitlines()[-1])
        assert len(stub.requests) == 4 and stub.keys == ["Bearer sesame"] * 4
        assert any("user: 一\n\nassistant: 二\n\nuser: 三" in r["messages"][0]["content"] for r in stub.requests)
        with pytest.raises(UserError, match="two or more"):
            chat.main([*flags, "--compare", paths[0]])
    assert (result["n"], result["judge_model"], list(result["scores"])) == (2, "stub", paths)
    assert "orders agree" in printed and printed.startswith("| prompt |")
    kept = [json.loads(line) for line in (tmp_path / result["answers_file"]).read_text("utf-8").splitlines()]
    assert [row["question"] for row in kept] == ["你好", "user: 一\n\nassistant: 二\n\nuser: 三"]
    assert all(len(row["answers"]) == len(row["scores"]) == len(row["replies"]) == 2 for row in kept)
