"""The data path from a file to tensors: caches, splits, rows and their order."""

import contextlib
import gzip
import json
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
import torch

from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_document, load_tokenizer, render
from trainer import cache as cache_module
from trainer.cache import tokenised
from trainer.cli import UserError
from trainer.data import IGNORED, PackedRows, packed_splits, split_documents, token_bytes
from trainer.losses import lm_loss
from trainer.read import iter_rows, iter_texts

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


def test_workers_give_the_same_cache_as_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH_BYTES", 2000)
    file = write_jsonl(tmp_path / "big.jsonl", [{"text": t} for t in TEXTS * 3])
    one = tokenised(file, "text", TOKENIZER, tmp_path / "one", workers=1)
    two = tokenised(file, "text", TOKENIZER, tmp_path / "two", workers=2)
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.hashes, two.hashes)


def test_gzip_and_zstandard_and_csv_and_parquet_and_txt_read_alike(tmp_path):
    import pandas
    import zstandard

    lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    pandas.DataFrame({"text": TEXTS}).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("一本书\n\n第二段", encoding="utf-8")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"):
        assert list(iter_texts([tmp_path / name])) == TEXTS, name
    assert list(iter_texts([tmp_path / "a.txt"])) == ["一本书\n\n第二段"]


def damaged_files(folder) -> list:
    """Files of 600 rows each of which a part cannot be read."""
    import pandas
    import zstandard

    texts = [f"{TEXTS[i % 120]} {i}" for i in range(600)]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    frames = [zstandard.compress(b"".join(lines[i : i + 200])) for i in (0, 200, 400)]
    members = [bytearray(gzip.compress(b"".join(part))) for part in (lines[:300], lines[300:])]
    members[1][10] = 7  # behind its header: a block of a kind that there is not
    table = folder / "whole.parquet"
    pandas.DataFrame({"text": texts}).to_parquet(table, row_group_size=200)
    pages = table.read_bytes()
    content = {
        "cut.jsonl.gz": members[0][:-9], "flipped.jsonl.gz": b"".join(members),
        "cut.jsonl.zst": b"".join(frames)[:-100], "cut_once.jsonl.zst": zstandard.compress(b"".join(lines))[:-4],
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
        assert last >= {"cut.parquet": 0, "flipped.jsonl.zst": 400}.get(path.name, 1), path


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
    import zstandard

    frames = [zstandard.compress(json.dumps({"text": text}).encode() + b"\n") for text in TEXTS]
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
        ("gbk.txt", "中文".encode("gbk"), "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tokenised(tmp_path / name, "text", TOKENIZER, tmp_path / "c")


def _build_slowly(file, folder):
    cache_module.BATCH_BYTES = 200
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
    rows = PackedRows([cache], np.arange(len(cache)), "text", 64, seed=1)
    for epoch in (0, 3):
        targets = sorted(label for _, labels in all_documents(rows, epoch) for label in labels if label != IGNORED)
        expected = sorted(token for text in TEXTS for token in encode_document(TOKENIZER, text)[1:])
        assert targets == expected


def test_chat_rows_learn_what_render_masks(chat_file, tmp_path):
    cache = tokenised(chat_file, "chat", TOKENIZER, tmp_path / "c")
    rows = PackedRows([cache], np.arange(len(cache)), "chat", 512, seed=1)
    found = sorted(all_documents(rows))
    expected = []
    for chat in CHATS:
        ids, mask = render(TOKENIZER, chat)
        expected.append((ids, [i if m else IGNORED for i, m in zip(ids, mask)]))
    assert found == sorted(expected)
    assert rows.learned_kept_share() == 1.0


def test_the_order_is_a_permutation_that_changes_with_the_epoch_and_only_with_it(text_file, tmp_path):
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    one, two = (PackedRows([cache], np.arange(len(cache)), "text", 128, seed=5) for _ in range(2))
    first = one.batch(range(len(one)))["input_ids"]
    second = one.batch(range(len(one), 2 * len(one)))["input_ids"]
    assert not torch.equal(first, second)
    assert torch.equal(two.batch(range(len(two), 2 * len(two)))["input_ids"], second)  # no memory of epoch 0
    other_seed = PackedRows([cache], np.arange(len(cache)), "text", 128, seed=6)
    assert not torch.equal(other_seed.batch(range(len(one)))["input_ids"], first)


def test_validation_is_disjoint_also_for_copies_and_by_text_alone(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS * 2])  # every text twice
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in TEXTS[::-1]])
    caches = [tokenised(f, "text", TOKENIZER, tmp_path / "c") for f in (a, b)]
    train, val = split_documents(caches, 0.2)
    texts = np.array(TEXTS * 2 + TEXTS[::-1])
    assert not set(texts[train]) & set(texts[val])
    assert len(train) + len(val) == 3 * len(TEXTS)
    assert 0.05 < len(val) / len(texts) < 0.4


def test_an_empty_row_teaches_nothing(text_file, tmp_path):
    cache = tokenised(text_file, "text", TOKENIZER, tmp_path / "c")
    rows, val = packed_splits([cache], "text", 64, 0, val_split=0.0)
    assert val is None
    batch = rows.batch([-1])
    assert batch["weight"] == 0 and batch["real_tokens"] == 0


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_packed_equals_unpacked(kind, text_file, chat_file, tmp_path):
    """Loss and gradients of packed rows are those of the documents one by one."""
    torch.manual_seed(0)
    config = LMConfig(dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=len(TOKENIZER))
    model = MiniMindForCausalLM(config)
    cache = tokenised(text_file if kind == "text" else chat_file, kind, TOKENIZER, tmp_path / "c")
    rows = PackedRows([cache], np.arange(24), kind, 256, seed=0)
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
    assert count == alone_count == batch["weight"]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


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
