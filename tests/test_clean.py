"""Rows of every shape come out right, bad input costs no more than itself, and each dropped row has its reason."""

import contextlib
import copy
import csv
import gzip
import json
import os
import random
import resource
import signal
import tracemalloc
from functools import partial

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cleaning.clean import Settings, clean, clean_row
from cleaning.filters import PROFILES, Profile, check_row, language_of, lost_share, repetition, symbol_share
from cleaning.normalise import normalise_text
from cleaning.published_shapes import to_row
from common.errors import run_main
from data.files import find_files
from data.reading import dirty_rows, iter_rows
from data.row_shapes import BadRow, Dropped, parse, parse_record, record_text
from data_process import main
from model.tokenizer import load_tokenizer, render

PROSE = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reason_of(row, kind="text", profile=PROFILES["default"]):
    """The reason for which a row is dropped, or None."""
    try:
        check_row(to_row(row, kind), profile)
    except BadRow as bad:
        return bad.reason


# -------------------------------------------------------------------------------------------------------------- shapes
QUESTION, ANSWER = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}


@pytest.mark.parametrize("record", [
    {"conversations": [QUESTION, ANSWER]},
    {"messages": [QUESTION, ANSWER, QUESTION]},  # a last question that nobody answers is left out
    {"conversations": json.dumps([QUESTION, ANSWER])},
    {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    {"instruction": "问", "input": "", "output": "答"},
    {"history": "[]", "q": "问", "a": "答"},
    {"history": [], "input": "", "q": "问", "output": "", "a": "答"},
    {"question": "问", "answer": "答"},
    {"prompt": "问", "response": "答", "score": 3},
])  # fmt: skip
def test_published_chat_shapes_become_one(record):
    assert to_row(record, "chat") == {"conversations": [QUESTION, ANSWER]}


def test_chat_shapes_with_more_in_them():
    v1 = {"history": "[['早', '早上好']]", "q": "问", "a": "答"}
    assert [m["content"] for m in to_row(v1, "chat")["conversations"]] == ["早", "早上好", "问", "答"]
    raw_v1 = {"history": [["早", "早上好"]], "input": "前", "q": "问", "output": "先", "a": "答"}
    assert [m["content"] for m in to_row(raw_v1, "chat")["conversations"]] == ["早", "早上好", "前问", "先答"]
    alpaca = {"instruction": "译", "input": "hello", "output": "你好", "system": "简短"}
    assert [(m["role"], m["content"]) for m in to_row(alpaca, "chat")["conversations"]] == [
        ("system", "简短"), ("user", "译\nhello"), ("assistant", "你好")]  # fmt: skip
    call = {"name": "f", "arguments": {}}
    sharegpt = {"tools": "[1]", "conversations": [
        {"from": "human", "value": "问"}, {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "答"}]}  # fmt: skip
    messages = to_row(sharegpt, "chat")["conversations"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0]["tools"] == "[1]" and json.loads(messages[2]["tool_calls"]) == [call]
    v3 = {"conversations": [QUESTION, ANSWER | {"reasoning_content": "想", "tools": None, "extra": 1}]}
    assert to_row(v3, "chat")["conversations"][1] == ANSWER | {"reasoning_content": "想"}


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {
    "name": "f", "arguments": '{"n": 1}'}}]}  # fmt: skip
OPENAI = {"messages": [QUESTION, CALL, {"role": "tool", "tool_call_id": "c1", "content": "3"}, ANSWER], "tools": TOOLS,
          "parallel_tool_calls": False}  # fmt: skip
WRONG = ANSWER | {"content": "错"}


@pytest.mark.parametrize("beside, system", [
    ({"tools": TOOLS}, {"content": "", "tools": json.dumps(TOOLS)}), ({"system": "短"}, {"content": "短"}),
    ({"tools": json.dumps(TOOLS), "system": "短"}, {"content": "短", "tools": json.dumps(TOOLS)}),
])  # fmt: skip
@pytest.mark.parametrize("record", [
    {"messages": [QUESTION, ANSWER]},
    {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    {"instruction": "问", "output": "答"}, {"q": "问", "a": "答"}, {"question": "问", "answer": "答"},
    {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WRONG]}, {"prompt": "问", "chosen": "答", "rejected": "错"},
    {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [WRONG]},
])  # fmt: skip
def test_tools_and_system_beside_the_messages_become_a_system_message(record, beside, system):
    row = to_row(record | beside, "pair" if "chosen" in record else "chat")
    for messages in row.values():
        assert messages[:2] == [{"role": "system", **system}, QUESTION]
    assert not any(key in clean_row(record, Settings(to="dpo" if "chosen" in record else "sft")) for key in beside)


def test_tools_join_a_system_message_that_is_there():
    first = {"role": "system", "content": "短"}
    for tools in (TOOLS, json.dumps(TOOLS)):
        row = to_row({"messages": [first, QUESTION, ANSWER], "tools": tools, "system": "短"}, "chat")
        assert row["conversations"] == [first | {"tools": json.dumps(TOOLS)}, QUESTION, ANSWER]


def test_openais_fine_tuning_rows_are_read(tmp_path):
    row = clean_row(OPENAI, Settings(to="sft"))
    assert [m["role"] for m in row["conversations"]] == ["system", "user", "assistant", "tool", "assistant"]
    text = record_text(OPENAI)
    assert record_text(row) == text and '"name": "f"' in text and "parameters" in text
    tokenizer = load_tokenizer()
    expected = render(tokenizer, OPENAI["messages"], tools=TOOLS)[0]
    assert render(tokenizer, row["conversations"])[0] == expected == render(tokenizer, parse(OPENAI, "chat"))[0]


@pytest.mark.parametrize("record", [
    {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER | {"content": "错"}]},
    {"chosen": [QUESTION, ANSWER], "reject": [QUESTION, ANSWER | {"content": "错"}]},
    {"prompt": "问", "chosen": "答", "rejected": "错"},
    {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "错"}]},
    {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "答"},
     "rejected": {"from": "gpt", "value": "错"}},
    {"instruction": "问", "input": "", "chosen": "答", "rejected": "错"},
])  # fmt: skip
def test_published_preference_shapes_become_one(record):
    row = to_row(record, "pair")
    assert row == {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER | {"content": "错"}]}
    assert to_row(record, "any")["text"] == "问\n答\n错"


@pytest.mark.parametrize("record, word", [
    ({"a": 1}, "no conversation"), ({"conversations": "x"}, "not JSON"), ({"conversations": [ANSWER]}, "first turn"),
    ({"conversations": [QUESTION, QUESTION, ANSWER]}, "two user turns"), ({"q": None, "a": "x"}, "must be a string"),
    ({"history": "__import__('os')", "q": "问", "a": "答"}, "history"),
    ({"history": "[{[]: 1}]", "q": "问", "a": "答"}, "history"),
    ({"instruction": ["a"], "output": "x"}, "'instruction' must be a string, not list"),
    ({"instruction": "问", "input": 5, "output": "x"}, "'input' must be a string, not int"),
    ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "role"),
    ({"messages": [{"role": {}, "content": "x"}]}, "role"),
    ({"messages": [QUESTION, ANSWER | {"reasoning_content": 5}]}, "reasoning_content"),
    ({"system": 5, "messages": [QUESTION, ANSWER]}, '"system" must be a string'),
    ({"system": "长", "messages": [{"role": "system", "content": "短"}, QUESTION, ANSWER]}, '"system" stands beside'),
    ({"tools": "[1]", "messages": [{"role": "system", "content": "", "tools": "[2]"}, QUESTION, ANSWER]},
     '"tools" stands beside'),
    ({"functions": [{"name": "f"}], "messages": [QUESTION, ANSWER]}, '"functions" is OpenAI'),
    ({"messages": [QUESTION, ANSWER | {"function_call": {"name": "f", "arguments": "{}"}}]}, '"function_call"'),
    ({"messages": [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER]}, 'message 1 has "weight" 0'),
    ({"messages": [QUESTION, ANSWER | {"tool_calls": [b"x"]}]}, "JSON"),
])  # fmt: skip
def test_what_is_no_conversation_is_dropped_with_its_reason(record, word):
    with pytest.raises(BadRow) as bad:
        to_row(record, "chat")
    assert bad.value.reason == "wrong shape" and word in bad.value.detail


def test_a_null_is_called_null_and_a_prompt_must_be_a_string():
    for record, kind, said in (
        ({"content": None}, "text", "'content' must be a string, not null"),
        ({"x": 1}, "text", "no key 'text' (found: x)"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "pair", "'prompt' must be a string"),
    ):
        with pytest.raises(BadRow) as bad:
            to_row(record, kind)
        assert said in bad.value.detail


def test_what_the_stages_refuse_to_render_is_no_clean_row():
    for key, value in (("tool_calls", "no JSON"), ("tool_calls", "5"), ("tool_calls", [{"arguments": {}}])):
        with pytest.raises(BadRow) as bad:
            clean_row({"messages": [QUESTION, ANSWER | {key: value}]}, Settings(to="sft"))
        assert bad.value.reason == "wrong shape"
    call = ANSWER | {"tool_calls": [{"name": "f", "arguments": {}}]}
    assert clean_row({"messages": [QUESTION, call]}, Settings(to="sft"))


GOOD = (
    {"text": PROSE}, {"conversations": [QUESTION, ANSWER]}, {"question": "问", "answer": "答"},
    {"tools": "[]", "conversations": [{"from": "human", "value": "问"}, {"from": "function_call", "value": "{}"},
                                      {"from": "gpt", "value": "答"}]},
    {"history": [["早", "早上好"]], "input": "前", "q": "问", "output": "先", "a": "答"},
    {"system": "简短", "instruction": "译", "input": "hello", "output": "你好"},
    {"system": "简短", "prompt": "问", "chosen": "答", "rejected": "错"},
    {"chosen": [QUESTION, ANSWER], "reject": [QUESTION, ANSWER | {"content": "错"}]},
)  # fmt: skip
ODD = (None, True, 5, float("nan"), 10**400, "a\ud800b", "[" * 5000, "[[1]]", "[{[]: 1}]", b"x", [], ["a"], [[1, 2]],
       "", {}, {"a": 1}, QUESTION, [{"role": [], "content": {}}], [{"from": {}, "value": []}], (1, 2))  # fmt: skip
MORE_KEYS = ("history", "input", "system", "tools", "tool_calls", "reasoning_content", "role", "from")


def test_no_row_of_any_type_ends_a_run():
    """Good rows, one or two of whose values were exchanged: they are kept, or dropped with a reason, nothing else."""
    rng, kept = random.Random(7), 0
    for _ in range(2000):
        record = copy.deepcopy(rng.choice(GOOD))
        messages = [m for value in record.values() if isinstance(value, list) for m in value if isinstance(m, dict)]
        for _ in range(rng.randint(1, 2)):
            target = rng.choice([record, *messages])
            target[rng.choice([*target, *MORE_KEYS])] = copy.deepcopy(rng.choice(ODD))
        for to in ("pretrain", "sft", "dpo", "tokenizer"):
            try:
                kept += bool(clean_row(record, Settings(to=to)))
            except BadRow as bad:
                assert bad.reason
        for read in (lambda r: parse(r, "text"), lambda r: parse(r, "chat"), lambda r: parse(r, "pair"), record_text):
            with contextlib.suppress(BadRow):
                read(record)
    assert kept > 100


# --------------------------------------------------------------------------------------------------------- normalising
@pytest.mark.parametrize("text, expected", [
    ("a\r\nb\rc\u2028d", "a\nb\nc\nd"), ("Ａ１，（好）②", "A1，（好）②"), ("\ufeff零\u200b宽\u00ad", "零宽"),
    ("　　段首\n　　又一段", "段首\n又一段"), ("e\u0301", "é"), ("a\n\n\n\n\nb \t", "a\n\nb"),
    ("  code\tx", "  code\tx"), ("半\ud83d个", "半个"), ("👨\u200d👩", "👨\u200d👩"),
    (" \n\t", ""), ("\x00\x07a\x85b", "a\nb"),
])  # fmt: skip
def test_normalising_by_hand(text, expected):
    assert normalise_text(text) == expected


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=60))
def test_normalising_twice_is_normalising_once(text):
    once = normalise_text(text)
    assert normalise_text(once) == once
    once.encode("utf-8")


# ------------------------------------------------------------------------------------------------------------- filters
def test_measures_by_hand():
    assert symbol_share("ab## ") == 0.5 and symbol_share("x = {a: 1}，好！") == 0
    assert lost_share("中\ufffd国<unk>") == pytest.approx(2 / 8)
    assert repetition("0123456789abcdefghij" * 2) == pytest.approx(13 / 33)  # 33 8-grams, 20 of them different
    assert repetition("| --------------- |       |") < 0.1  # padding of a table


@pytest.mark.parametrize("text, language", [
    (PROSE, "zh"), ("The cat sat on the mat.", "en"), ("これは日本語の文章です", "ja"), ("안녕하세요", "ko"),
    ("12+3=15", "none"), ("Съешь же ещё этих мягких булок", "cyrillic"), ("Les élèves ont été très étonnés", "latin"),
    ("int k = len(x) - 1; while (k > 0) { x[k] = y[k]; k--; } " * 12, "code"), ("使用 numpy 和 torch 训练模型", "zh"),
    ("kucing duduk di atas tikar lalu tidur " * 10, "latin"),
])  # fmt: skip
def test_languages(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize("row, kind, reason", [
    ({"text": PROSE}, "text", None), ({"text": "短"}, "text", "too short"), ({"text": ""}, "text", "empty"),
    ({"text": "■◇●★" * 9 + PROSE}, "text", "symbol noise"),
    ({"text": "好好学习天天向上" * 30}, "text", "repetition"),
    ({"text": PROSE + "锟斤拷" * 3}, "text", "lost characters"),
    ({"text": "Les élèves ont été très étonnés"}, "text", "other language"),
    ({"question": "你是谁？", "answer": "我是{{name}}。"}, "chat", "unfilled placeholder"),
    ({"question": "在吗？", "answer": ""}, "chat", "empty answer"),
    ({"question": "请重复这句话给我听", "answer": "请重复这句话给我听"}, "chat", "answer repeats the question"),
    ({"question": "1+1", "answer": "2"}, "chat", None),
])  # fmt: skip
def test_each_reason(row, kind, reason):
    assert reason_of(row, kind) == reason


def test_minimind_v1_thresholds():
    v1 = PROFILES["minimind-v1"]
    long_question, answer = "请介绍一下中国的首都在哪里", "中国的首都是北京市"
    for question, reply, reason in (
        (long_question, answer, None), ("首都在哪里", answer, "too short"), (long_question, "北京市吧", "too short"),
        (long_question, "好" * 257, "too long"), (long_question, "好" * 256, None),
        (long_question, "答" * 9 + "a", "too little Chinese"), (long_question, "答" * 10 + "a", None),
    ):  # fmt: skip
        assert reason_of({"question": question, "answer": reply}, "chat", v1) == reason
    assert reason_of({"text": "a" * 512}, "text", v1) is None
    assert reason_of({"text": "a" * 513}, "text", v1) == "too long"


def test_thresholds_can_be_set_one_by_one():
    strict = Profile(min_chars=100)
    assert reason_of({"text": PROSE}, profile=strict) == "too short"
    with pytest.raises(Dropped, match="too short"):
        clean_row({"text": PROSE}, Settings(profile=strict))


# ------------------------------------------------------------------------------------------------------ reading dirt
def reasons_in(path, **flags):
    return [row.raw.reason if isinstance(row.raw, Dropped) else None for row in dirty_rows(path, **flags)]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"text": f"{PROSE}{i}\n第二行"} for i in range(5)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    with open(tmp_path / "d.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    (tmp_path / "f.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    for path in sorted(tmp_path.iterdir()):
        found = [row.raw if isinstance(row.raw, dict) else json.loads(row.raw) for row in dirty_rows(path)]
        assert found == rows, path.name


def test_a_broken_quote_costs_one_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('q,a\n一,1\n"二,2\n三,3\n"四\n四",4\n五,5,6\n"六"x,6\n七,7\n', encoding="utf-8")
    rows = list(dirty_rows(path))
    assert [row.raw.row for row in rows if isinstance(row.raw, Dropped)][1:] == ["五,5,6\n", '"六"x,6\n']
    kept = [row.raw for row in rows if isinstance(row.raw, dict)]
    assert [row["q"] for row in kept] == ["一", "三", "四\n四", "七"]
    assert [(row.line, row.raw.reason) for row in rows if isinstance(row.raw, Dropped)] == [
        (3, "broken CSV"), (7, "broken CSV"), (8, "broken CSV")]  # fmt: skip


def test_a_line_that_cannot_be_read_costs_the_open_quote_before_it_no_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('q,a\n"一,1\n二,2\n'.encode() + b"\xff\xff,3\n" + "四,4\n".encode())
    rows = list(dirty_rows(path))
    assert [row.raw["q"] for row in rows if isinstance(row.raw, dict)] == ["二", "四"]
    assert [(row.line, row.raw.reason) for row in rows if isinstance(row.raw, Dropped)] == [
        (2, "broken CSV"), (4, "not UTF-8")]  # fmt: skip


def test_gb18030_is_said_and_converted_by_flag(tmp_path):
    utf8, gb = json.dumps({"text": PROSE}, ensure_ascii=False), json.dumps({"text": PROSE + "又"}, ensure_ascii=False)
    (tmp_path / "mixed.jsonl").write_bytes(utf8.encode() + b"\n" + gb.encode("gb18030") + b"\n" + b"{\xff\xff}\n")
    (tmp_path / "old.txt").write_bytes((PROSE + "二").encode("gb18030"))
    (tmp_path / "old.csv").write_bytes(f"text\n{PROSE}三\n".encode("gb18030"))
    (tmp_path / "old.json").write_bytes(json.dumps([{"text": PROSE + "四"}], ensure_ascii=False).encode("gb18030"))
    rows = [row for path in sorted(tmp_path.iterdir()) for row in dirty_rows(path)]
    details = [row.raw.detail for row in rows if isinstance(row.raw, Dropped) and row.raw.reason == "not UTF-8"]
    assert len(details) == 5 and sum("--encoding gb18030" in detail for detail in details) == 4
    summary = clean([tmp_path], tmp_path.parent / "converted", Settings(encoding="gb18030", dedup="exact"))
    assert summary["kept"] == 5 and summary["converted_from_gb18030"] == 4 and summary["reasons"] == {"not UTF-8": 1}
    texts = {row["text"] for row in read_rows(tmp_path.parent / "converted" / "pretrain.jsonl")}
    assert texts == {PROSE + end for end in ("", "又", "二", "三", "四")}


def test_one_line_of_another_encoding_costs_a_document_that_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("一行\n".encode() + "二行\n".encode("gb18030") + b"\xff\xff\n" + "四行".encode())
    lost, gb, document = sorted(dirty_rows(path), key=lambda row: (isinstance(row.raw, dict), -row.line))
    assert document.raw == {"text": "一行\n四行"} and not document.converted
    assert (gb.line, lost.line) == (2, 3) and "--encoding gb18030" in gb.raw.detail
    assert gb.raw.row == "\\xb6\\xfe\\xd0\\xd0\n" and lost.raw.row == "\\xff\\xff\n"
    lost, document = dirty_rows(path, "gb18030")
    assert document.raw == {"text": "一行\n二行\n四行"} and document.converted and lost.line == 3
    lines = [row.raw for row in dirty_rows(path, "gb18030", "line") if not isinstance(row.raw, Dropped)]
    assert lines == [{"text": f"{n}行{end}"} for n, end in (("一", "\n"), ("二", "\n"), ("四", ""))]


def test_a_header_that_is_not_utf8_costs_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("正文\n".encode("gb18030") + f"{PROSE}\n{PROSE}\n".encode())
    assert reasons_in(path) == ["not UTF-8"]
    assert [row.raw for row in dirty_rows(path, "gb18030")] == [{"正文": PROSE}] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_of_500_mb_is_passed_over_in_little_memory(tmp_path, name):
    path, good = tmp_path / name, PROSE if name == "a.csv" else json.dumps({"text": PROSE})
    with open(path, "wb") as file:
        file.write(b"text\n" if name == "a.csv" else b"")
        file.write(b"a" * 100_000)
        file.seek(500 * 2**20)  # a hole: it reads as zeros and takes no disk
        file.write(b"\n" + good.encode() + b"\n")
    tracemalloc.start()
    long, good = dirty_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert long.raw.reason == "line too long" and long.raw.row == "a" * 2000
    assert not isinstance(good.raw, Dropped) and peak < 200 * 2**20


def test_links_that_are_not_followed_are_named(tmp_path, capsys):
    raw, far = tmp_path / "raw", tmp_path / "far"
    raw.mkdir()
    far.mkdir()
    write_rows(far / "c.jsonl", [{"text": PROSE + "三"}])
    write_rows(raw / "a.jsonl", [{"text": PROSE}])
    for name, to in (("circle", ".."), ("itself", "itself"), ("far", "../far"), ("gone.jsonl", "nowhere.jsonl")):
        (raw / name).symlink_to(to)
    (raw / "b.jsonl").symlink_to("../far/c.jsonl")  # a file, wherever it lies
    summary = clean([raw], tmp_path / "out", Settings(dedup="none"))
    assert summary["kept"] == 2
    assert [os.path.basename(name) for name in summary["files_not_read"]] == ["circle", "far", "gone.jsonl", "itself"]
    assert "4 files of other kinds, or links, not read: circle, far, gone.jsonl" in capsys.readouterr().out


def test_whole_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\0\0\0\rIHDR" * 50)
    (tmp_path / "utf16.txt").write_bytes("中文".encode("utf-16"))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": PROSE}).encode() * 3000)[:-20])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "array.json").write_text('[{"text": "一"}, {"text": ', encoding="utf-8")
    expected = {
        "picture.txt": "binary file", "utf16.txt": "binary file", "empty.jsonl": "empty file",
        "cut.jsonl.gz": "unreadable file", "no.parquet": "unreadable file", "array.json": "not JSON",
    }  # fmt: skip
    for name, reason in expected.items():
        assert reasons_in(tmp_path / name)[-1] == reason, name
    for name in ("a.pdf", "b.PDF", "c.doc", "d.doc"):
        (tmp_path / name).write_bytes(b"%PDF")
    write_rows(tmp_path / "z.jsonl", [{"text": PROSE}])
    summary = clean([tmp_path], tmp_path.parent / "dirt", Settings())
    assert summary["kept"] == 1 and summary["files_not_read"][0] == str(tmp_path / "a.pdf")
    assert "4 files of other kinds, or links, not read: a.pdf, b.PDF, c.doc, ..." in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_damaged_file_is_named_and_what_it_holds_before_the_damage_is_kept(ending, tmp_path, capsys):
    rows, path = [{"text": f"{PROSE}第{i}遍。"} for i in range(600)], tmp_path / f"a.{ending}"
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    parts = [b"".join(lines[i : i + 200]) for i in (0, 200, 400)]
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=200, compression="zstd")
        data = path.read_bytes()
        last = data.rindex(b"\x28\xb5\x2f\xfd")  # where the last page's frame begins
        path.write_bytes(data[:last] + b"?" * 9 + data[last + 9 :])
    else:
        compress = gzip.compress if ending == "jsonl.gz" else partial(pyarrow.compress, codec="zstd", asbytes=True)
        path.write_bytes(b"".join(map(compress, parts))[:-40])
    settings = Settings(dedup="none", keep_dropped=True)
    summary = clean([path, write_rows(tmp_path / "z.jsonl", [{"text": PROSE}])], tmp_path / "out", settings)
    assert summary["files_damaged"] == {str(path): summary["kept"] - 1} and 200 <= summary["kept"] < 601
    assert summary["reasons"] == {"unreadable file": 1}
    said = f"warning: {path} cannot be read to its end, only {summary['kept'] - 1} rows of it\n"
    assert said in capsys.readouterr().err
    (line,) = read_rows(tmp_path / "out" / "dropped.jsonl")
    assert line["detail"].startswith(f"from row {summary['kept']} on: ")


def test_endings_in_capitals_and_markdown_are_read(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(json.dumps({"text": PROSE}).encode()))
    (tmp_path / "B.TXT").write_text(PROSE, encoding="utf-8")
    (tmp_path / "C.md").write_text(PROSE, encoding="utf-8")
    files, others = find_files(tmp_path)
    assert len(files) == 3 and not others
    assert [parse_record(row.raw) for file in files for row in dirty_rows(file)] == [{"text": PROSE}] * 3


def test_elements_of_an_array_that_are_no_rows_are_shown(tmp_path):
    path, out = tmp_path / "a.json", tmp_path / "out"
    path.write_text(json.dumps([{"text": PROSE}, ["一"], 5], ensure_ascii=False), encoding="utf-8")
    assert clean([path], out, Settings(keep_dropped=True))["reasons"] == {"wrong shape": 2}
    assert [(row["line"], row["row"]) for row in read_rows(out / "dropped.jsonl")] == [(2, '["一"]'), (3, "5")]


def test_a_dropped_row_of_a_table_may_hold_bytes_and_dates(tmp_path):
    rows = [{"text": PROSE, "b": None}, {"text": None, "b": b"\xff"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    clean([tmp_path / "a.parquet"], tmp_path / "out", Settings(keep_dropped=True))
    assert [row["row"]["b"] for row in read_rows(tmp_path / "out" / "dropped.jsonl")] == ["b'\\xff'"]


def test_a_text_file_is_a_document_cut_at_blank_lines_or_a_row_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(("一二三四五\n" * 5000 + "\n") * 9, encoding="utf-8")  # 30,001 a block, a cut above 100,000
    pieces = [row.raw["text"] for row in dirty_rows(path)]
    assert len(pieces) == 3 and "\n".join(pieces) == path.read_text(encoding="utf-8")
    assert all(piece.startswith("一") for piece in pieces)
    assert len(list(dirty_rows(path, txt_rows="line"))) == 45_000


# --------------------------------------------------------------------------------------------------------- the command
def run(*argv, capsys=None):
    """(exit code, last line of stdout, stderr) of data_process.py, in this process."""
    code = 0
    try:
        run_main(main, list(map(str, argv)))
    except SystemExit as error:
        code = error.code
    out = capsys.readouterr()
    return code, out.out.strip().splitlines()[-1] if out.out.strip() else "", out.err


def test_clean_writes_what_the_stages_read_and_says_what_it_dropped(tmp_path, capsys):
    numerals = "零一二三四五六七八九"
    rows = [{"instruction": f"请把数字{i}写成汉字", "output": f"数字{i}写成汉字是{numerals[i]}"} for i in range(10)]
    raw = write_rows(tmp_path / "raw.jsonl", [*rows, rows[3], {"x": 1}, {"instruction": "空", "output": ""}])
    flags = ("--to", "sft", "--out_dir", tmp_path / "out", "--keep_dropped", "--workers", 1)
    code, last, _ = run("clean", "--data_path", raw, *flags, capsys=capsys)
    summary = json.loads(last)
    assert code == 0 and (summary["rows"], summary["kept"], summary["dropped"]) == (13, 10, 3)
    assert summary["reasons"] == {"wrong shape": 1, "empty answer": 1, "exact copy": 1}
    assert [row[1]["content"] for row in iter_rows([tmp_path / "out" / "sft.jsonl"], "chat")] == [
        row["output"] for row in rows]  # fmt: skip
    dropped = {row["reason"]: row for row in read_rows(tmp_path / "out" / "dropped.jsonl")}
    assert dropped["exact copy"]["line"] == 11 and dropped["exact copy"]["detail"].endswith("raw.jsonl:4")
    assert json.loads(dropped["wrong shape"]["row"]) == {"x": 1}

    code, _, err = run("clean", "--data_path", raw, *flags, capsys=capsys)
    assert code == 2 and "--overwrite" in err
    code, last, _ = run("clean", "--data_path", raw, *flags, "--seed", 1, "--overwrite", capsys=capsys)
    assert code == 0 and json.loads(last)["seed"] == 1


@pytest.mark.parametrize("to, record", [
    ("pretrain", {"text": PROSE}), ("tokenizer", {"question": PROSE, "answer": PROSE}),
    ("dpo", {"prompt": "问题是什么？", "chosen": "好的回答在这里", "rejected": "差的回答在那里"}),
])  # fmt: skip
def test_every_stage_has_its_file(tmp_path, to, record):
    clean([write_rows(tmp_path / "raw.jsonl", [record])], tmp_path / "out", Settings(to=to))
    kind = "pair" if to == "dpo" else "text"
    assert len(list(iter_rows([tmp_path / "out" / f"{to}.jsonl"], kind))) == 1


def test_mistakes_cost_one_line_and_leave_nothing(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    good = write_rows(tmp_path / "raw" / "a.jsonl", [{"text": PROSE}])
    parquet.write_table(pyarrow.table({"title": ["一"]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("title,body\n一,二\n", encoding="utf-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").write_text("mine", encoding="utf-8")
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "短"}] * 3)
    out = tmp_path / "out"
    for argv, said in (
        ((tmp_path / "raw", "--out_dir", tmp_path / "raw" / "out"), "inside the input folder"),
        ((good, "--out_dir", tmp_path / "raw", "--overwrite"), "inside the output folder"),
        ((tmp_path / "b.parquet", "--out_dir", out), "no column for --to pretrain (its columns: title)"),
        ((tmp_path / "c.csv", "--out_dir", out), "--text_key"),
        ((tmp_path / "nothing", "--out_dir", out), "no such file or folder"),
        ((good, "--out_dir", tmp_path / "mine", "--overwrite"), "was not written by this command"),
        ((bad, "--out_dir", out), "no row is left: 3 x too short"),
        ((good, "--out_dir", out, "--weights", 1, 2), "2 numbers for 1 paths"),
        ((good, "--out_dir", out, "--heldout", 0.9), "--heldout"),
        ((good, "--out_dir", out, "--heldout", "nan"), "--heldout"),
        ((good, "--out_dir", out, "--threshold", "nan"), "--threshold"),
        ((good, "--out_dir", out, "--max_symbols", "nan"), "--max_symbols"),
        ((good, "--out_dir", out, "--weights", "nan"), "each a number"),
        ((good, "--out_dir", out, "--weights", "inf"), "each a number"),
        ((good, "--out_dir", out, "--weights", 0), "nothing would be written"),
        ((good, tmp_path / "raw", "--out_dir", out, "--weights", 1, 2), "given twice with different --weights"),
        ((good, "--out_dir", "."), "give the new folder a name"),
        ((good, "--out_dir", tmp_path / "c.csv" / "x"), "cannot make"),
        ((good, "--out_dir", out, "--languages", "zh", "klingon"), "klingon"),
        ((good, "--out_dir", out, "--to", "sft", "--min_chars", 5), "--min_chars would change nothing"),
        ((good, "--out_dir", out, "--to", "dpo", "--text_key", "x"), "--text_key would change nothing"),
        (
            (good, "--out_dir", out, "--to", "sft", "--profile", "minimind-v1", "--max_symbols", 1),
            "--profile minimind-v1",
        ),
        ((good, "--out_dir", out, "--dedup", "exact", "--threshold", 0.8), "it is for --dedup near"),
    ):
        code, _, err = run("clean", "--data_path", *argv, "--workers", 1, capsys=capsys)
        assert code == 2 and said in err and err.count("\n") == 1, (argv, err)
        assert not out.exists() and not (tmp_path / "out.building").exists()
    assert (tmp_path / "mine" / "keep.txt").exists()
    assert run("clean", "--data_path", tmp_path / "c.csv", "--out_dir", out, "--text_key", "body", "--min_chars", 1,
               capsys=capsys)[0] == 0  # fmt: skip


def test_a_full_disk_is_one_line_and_the_second_start_finishes(tmp_path, capfd):
    """The system refuses to let a file grow past 200 kB, as it refuses on a full disk."""
    raw = write_rows(tmp_path / "raw.jsonl", [{"text": f"{i}：{PROSE * 3}{i}"} for i in range(3000)])
    argv = ["clean", "--data_path", str(raw), "--out_dir", str(tmp_path / "out"), "--dedup", "none", "--workers", "1"]
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            run_main(main, argv)
        except SystemExit as error:
            os._exit(error.code)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    err = capfd.readouterr().err
    assert f"failed: {tmp_path}/out.building: File too large (the disk at /" in err and err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.building").exists()
    run_main(main, argv)
    assert len(read_rows(tmp_path / "out" / "pretrain.jsonl")) == 3000


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    raw = write_rows(tmp_path / "raw.jsonl", [{"text": PROSE}])
    (tmp_path / "out.building").write_text("a file of this name", encoding="utf-8")
    code, _, err = run("clean", "--data_path", raw, "--out_dir", tmp_path / "out", capsys=capsys)
    assert code == 2 and "cannot write into" in err and err.count("\n") == 1


def test_overwrite_replaces_nothing_that_this_command_did_not_write(tmp_path, capsys):
    raw, out = write_rows(tmp_path / "raw.jsonl", [{"text": PROSE}]), tmp_path / "out"
    flags = ("clean", "--data_path", raw, "--out_dir", out, "--overwrite", "--workers", 1)
    out.mkdir()
    for text in ("no JSON", "[]", '{"loss": 1}', '{"stage": "full_sft"}'):
        (out / "summary.json").write_text(text, encoding="utf-8")
        code, _, err = run(*flags, capsys=capsys)
        assert code == 2 and "was not written by this command" in err and err.count("\n") == 1
        assert (out / "summary.json").read_text(encoding="utf-8") == text
    (out / "summary.json").unlink()
    assert run(*flags, capsys=capsys)[0] == 0
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    code, _, err = run(*flags, capsys=capsys)
    assert code == 2 and "holds notes.txt" in err and (out / "notes.txt").exists()
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    assert run(*flags, capsys=capsys)[0] == 0
    building = tmp_path / "out.building"  # a folder of the user's that happens to have this name
    building.mkdir()
    (building / "thesis.txt").write_text("mine", encoding="utf-8")
    code, _, err = run(*flags, capsys=capsys)
    assert code == 2 and "holds thesis.txt" in err and (building / "thesis.txt").exists()


# ---------------------------------------------------------------------------------------------------------------- fill
def test_fill(tmp_path, capsys):
    answer = ANSWER | {"content": "我是{{name}}，由{{ author }}训练。"}
    rows = [{"conversations": [QUESTION, answer]}, {"answer": "{{name}}"}]
    raw, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl"
    code, last, _ = run("fill", raw, "--set", "name=小智", "--set", "author=a=b", "--out", out, capsys=capsys)
    assert code == 0 and json.loads(last)["filled"] == 3
    filled = read_rows(out)
    assert filled[0]["conversations"][1]["content"] == "我是小智，由a=b训练。" and filled[1] == {"answer": "小智"}
    out.unlink()
    for flags, said in ((("--set", "name=x"), "{{author}}"), (("--set", "nme=x", "--set", "author=y"), "{{name}}"),
                        (("--set", "name=x", "--set", "author=y", "--set", "city=z"), "no placeholder {{city}}"),
                        (("--set", "name"), "name=value")):  # fmt: skip
        code, _, err = run("fill", raw, *flags, "--out", out, capsys=capsys)
        assert code == 2 and said in err and not out.exists()
