"""The figures of the report, counted by hand."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from cleaning.report import describe, histogram, histogram_of, quantiles
from common.errors import UserError
from data.row_shapes import BadRow, parse
from data_process import main
from model.tokenizer import encode_text, load_tokenizer, render


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_figures_of_lengths_by_hand():
    values = np.array([1, 16, 17, 32, 33, 100])
    assert histogram(values) == {"<=16": 2, "<=32": 2, "<=64": 1, "<=128": 1}
    assert histogram_of(np.array([1, 1, 2, 9, 12])) == {"1": 2, "2": 1, "9+": 2}
    found = quantiles(np.arange(1, 101))
    assert found == {"min": 1, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100, "mean": 50.5}


def test_a_file_of_texts(tmp_path, capsys):
    texts = ["白日依山尽，黄河入海流。", "The cat sat on the mat.", "白日依山尽，黄河入海流。", "12+30=42"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts] + [{"x": 1}])
    main(["report", str(path), "--plot", str(tmp_path / "a.png"), "--workers", "1", "--samples", "4"])
    out = capsys.readouterr().out
    result = json.loads(out.strip().splitlines()[-1])
    assert "4 rows of pretraining text, 1 bad rows left out" in out and all(text in out for text in set(texts))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = load_tokenizer()
    assert result["tokens"] == sum(len(encode_text(tokenizer, text)) + 2 for text in texts)
    assert result["learned_tokens"] == result["tokens"] - 4  # a document's first token has nothing before it
    assert result["characters"] == sum(map(len, texts)) and result["utf8_bytes"] == sum(len(t.encode()) for t in texts)
    assert result["languages"] == {"zh": 0.5, "en": 0.25, "none": 0.25}
    assert (result["rows"], result["bad_rows"], result["exact_copies"], result["near_copies"]) == (4, 1, 1, 0)


def test_conversations_and_pairs(tmp_path):
    user, reply = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}
    chat = describe(write(tmp_path / "c.jsonl", [{"conversations": [user, reply] * n} for n in (1, 2, 2)]))
    tokenizer = load_tokenizer()
    ids, mask = render(tokenizer, [user, reply])
    twice, twice_mask = render(tokenizer, [user, reply] * 2)
    assert chat["turns"] == {"1": 1, "2": 2} and chat["exact_copies"] == 1
    assert chat["tokens"] == len(ids) + 2 * len(twice) and chat["learned_tokens"] == sum(mask) + 2 * sum(twice_mask)
    bad = reply | {"content": "走开"}
    pair = describe(write(tmp_path / "p.jsonl", [{"chosen": [user, reply], "rejected": [user, bad]}]))
    other, other_mask = render(tokenizer, [user, bad])
    assert pair["kind"] == "pair" and pair["tokens"] == len(ids) + len(other)
    assert pair["learned_tokens"] == sum(mask) + sum(other_mask)


def test_an_equal_signature_alone_is_a_near_copy(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(100))
    found = describe(write(tmp_path / "a.jsonl", [{"text": text}, {"text": text + "。"}, {"text": text}]))
    assert (found["exact_copies"], found["near_copies"]) == (1, 1)


def test_rows_that_no_stage_can_read_are_bad_rows(tmp_path):
    texts = [{"text": "白日依山尽"}, {"text": "a\ud800"}, {"text": None}, {"text": 5}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    found = describe(tmp_path / "a.jsonl")
    assert (found["rows"], found["bad_rows"]) == (1, 3)
    with pytest.raises(BadRow, match="not null"):
        parse({"text": None}, "text")
    user, reply = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}
    call = reply | {"tool_calls": [{"name": "f", "arguments": {"城": "北京"}}]}  # a list is what stages read, too
    odd = [reply | {"content": "\ud800"}, reply | {"tool_calls": "5"}, reply | {"reasoning_content": 5}]
    rows = [{"conversations": [user, answer]} for answer in (reply, call, *odd)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = describe(tmp_path / "c.jsonl", samples=9)
    assert (found["rows"], found["bad_rows"]) == (2, 3) and any("北京" in text for text in found["samples"])


def test_more_processes_give_the_same_report(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"第{i}行，{'字' * (i % 50)}。"} for i in range(600)])
    assert describe(path, workers=1) == describe(path, workers=2)


def test_a_file_without_rows_is_one_line(tmp_path):
    for rows, said in (([{"text": ""}], "no usable rows"), ([], "is empty")):
        with pytest.raises(UserError, match=said):
            describe(write(tmp_path / "a.jsonl", rows))


def test_a_row_of_a_table_that_has_no_json_is_a_bad_row(tmp_path):
    tools = [[{"name": b"f"}], None]
    rows = [
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "tools": t}
        for t in tools
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = describe(tmp_path / "a.parquet")
    assert (found["rows"], found["bad_rows"]) == (1, 1)
