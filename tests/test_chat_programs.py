"""2-eval.py and 0-eval_pretrain.py: modes, files, thinking apart, default weights, mistakes of the user."""

import argparse
import importlib
import io
import json
import os
import re

import pytest
import torch

from common.errors import UserError
from inference import open_model
from inference.stream_text import ThinkingStream
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import load_model, save_weights

chat = importlib.import_module("2-eval")
continue_texts = importlib.import_module("0-eval_pretrain")
SHORT = ["--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """out/ with a base model, two chat models (the newest in a folder of its own), an adapter and a resume state."""
    root = tmp_path_factory.mktemp("chat")
    config = LMConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_seq_len=128, initializer_range=0.2)
    names = ("full_sft_32.pth", "demo/dpo_32.pth", "pretrain_32.pth", "lora/identity_32.pth", "dpo_32_resume.pth")
    for age, name in enumerate(names):
        torch.manual_seed(age)
        path = root / "out" / name
        stage = name.split("/")[-1].rsplit("_", 1)[0]
        save_weights(path, MiniMindForCausalLM(config), load_tokenizer(), {"stage": stage, "seq_len": 64})
        os.utime(path, (1000 + age, 1000 + age))
    return root


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


# ------------------------------------------------------------------------------------------------------------ modes
def test_questions_are_scored_and_every_text_is_kept(capsys):
    rows = [
        {"question": "天空是什么颜色？", "answer": "蓝", "kind": "a"},
        {"question": "1+1=?", "answer": "2", "rivals": ["3"], "kind": None},
    ]
    chat.main(["--questions", write("q.jsonl", "\n".join(map(json.dumps, rows))), *SHORT])
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["n"] == 2 and set(result["by_kind"]) == {"a", "all"} and 0 <= result["accuracy"] <= 1
    assert result["weights"] == "out/demo/dpo_32.pth" and "tokens" in captured.err
    with open(result["answers_file"], encoding="utf-8") as file:
        kept = [json.loads(line) for line in file]
    assert [row["question"] for row in kept] == [row["question"] for row in rows]
    assert sum(row["right"] for row in kept) == result["accuracy"] * 2 and all(row["generated"] for row in kept)


def test_right_answers_count(capsys, monkeypatch):
    """The gold answer is what the model says: then it is right; the same as a rival too: then it is wrong."""
    question = write("q.txt", "你好")
    chat.main(["--prompts", question, *SHORT])
    kept = json.loads(capsys.readouterr().out.splitlines()[-1])["answers_file"]
    with open(kept, encoding="utf-8") as file:
        said = json.loads(file.readline())["generated"]
    rows = [{"question": "你好", "answer": said, "kind": k, "rivals": r} for k, r in (("x", []), ("y", [said[:2]]))]
    chat.main(
        ["--questions", write("gold.jsonl", "\n".join(map(json.dumps, rows))), *SHORT, "--answers_file", "a/b.jsonl"]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["by_kind"]["x"] == 1.0 and result["answers_file"] == "a/b.jsonl"


def test_questions_before_a_question_are_answered_by_the_model_itself(capsys):
    """The answer equals that to the whole conversation, in which the model's own answers were written down."""
    said, turns = [], []
    for text in ("你好", "那里呢？", "再说说。"):
        turns = [*turns, {"role": "user", "content": text}]
        chat.main(["--prompts", write("whole.jsonl", json.dumps({"messages": turns})), *SHORT])
        with open(json.loads(capsys.readouterr().out.splitlines()[-1])["answers_file"], encoding="utf-8") as file:
            said.append(json.loads(file.readline())["generated"])
        turns = [*turns, {"role": "assistant", "content": said[-1]}]
    rows = [
        {"question": "你好", "answer": "x"},
        {"question": "再说说。", "answer": "x", "history": ["你好", "那里呢？"]},
    ]
    chat.main(["--questions", write("talk.jsonl", "\n".join(map(json.dumps, rows))), *SHORT])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    with open(result["answers_file"], encoding="utf-8") as file:
        kept = [json.loads(line)["generated"] for line in file]
    assert kept == [said[0], said[2]] and result["broken"] == sum("\ufffd" in text for text in kept)
    assert result["refused"] == {"all": 0}


def test_compare_writes_a_table(capsys):
    turns = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "x"}]
    file = write("p.jsonl", json.dumps({"prompt": "a|b"}) + "\n" + json.dumps({"conversations": turns}))
    chat.main(["--prompts", file, "--compare", "out/full_sft_32.pth", "out/demo/dpo_32.pth", *SHORT])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| prompt | `out/full_sft_32.pth` | `out/demo/dpo_32.pth` |" and lines[1] == "|---|---|---|"
    assert lines[2].startswith("| a\\|b | ") and lines[3].startswith("| c | ") and len(lines) == 4


def test_answers_that_match_a_schema(capsys):
    schema = write("s.json", json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}))
    chat.main(["--prompts", write("q.txt", "你好\nHello\n"), "--schema", schema, "--max_new_tokens", "20"])
    kept = json.loads(capsys.readouterr().out.splitlines()[-1])["answers_file"]
    with open(kept, encoding="utf-8") as file:
        assert all(json.loads(json.loads(line)["generated"])["a"] in (1, 2) for line in file)
    for text, words in (('{"uniqueItems": true}', "uniqueItems"), ("{", "not JSON")):
        with pytest.raises(UserError, match=f"--schema bad.json: .*{words}"):
            chat.main(["--schema", write("bad.json", text)])
    with pytest.raises(UserError, match="cannot read the schema nowhere.json: No such file"):
        chat.main(["--schema", "nowhere.json"])


def test_a_chat_remembers_and_forgets(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n在吗\n/clear\n你好\n\n"))
    chat.main(["--temperature", "0", "--history", "1", *SHORT])
    captured = capsys.readouterr()
    _, first, second, clear, again, _ = captured.out.split("> ")
    assert first == again and clear == ""  # after /clear the same question gets the same greedy answer
    prompts = [int(line.split()[1]) for line in captured.err.splitlines() if line.startswith("[prompt")]
    assert prompts[0] == prompts[2] < prompts[1]


def test_a_chat_is_introduced_and_left(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\nquit\n你好\n"))
    chat.main(["--weight", "out/full_sft_32.pth", *SHORT])
    captured = capsys.readouterr()
    assert captured.out.count("> ") == 2 and captured.err.count("[prompt") == 1
    assert re.search("To leave: exit|退出：exit", captured.err.split("[prompt")[0])


def test_base_model_continues_texts(capsys):
    continue_texts.main(["从前", "--temperature", "0", *SHORT])
    captured = capsys.readouterr()
    assert captured.out.startswith("\n从前") and captured.err.startswith("out/pretrain_32.pth: pretrain")
    continue_texts.main(["--prompts", write("t.txt", "从前\n\nOnce\n"), "--temperature", "0", *SHORT])
    assert capsys.readouterr().out.startswith(captured.out)


def test_bits_per_byte_of_files(capsys):
    names = [write(f"{i}.jsonl", json.dumps({"text": text})) for i, text in enumerate(("你好，世界。", "hello"))]
    continue_texts.main(["--score", *names])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == names and all(bits > 0 for bits in result.values())
    with pytest.raises(UserError, match="nowhere.jsonl"):
        continue_texts.main(["--score", "nowhere.jsonl"])


# --------------------------------------------------------------------------------------------------------- thinking
@pytest.mark.parametrize(
    ("text", "opened", "thought", "said"),
    [
        ("<think>\n1+1\n</think>\n\n2", False, "1+1", "2"),
        ("1+1\n</think>\n\n2", True, "1+1", "2"),
        ("never ends", True, "never ends", ""),
        ("plain <think> later", False, None, "plain <think> later"),
        ("", False, None, ""),
    ],
)
def test_thinking_is_told_apart_however_the_text_is_cut(text, opened, thought, said):
    for size in (1, 2, 7, 100):
        stream, got = ThinkingStream(opened), {True: "", False: ""}
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        for i, piece in enumerate(pieces):
            for is_thought, part in stream.feed(piece, final=i == len(pieces) - 1):
                got[is_thought] += part
        assert (got[True].strip(), got[False].strip()) == (thought or "", said)


# ------------------------------------------------------------------------------------------- flags, files, mistakes
def test_rope_scaling_takes_the_trained_length_from_the_record():
    args = chat.parse(["--rope_scaling", "yarn:4"])
    engine, _ = open_model.open_engine(args, "out/full_sft_32.pth")
    rope = engine.source.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 64)
    assert engine.context == 256
    for wrong in ("yarn", "yarn:0.5", "ntk:2", "linear:x"):
        with pytest.raises(argparse.ArgumentTypeError):
            open_model.rope_scaling(wrong)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (chat, ["--weight", "nowhere.pth"], "nowhere.pth"),
        (chat, ["--prompts", "nowhere.txt"], "nowhere.txt"),
        (chat, ["--compare", "a"], "--prompts"),
        (chat, ["--history", "-1"], "--history"),
        (chat, ["--top_p", "2"], "top_p"),
        (chat, ["--max_new_tokens", "0"], "--max_new_tokens"),
        (chat, ["--device", "tpu9"], "--device tpu9"),
        (continue_texts, ["x" * 2000], "context of 128"),
    ],
)
def test_mistakes_are_one_line(program, arguments, message, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    with pytest.raises(UserError, match=message) as caught:
        program.main(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"question": "x"\n', ":1: not JSON"),
        ('{"prompt": "x"}\n[1]\n', ":2: a row must be a JSON object"),
        ('{"text": "x"}\n', ':1: no text under "prompt"'),
        ('{"question": "x"}\n', ':1: no "answer"'),
        ("\udcff", "not UTF-8"),
        ('{"question": "x", "answer": "y", "rivals": "abc"}\n', ':1: "rivals" must be a list of texts'),
        ('{"question": "x", "answer": "y", "rivals": [5]}\n', ':1: "rivals" must be a list of texts'),
        ('{"question": "x", "answer": "y", "kind": ["a"]}\n', ':1: "kind" must be a text'),
        ('{"question": "x", "answer": "y", "history": [1]}\n', ':1: "history" must be a list of questions'),
        ('{"conversations": [1], "answer": "y"}\n', ':1: "conversations" must be a list of messages'),
        ('{"conversations": [{"role": "assistant"}], "answer": "y"}\n', ":1: the conversation asks nothing"),
        ("[" * 100_000, ":1: not JSON"),
    ],
)
def test_bad_question_files(content, message):
    with open("bad.jsonl", "wb") as file:
        file.write(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        chat.main(["--questions", "bad.jsonl", *SHORT])


def test_without_weights_the_next_command_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python 3-full_sft.py"):
        chat.main([])
    with pytest.raises(UserError, match="python 1-pretrain.py"):
        continue_texts.main([])


def test_weights_without_tokenizer_ask_for_one(tmp_path):
    model, _, record = load_model("out/full_sft_32.pth")
    save_weights(tmp_path / "bare_32.pth", model, None, record)
    with pytest.raises(UserError, match="--tokenizer"):
        chat.main(["--weight", str(tmp_path / "bare_32.pth")])


def test_as_many_rows_as_have_room():
    engine, _ = open_model.open_engine(chat.parse([]), "out/full_sft_32.pth")
    whole = 2 * 1 * 2 * 16 * 4 * engine.context  # keys and values, one layer, two heads of 16, fp32
    assert open_model.rows_that_fit(engine, free=4 * 5 * whole) == 5
    assert open_model.rows_that_fit(engine, free=0) == 1 and open_model.rows_that_fit(engine, free=2**40) == 32
    assert 1 <= open_model.rows_that_fit(engine) <= 32
