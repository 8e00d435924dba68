"""The data path from a file to tensors: caches, splits, rows and their order."""

import contextlib
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cleaning import report
from cleaning.fill import fill
from common.errors import UserError
from data import reading
from data import token_cache as cache_module
from data.prompts import read_prompts
from data.reading import iter_rows, iter_texts
from data.rows import IGNORED, ROWS, ChatRows, TextRows, packed_splits, split_documents, token_bytes
from data.token_cache import encode_batch, tokenised
from inference.engine import Engine
from model.chat_template import ROLES
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_document, load_tokenizer, render
from model.tokenizer_files import tokenizer_hash
from trainer.losses import learned_bytes, lm_loss
from trainer.problems import read_problems

TOKENIZER = load_tokenizer()
TEXTS = [f"第{i}篇。" + "春天来了，花儿开了。" * (i % 23 + 1) + f" The end of no. {i}." for i in range(120)]


def exchange(i: int) -> list[dict]:
    return [
        {"role": "user", "content": f"{i}加{i}等于几？"},
        {"role": "assistant", "content": f"等于{2 * i}。" * (i % 9 + 1)},
    ]


CHATS = [exchange(i) * (i % 4 + 1) for i in range(80)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def text_file(tmp_path):
    return write_jsonl(tmp_path / "text.jsonl", [{"text": t} for t in TEXTS])


@pytest.fixture
def chat_file(tmp_path):
    return write_jsonl(tmp_path / "chat.jsonl", [{"conversations": c} for c in CHATS])


def all_documents(rows, epoch=0):
    """Every (document text's ids, labels) found in the rows of an epoch, item by item."""
    found = []
    for start in range(epoch * len(rows), (epoch + 1) * len(rows)):
        batch = rows.batch([start])
        ids, labels, segments = (batch[k][0] for k in ("input_ids", "labels", "segment_ids"))
        for segment in range(1, int(segments.max()) + 1):
            where = segments == segment
            found.append((ids[where].tolist(), labels[where].tolist()))
    return found


# ---------------------------------------------------------------------------------------------------------- caches
def test_cache_holds_the_documents_and_is_found_again(text_file, tmp_path):
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    assert len(cache) == len(TEXTS)
    for i in (0, 7, 119):
        ids = cache.tokens[cache.offsets[i] : cache.offsets[i + 1]]
        assert ids.tolist() == encode_document(TOKENIZER, TEXTS[i])
    again = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    assert again.folder == cache.folder and len(list((tmp_path / "c").iterdir())) == 1
    text_file.write_text(text_file.read_text(encoding="utf-8").replace("第3篇", "第三篇"), encoding="utf-8")
    assert tokenised(text_file, "text", TOKENIZER, tmp_path / "c").folder != cache.folder


def test_chat_cache_holds_renders_ids_and_mask(chat_file, tmp_path):
    cache = tokenised(chat_file, "chat", TOKENIZER, tmp_path / "c")
    for i in (0, 5, 79):
        ids, mask = render(TOKENIZER, CHATS[i])
        place = slice(cache.offsets[i], cache.offsets[i + 1])
        assert cache.tokens[place].tolist() == ids and cache.learn[place].tolist() == mask
        assert cache.learned[i] == sum(mask)
        roles = cache.roles[cache.turn_offsets[i] : cache.turn_offsets[i + 1]]
        assert [ROLES[role] for role in roles] == [message["role"] for message in CHATS[i]]


def test_workers_give_the_same_cache_as_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH_CHARS", 2000)
    file = write_jsonl(tmp_path / "big.jsonl", [{"text": t} for t in TEXTS * 3])
    one = tokenised(file, "text", TOKENIZER, tmp_path / "one", workers=1)
    two = tokenised(file, "text", TOKENIZER, tmp_path / "two", workers=2)
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.hashes, two.hashes)


def test_gzip_and_zstandard_and_csv_and_parquet_and_txt_read_alike(tmp_path):
    import pandas
    import pyarrow

    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    pandas.DataFrame({"text": TEXTS}).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("一本书\n\n第二段", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"):
        assert list(iter_texts([tmp_path / name])) == TEXTS, name
    assert list(iter_texts([tmp_path / "a.txt"])) == ["一本书\n\n第二段"]


TOOLS = [{"type": "function", "function": {"name": "f", "description": "算", "parameters": {"n": {"type": "integer"}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
CALLED = [{"role": "user", "content": "f(1)？"}, {"role": "assistant", "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "c1", "content": "3"},
          {"role": "assistant", "content": "是3。"}]  # fmt: skip
SYSTEM = {"role": "system", "content": "简短回答。"}


@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("spell", [lambda tools: tools, json.dumps])
def test_tools_beside_the_messages_are_seen_as_inference_builds_them(system, spell, tmp_path):
    """OpenAI's fine-tuning rows, and ShareGPT's with "system": the ids are those of a prompt with tools."""
    tools, called = spell(TOOLS), [*system, *CALLED]
    rows = [{"messages": called, "tools": tools, "parallel_tool_calls": False}]
    rows += [{"conversations": CALLED, "tools": tools, "system": SYSTEM["content"] if system else ""}]
    chats = tokenised(write_jsonl(tmp_path / "a.jsonl", rows), "chat", TOKENIZER, tmp_path / "c")
    ids, mask = render(TOKENIZER, called, tools=TOOLS)
    assert chats.tokens.tolist() == ids * 2 and chats.learn.tolist() == mask * 2
    prompt = render(TOKENIZER, called[:-1], tools=TOOLS, add_generation_prompt=True)[0]
    assert ids[: len(prompt)] == prompt
    answers = CALLED[-1], {"role": "assistant", "content": "是4。"}
    row = {"chosen": [*called[:-1], answers[0]], "rejected": [*called[:-1], answers[1]], "tools": tools}
    pairs = tokenised(write_jsonl(tmp_path / "p.jsonl", [row]), "pair", TOKENIZER, tmp_path / "c")
    chosen, rejected = pairs.tokens[: len(ids)].tolist(), pairs.tokens[len(ids) :].tolist()
    assert chosen == ids and rejected[: len(prompt)] == prompt


def beside(**keys):
    return {"messages": [SYSTEM, *exchange(1)]} | keys


def altered(**keys):
    question, answer = exchange(1)
    return {"messages": [question, answer | keys]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (beside(functions=[{"name": "f"}]), '"functions" is OpenAI\'s older form'),
        (beside(system="别的"), '"system" stands beside the messages, and their system message has content of its own'),
        (beside(system=5), '"system" must be a string'),
        (beside(tools="no JSON"), "tools is not JSON"),
        (beside(tools={"name": "f"}), "tools must be a list of objects"),
        ({"messages": [SYSTEM | {"tools": TOOLS}, *exchange(1)], "tools": TOOLS * 2}, '"tools" stands beside'),
        (altered(function_call={"name": "f", "arguments": "{}"}), 'message 1 has a "function_call"'),
        (altered(weight=0), 'message 1 has "weight" 0'),
        (altered(content=None), 'message 1 needs a string under "content"'),
        ({"messages": [exchange(1)[0], {"role": "function", "content": "3"}, exchange(1)[1]]}, "role 'function'"),
    ],
)
def test_what_beside_the_messages_is_not_read_is_refused_by_name(row, message, tmp_path):
    with pytest.raises(UserError, match=f"x.jsonl:1: .*{message}"):
        tokenised(write_jsonl(tmp_path / "x.jsonl", [row]), "chat", TOKENIZER, tmp_path / "c")


def test_what_has_no_json_is_a_bad_line():
    """Bytes and dates of a Parquet file."""
    rows = [(7, {"messages": exchange(1), "tools": [{"name": b"f"}]}), (8, {"messages": exchange(1)})]
    arrays, bad = cache_module.encode_batch(rows, "chat", TOKENIZER)
    assert [line for line, _ in bad] == [7] and "JSON" in bad[0][1] and len(arrays["lengths"]) == 1


def test_nothing_beside_the_messages_is_nothing(tmp_path):
    rows = [beside(tools=tools, system="", functions=None) for tools in (None, "", [], "[]")]
    rows += [beside(), beside(system=SYSTEM["content"]), altered(weight=1, function_call=None)]
    cache = tokenised(write_jsonl(tmp_path / "x.jsonl", rows), "chat", TOKENIZER, tmp_path / "c")
    assert cache.tokens[: cache.offsets[6]].tolist() == render(TOKENIZER, [SYSTEM, *exchange(1)])[0] * 6


def damaged_files(folder) -> list:
    """Files of 600 rows each of which a part cannot be read."""
    import pandas
    import pyarrow

    texts = [f"{TEXTS[i % 120]} {i}" for i in range(600)]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    frames = [pyarrow.compress(b"".join(lines[i : i + 200]), "zstd", asbytes=True) for i in (0, 200, 400)]
    members = [bytearray(gzip.compress(b"".join(part))) for part in (lines[:300], lines[300:])]
    members[1][10] = 7  # behind its header: a block of a kind that there is not
    table = folder / "whole.parquet"
    pandas.DataFrame({"text": texts}).to_parquet(table, row_group_size=200)
    pages = table.read_bytes()
    content = {
        "cut.jsonl.gz": members[0][:-9], "flipped.jsonl.gz": b"".join(members),
        "cut.jsonl.zst": b"".join(frames)[:-100],
        "cut_once.jsonl.zst": pyarrow.compress(b"".join(lines), "zstd", asbytes=True)[:-4],
        "flipped.jsonl.zst": b"".join(frames[:2]) + b"?" * 100, "cut.parquet": pages[: len(pages) // 2],
        "hole.parquet": pages[:15000] + b"\xff" * 99 + pages[15099:],
    }  # fmt: skip
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in content]


def test_what_cannot_be_read_of_a_file_is_one_line_with_file_and_row(tmp_path):
    for path in damaged_files(tmp_path):
        with pytest.raises(UserError, match=rf"^{path}: cannot be read past (line|row) \d+: [^\n]+$") as caught:
            list(iter_texts([path]))
        last = int(re.search(r"past \w+ (\d+)", str(caught.value))[1])
        assert last >= {"cut.parquet": 0, "flipped.jsonl.zst": 300}.get(path.name, 1), path


def test_a_parquet_file_that_gives_fewer_rows_than_it_says_is_damaged(tmp_path):
    """pyarrow reads such a file without an error."""
    from pyarrow import Table, lib, parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(Table.from_pylist([{"text": f"text {i}"} for i in range(600)]), path, row_group_size=200)
    whole = path.read_bytes()
    for place in range(len(whole) - 900, len(whole)):  # in the counts of its row groups
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with contextlib.suppress(lib.ArrowException, OSError), parquet.ParquetFile(path) as file:
            if sum(map(len, file.iter_batches())) < 600:
                break
    with pytest.raises(UserError, match=r"a.parquet: cannot be read past row \d+: it should have 600 rows"):
        list(iter_texts([path]))


def test_all_frames_of_a_zstandard_file_are_read(tmp_path):
    import pyarrow

    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    frames = [pyarrow.compress(line, "zstd", asbytes=True) for line in lines]
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0seek"  # as tools write an index
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames[:60]) + skipped + b"".join(frames[60:]) + skipped)
    assert list(iter_texts([tmp_path / "a.jsonl.zst"])) == TEXTS


def test_a_bad_line_whose_keys_are_no_unicode_is_said_and_kept_in_the_cache(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"\\ud800": 1}\n')
    with pytest.raises(UserError, match='a.jsonl:2: no key "text"'):
        tokenised(tmp_path / "a.jsonl", "text", TOKENIZER, tmp_path / "c")
    cache = tokenised(tmp_path / "a.jsonl", "text", TOKENIZER, tmp_path / "c", skip_bad_lines=True)
    assert len(cache) == 1 and "\ud800" in cache.meta["first_bad"][0][1]


def test_minimind_v1_columns(tmp_path):
    file = tmp_path / "v1.csv"
    file.write_text("history,q,a\r\n\"[['你好', '你好！']]\",再见,再见。\r\n[],一,二\r\n", encoding="utf-8")
    first, second = iter_rows([file], "chat")
    assert [m["content"] for m in first] == ["你好", "你好！", "再见", "再见。"]
    assert [m["role"] for m in second] == ["user", "assistant"]


def test_a_comma_without_quotes_cuts_no_text_short(tmp_path, capsys):
    file = tmp_path / "a.csv"
    file.write_text('text\nhello, world\n"hello, you"\n', encoding="utf-8")
    with pytest.raises(UserError, match="a.csv:2: broken CSV .2 fields for 1 columns"):
        tokenised(file, "text", TOKENIZER, tmp_path / "c")
    assert list(iter_texts([file], skip_bad_lines=True)) == ["hello, you"]
    cache = tokenised(file, "text", TOKENIZER, tmp_path / "c", skip_bad_lines=True)
    assert len(cache) == cache.meta["bad_lines"] == 1


def test_a_long_txt_file_without_blank_lines_is_cut_all_the_same(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    text = "\n" + "".join(f"第{i}行的文字\n" for i in range(60_000))
    file.write_text(text, encoding="utf-8")
    rows = list(iter_texts([file]))
    assert "".join(rows) == text and max(map(len, rows)) < 2 * reading.TXT_DOCUMENT_CHARS + 20
    assert [line for line, _ in reading.raw_rows(file)][:2] == [1, rows[0].count("\n") + 1]
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    file.write_text("一\n" + "字" * 1001, encoding="utf-8")
    with pytest.raises(UserError, match="a.txt:2: line too long"):
        list(iter_texts([file]))


def test_a_file_of_the_longest_name_is_tokenised(tmp_path):
    file = tmp_path / f"{'绿' * 80}.txt"
    file.write_text("一", encoding="utf-8")
    assert len(tokenised(file, "text", TOKENIZER, tmp_path / "c")) == 1


def test_what_is_nested_deeper_than_it_can_be_written_is_a_bad_line(tmp_path):
    answer = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": None}]}
    row = json.dumps({"messages": [{"role": "user", "content": "q"}, answer]})
    for depth in range(940, 1000):  # about the interpreter's limit, whatever calls stand above
        text = json.dumps('{"a":' * depth + "1" + "}" * depth)
        arrays, bad = encode_batch([(7, row.replace("null", text).encode())], "chat", TOKENIZER)
        assert len(arrays["hashes"]) + len(bad) == 1 and all(line == 7 for line, _ in bad)


def test_rows_that_cannot_be_written_as_json_are_bad_lines_to_every_reader(tmp_path):
    import datetime

    import pandas

    day = {"name": "f", "since": datetime.date(2026, 1, 1)}
    chats, dated = tmp_path / "a.parquet", tmp_path / "b.parquet"
    asked = [{"role": "user", "content": "q{{name}}"}, {"role": "assistant", "content": "<answer>1</answer>"}]
    pandas.DataFrame({"messages": [asked], "tools": [[day]], "prompt": [None]}).to_parquet(chats)
    pandas.DataFrame({"messages": [[{"role": "user", "content": b"q"}]]}).to_parquet(dated)
    half = tmp_path / "c.jsonl"
    half.write_text('{"text": "{{name}} \\ud83d"}\n')
    refused = "parquet:1: .*JSON|jsonl:1: .*surrogates"
    for read_file, file in (
        (lambda f: tokenised(f, "chat", TOKENIZER, tmp_path / "c"), chats),
        (lambda f: read_problems([f], TOKENIZER, 128), chats),
        (lambda f: fill(f, tmp_path / "filled.jsonl", {"name": "x"}), chats),
        (lambda f: fill(f, tmp_path / "filled.jsonl", {"name": "x"}), half),
        (read_prompts, dated),
    ):
        with pytest.raises(UserError, match=refused):
            read_file(file)
    assert not (tmp_path / "filled.jsonl").exists()
    with pytest.raises(UserError, match="holds no usable rows"):
        report.describe(chats)


def test_a_history_cell_is_never_executed(tmp_path):
    file = tmp_path / "v1.csv"
    file.write_text(f"history,q,a\n\"__import__('os').system('touch {tmp_path}/owned')\",一,二\n", encoding="utf-8")
    with pytest.raises(UserError, match="history"):
        list(iter_rows([file], "chat"))
    assert not (tmp_path / "owned").exists()


BAD_LINES = {
    b'{"text": "ok"}\nnot json\n': "bad.jsonl:2: not JSON",
    b'{"text": "ok"}\n{"txt": "wrong key"}\n': 'bad.jsonl:2: no key "text"',
    b'{"text": "ok"}\n{"text": "\xff\xfe"}\n': "bad.jsonl:2: not UTF-8",
    b'{"text": "ok"}\n{"text": "  "}\n': 'bad.jsonl:2: "text" is empty',
    b'{"text": "ok"}\n["a list"]\n': "bad.jsonl:2: a row must be a JSON object",
}


@pytest.mark.parametrize("content", BAD_LINES)
def test_a_bad_line_stops_with_file_and_line_or_is_skipped_and_counted(content, tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=BAD_LINES[content]):
        tokenised(file, "text", TOKENIZER, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*"))  # nothing half-written
    cache = tokenised(file, "text", TOKENIZER, tmp_path / "c", skip_bad_lines=True)
    assert len(cache) == 1 and cache.meta["bad_lines"] == 1
    assert "1 bad line(s) left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such data file"),
        ("empty.jsonl", b"", "is empty"),
        ("what.doc", b"x", "unknown kind of file"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "cannot be read"),
        ("no.parquet", b"no parquet", "not a parquet file"),
        ("quote.csv", b'text\n"broken\n', "broken CSV"),
        ("gbk.txt", "中文".encode("gbk"), r"gbk.txt:1: not UTF-8 .*GB18030"),
        ("fields.csv", b"text,id\none\n", r"fields.csv:2: broken CSV \(1 fields for 2 columns\)"),
        (
            "utf16.jsonl",
            '{"text": "a"}'.encode("utf-16"),
            "utf16.jsonl: cannot be read past row 0: binary file .*UTF-16",
        ),
        ("open.json", b'[{"text": "a"}, {"text":', "open.json: cannot be read past row 1: not JSON .element 2"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenised(tmp_path / name, "text", TOKENIZER, tmp_path / "c")


def test_a_bad_record_of_a_table_can_be_skipped_as_a_bad_line_can(tmp_path, capsys):
    (tmp_path / "a.csv").write_bytes(b'text,id\none,1\n"two,2\nthree\nfour,4\n')
    cache = tokenised(tmp_path / "a.csv", "text", TOKENIZER, tmp_path / "c", skip_bad_lines=True)
    assert len(cache) == 2 and cache.meta["bad_lines"] == 2
    assert "line 3: broken CSV" in (err := capsys.readouterr().err) and "line 4: broken CSV" in err


@pytest.mark.parametrize("think_share, kind", [(None, "chat"), (0.8, "chat:0.8")])
def test_a_cache_is_named_as_in_earlier_versions_and_so_found_again(think_share, kind, chat_file):
    words = f"4 {kind} {tokenizer_hash(TOKENIZER)} False ['.jsonl']"
    key = hashlib.blake2b(words.encode() + chat_file.read_bytes(), digest_size=8).hexdigest()
    assert cache_module.cache_key(chat_file, "chat", TOKENIZER, False, think_share) == key


def _build_slowly(file, folder):
    cache_module.BATCH_CHARS = 200
    original = cache_module.encode_batch

    def slow(*args):
        time.sleep(0.05)
        return original(*args)

    cache_module.encode_batch = slow
    tokenised(file, "text", TOKENIZER, folder, workers=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_build_is_not_mistaken_for_a_whole_cache(text_file, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_build_slowly, args=(text_file, tmp_path / "c"))
    process.start()
    while not (tmp_path / "c").exists() or not list((tmp_path / "c").glob("*/tokens.bin")):
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list((tmp_path / "c").glob("*.building-*"))
    assert len(tokenised(text_file, "text", TOKENIZER, tmp_path / "c")) == len(TEXTS)


# ------------------------------------------------------------------------------------------------------------ rows
@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_a_damaged_cache_is_named(text_file, tmp_path, damage):
    folder = tokenised(text_file, "text", load_tokenizer(), tmp_path / "cache").folder
    tokens = folder / "tokens.bin"
    if damage == "gone":
        tokens.unlink()
    else:
        os.truncate(tokens, {"empty": 0, "cut": tokens.stat().st_size - 2}[damage])
    with pytest.raises(UserError, match=f"{folder.name} is damaged .*delete the folder"):
        tokenised(text_file, "text", load_tokenizer(), tmp_path / "cache")


def test_rows_hold_every_token_once(text_file, tmp_path):
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    rows = TextRows([cache], np.arange(len(cache)), 64, seed=1)
    for epoch in (0, 3):
        targets = sorted(label for _, labels in all_documents(rows, epoch) for label in labels if label != IGNORED)
        expected = sorted(token for text in TEXTS for token in encode_document(TOKENIZER, text)[1:])
        assert targets == expected


def test_chat_rows_learn_what_render_masks(chat_file, tmp_path):
    cache = tokenised(chat_file, "chat", TOKENIZER, tmp_path / "c")
    rows = ChatRows([cache], np.arange(len(cache)), 512, seed=1)
    found = sorted(all_documents(rows))
    expected = []
    for chat in CHATS:
        ids, mask = render(TOKENIZER, chat)
        expected.append((ids, [i if m else IGNORED for i, m in zip(ids, mask)]))
    assert found == sorted(expected)
    assert rows.learned_kept_share() == 1.0


def test_a_row_of_a_split_conversation_reads_as_a_conversation_does(tmp_path):
    """The system turn, then questions that followed each other, each with its own answer; every answer once."""
    chats = []
    for n in range(30):
        chat = [{"role": "system", "content": "简短回答。"}] * (n % 2)
        for i in range(n % 5 + 2):
            chat += [{"role": "user", "content": f"{n}-{i}" + "吗" * (n % 7)}]
            chat += [{"role": "assistant", "content": f"{n}-{i}" + "啊" * (n % 11)}]
        chats.append(chat)
    file = write_jsonl(tmp_path / "c.jsonl", [{"conversations": c} for c in chats])
    cache = tokenised(file, "chat", TOKENIZER, tmp_path / "c")
    rows = ChatRows([cache], np.arange(len(cache)), 64, seed=1)
    answers = []
    for ids, labels in all_documents(rows):
        turns = re.findall(r"<\|im_start\|>(\w+)\n(\d+)?-?(\d+)?.*?<\|im_end\|>\n", TOKENIZER.decode(ids))
        n, first = next((int(n), int(i)) for _, n, i in turns if n)
        expected = [("system", "", "")] * (n % 2)
        for i in range(first, first + len(turns) // 2):
            expected += [("user", str(n), str(i)), ("assistant", str(n), str(i))]
        assert turns == expected
        answers += re.findall(r"\d+-\d+", TOKENIZER.decode([i for i, label in zip(ids, labels) if label != IGNORED]))
    assert sorted(answers) == sorted(f"{n}-{i}" for n in range(30) for i in range(n % 5 + 2))
    assert len(rows.items) > len(chats)


@pytest.mark.parametrize("kind", ["text", "chat", "pair"])
@pytest.mark.parametrize("seq_len", [32, 64, 400])
def test_shares_are_those_of_the_rows_counted_token_by_token(kind, seq_len, text_file, chat_file, tmp_path):
    file = {"text": text_file, "chat": chat_file, "pair": tmp_path / "pair.jsonl"}[kind]
    if kind == "pair":
        pairs = [{"chosen": c, "rejected": [*c[:-1], c[-1] | {"content": "错" * 30}]} for c in CHATS]
        write_jsonl(file, pairs)
    cache = tokenised(file, kind, TOKENIZER, tmp_path / "c")
    rows = ROWS[kind]([cache], np.arange(len(cache)), seq_len, seed=1)
    batch = rows.batch(range(len(rows)))
    learned, slots = int((batch["labels"] != IGNORED).sum()), batch["labels"].numel()
    in_documents = int(cache.learn.sum()) if kind != "text" else len(cache.tokens) - len(cache)
    assert rows.shares() == pytest.approx({
        "real_token_share": int(batch["real_tokens"]) / slots, "learned_token_share": learned / slots,
        "learned_kept_share": learned / in_documents,
    })  # fmt: skip
    assert (learned < in_documents) == (kind != "text" and seq_len == 32 or kind == "pair" and seq_len == 64)


def test_counting_what_is_learned_takes_no_memory_by_the_token(tmp_path):
    """Two million tokens: a thousand conversations of a question and an answer of 1,000 tokens each."""
    arrays = {
        "tokens": np.zeros(2_000_000), "learn": np.tile(np.repeat([0, 1], 1000), 1000), "learned": np.full(1000, 1000),
        "turns": np.tile([0, 1000], 1000), "roles": np.tile([1, 2], 1000), "turn_counts": np.full(1000, 2),
        "lengths": np.full(1000, 2000), "hashes": np.zeros(1000),
    }  # fmt: skip
    for name, values in arrays.items():
        values.astype(cache_module.ARRAYS[name] or np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "meta.json").write_text('{"dtype": "uint16", "bad_lines": 0}')
    cache = cache_module.Cache(tmp_path)
    tracemalloc.start()
    rows = ChatRows([cache], np.arange(1000), 512, seed=1)
    assert rows.shares() == {"real_token_share": 1.0, "learned_token_share": 1.0, "learned_kept_share": 0.512}
    assert tracemalloc.get_traced_memory()[1] < len(cache.tokens)
    tracemalloc.stop()


def test_the_order_is_a_permutation_that_changes_with_the_epoch_and_only_with_it(text_file, tmp_path):
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    one, two = (TextRows([cache], np.arange(len(cache)), 128, seed=5) for _ in range(2))
    first = one.batch(range(len(one)))["input_ids"]
    second = one.batch(range(len(one), 2 * len(one)))["input_ids"]
    assert not torch.equal(first, second)
    assert torch.equal(two.batch(range(len(two), 2 * len(two)))["input_ids"], second)  # no memory of epoch 0
    other_seed = TextRows([cache], np.arange(len(cache)), 128, seed=6)
    assert not torch.equal(other_seed.batch(range(len(one)))["input_ids"], first)


def test_two_threads_may_ask_for_batches_at_once(text_file, tmp_path):
    """One fetches ahead, another reads elsewhere: each gets what it asked for."""
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    rows = TextRows([cache], np.arange(len(cache)), 128, seed=5)
    places = [epoch * len(rows) for epoch in range(400)]
    expected = [TextRows([cache], np.arange(len(cache)), 128, seed=5).batch([i])["input_ids"] for i in places]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(lambda order: [rows.batch([i])["input_ids"] for i in order], order)
                    for order in (places, places[::-1])]  # fmt: skip
            up, down = (run.result() for run in runs)
    finally:
        sys.setswitchinterval(before)
    assert all(map(torch.equal, up, expected)) and all(map(torch.equal, down[::-1], expected))


def test_validation_is_disjoint_also_for_copies_and_by_text_alone(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 2])  # every text twice
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in TEXTS[::-1]])
    caches = [tokenised(f, "text", TOKENIZER, tmp_path / "c") for f in (a, b)]
    train, val = split_documents(caches, 0.2)
    texts = np.array(TEXTS * 2 + TEXTS[::-1])
    assert not set(texts[train]) & set(texts[val])
    assert len(train) + len(val) == 3 * len(TEXTS)
    assert 0.05 < len(val) / len(texts) < 0.4


def with_calls(i: int, spelling: int) -> list[dict]:
    """One conversation with tools and thinking, in one of five ways to write it down."""
    call, tools = {"name": "f", "arguments": {"n": i, "unit": "米"}}, [{"name": "f"}]
    question = {"role": "user", "content": f"{i}是多少？"}
    answer = {"role": "assistant", "content": "", "reasoning_content": "想", "tool_calls": [call]}
    if spelling == 1:
        answer |= {"tool_calls": json.dumps([call]), "id": i}
        tools = json.dumps(tools)
    if spelling == 2:
        arguments = json.dumps(call["arguments"], separators=(",", ":"), ensure_ascii=False)
        answer |= {"tool_calls": [{"id": "c7", "type": "function", "function": call | {"arguments": arguments}}]}
        question["score"] = 0.5
    if spelling == 3:
        answer = {"role": "assistant", "content": "<think>\n想\n</think>\n\n", "tool_calls": [call]}
    if spelling == 4:
        text = json.dumps({"arguments": call["arguments"], "name": "f"})
        answer = {"role": "assistant", "content": f"<think>\n想\n</think>\n\n<tool_call>\n{text}\n</tool_call>"}
    return [{"role": "system", "content": "", "tools": tools}, question, answer]


@pytest.mark.parametrize("think_share", [None, 0.5])
def test_validation_is_disjoint_also_for_copies_that_are_spelled_otherwise(think_share, tmp_path):
    chats = [with_calls(i, spelling) for spelling in range(5) for i in range(60)]
    chats += [[m | {"id": n, "score": n} for m in exchange(i)] for n in range(5) for i in range(60)]
    file = write_jsonl(tmp_path / "a.jsonl", [{"conversations": c} for c in chats])
    cache = tokenised(file, "chat", TOKENIZER, tmp_path / "c", think_share=think_share)
    train, val = split_documents([cache], 0.2)
    said = np.array([what * 1000 + i for what in range(2) for _ in range(5) for i in range(60)])
    assert not set(said[train]) & set(said[val])
    assert len(set(said[val])) > 10 and len(set(cache.hashes.tolist())) == 120


def test_all_pairs_of_a_prompt_are_on_one_side(tmp_path):
    pairs = []
    for n, i in ((n, i) for n in range(3) for i in range(60)):
        prompt = [{"role": "user", "content": f"{i}是多少？", "id": n}]
        answers = ({"role": "assistant", "content": text} for text in (f"好{n}", f"坏{n}"))
        pairs.append(dict(zip(("chosen", "rejected"), ([*prompt, answer] for answer in answers))))
    cache = tokenised(write_jsonl(tmp_path / "p.jsonl", pairs), "pair", TOKENIZER, tmp_path / "c")
    train, val = split_documents([cache], 0.2)
    prompts = np.repeat(np.tile(np.arange(60), 3), 2)  # of each document
    assert not set(prompts[train]) & set(prompts[val]) and len(val) > 30


def test_an_empty_row_teaches_nothing(text_file, tmp_path):
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    rows, val = packed_splits([cache], "text", 64, 0, val_split=0.0)
    assert val is None
    batch = rows.batch([-1])
    assert batch["count"] == 0 and batch["real_tokens"] == 0


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_packed_equals_unpacked(kind, text_file, chat_file, tmp_path):
    """Loss and gradients of packed rows are those of the documents one by one."""
    torch.manual_seed(0)
    config = LMConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=len(TOKENIZER))
    model = MiniMindForCausalLM(config)
    cache = tokenised(text_file if kind == "text" else chat_file, kind, TOKENIZER, tmp_path / "c")
    rows = ROWS[kind]([cache], np.arange(24), 256, seed=0)
    batch = rows.batch(range(len(rows)))
    packed, count = lm_loss(model(batch["input_ids"], segment_ids=batch["segment_ids"]).logits, batch["labels"])
    (packed / count).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone, alone_count = 0.0, 0
    for ids, labels in all_documents(rows):
        loss, n = lm_loss(model(torch.tensor([ids])).logits, torch.tensor([labels]))
        alone, alone_count = alone + loss, alone_count + n
    (alone / alone_count).backward()
    assert count == alone_count == batch["count"]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_validation_figure_is_that_of_whole_documents(text_file, tmp_path):
    """Bits per byte of the held-out rows = the engine's of the same documents, each read by itself."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1)).eval()
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    _, rows = packed_splits([cache], "text", 128, 0, 0.1)
    engine = Engine(model, TOKENIZER)
    expected, n_bytes = engine.bits_per_byte([TEXTS[i] for i in rows.documents], length=127)
    batch = rows.batch(range(len(rows)))
    with torch.no_grad():
        nats, _ = lm_loss(model(batch["input_ids"], segment_ids=batch["segment_ids"]).logits, batch["labels"])
    assert int(learned_bytes(batch["labels"], token_bytes(TOKENIZER))) == n_bytes
    assert nats.item() / math.log(2) / n_bytes == pytest.approx(expected, rel=1e-5)
    lengths = np.diff(cache.offsets)[rows.documents]
    assert len(rows.items) == sum(1 if n <= 128 else math.ceil((n - 1) / 127) for n in lengths)


def test_bytes_of_tokens_add_up_to_the_text():
    table = token_bytes(TOKENIZER)
    for text in (*TEXTS[:20], "emoji 😀👍🏽 é ß 你好\n\n\tcode();  "):
        assert int(table[encode_document(TOKENIZER, text)].sum()) == len(text.encode())


def test_real_chats_fill_the_rows_and_lose_little(data_dir, tmp_path):
    """On real conversations at 512: 97% real tokens, 95% of the learned tokens kept."""
    files = sorted((data_dir / "sft").glob("*.jsonl.gz"))
    caches = [tokenised(f, "chat", TOKENIZER, tmp_path / "c") for f in files]
    rows, _ = packed_splits(caches, "chat", 512, 0, val_split=0.0)
    assert rows.real_token_share() >= 0.97
    assert rows.learned_kept_share() >= 0.95
