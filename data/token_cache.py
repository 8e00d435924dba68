"""Tokenises a data file once, into memory-mapped arrays that every later run finds again.

A cache is a folder. Its name is a hash of everything that decides its content: the file's bytes, the tokenizer, the
kind of rows. It is built under another name and renamed when it is whole, so a killed build is never mistaken for a
finished one. Worker processes tokenise batches of raw rows. This process only reads and writes, and holds a few batches
at a time, so memory does not grow with the file.

  tokens.bin   all documents end to end, uint16 or uint32         lengths.bin   int64, tokens of each document
  learn.bin    uint8, 1 where a token is learned (chat, pair)     learned.bin   int64, how many of each document's are
  turns.bin    int32, where each message begins (chat, pair)      turn_counts.bin  int32
  roles.bin    uint8, who speaks in it, by model.chat_template.ROLES  hashes.bin  uint64 of what is said
A pair is two neighbouring documents, first chosen, then rejected; both have the hash of the prompt.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import named
from common.workers import default_workers, ordered_map
from data.reading import check_file, in_batches, raw_rows
from data.row_shapes import UNUSABLE, BadRow, parse
from data.thinking import keep_thinking
from model.chat_template import ROLES, assistant_text, normalise_conversation
from model.tokenizer import encode_texts, render_spans
from model.tokenizer_files import tokenizer_from_dict, tokenizer_hash, tokenizer_to_dict

# Part of every cache's name. Raise it when the layout, or the way rows are read, changes: old caches are then not
# found, and runs on them cannot be resumed. Texts in .jsonl and .parquet files are still read as in version 3.
VERSION, TEXT_VERSION = 4, 3
BATCH_CHARS = 2**18  # handed to a worker at a time: large enough to hide the hand-over
BAD_LINES_SHOWN = 5
NAME_CHARS = 40  # of the data file's name in the folder's name: file systems allow 255 bytes in all
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
ARRAYS = {"tokens": None, "learn": np.uint8, "turns": np.int32, "roles": np.uint8, "lengths": np.int64,
          "learned": np.int64, "hashes": np.uint64, "turn_counts": np.int32}  # fmt: skip


class Document(NamedTuple):
    """What is kept of one document. Texts have no mask, turns and roles."""

    ids: list[int]
    learned: int  # how many of the tokens are learned
    digest: int
    mask: Sequence[int] = ()  # 1 where a token is learned
    turns: Sequence[int] = ()  # where each message begins
    roles: Sequence[int] = ()  # who speaks in it


class Cache:
    """One tokenised file. `tokens`, `learn`, `turns` and `roles` are memory-mapped; the arrays with a value
    for each document are in memory. Document i has tokens[offsets[i]:offsets[i + 1]] and messages
    turn_offsets[i]:turn_offsets[i + 1]."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.tokens = self._map("tokens")
        self.learn = self._map("learn")
        self.turns, self.roles = self._map("turns"), self._map("roles")
        self.offsets = _starts(self._map("lengths"))
        self.turn_offsets = _starts(self._map("turn_counts"))
        self.hashes, self.learned = np.array(self._map("hashes")), np.array(self._map("learned"))
        if len(self.tokens) != self.offsets[-1] or not len(self.turns) == len(self.roles) == self.turn_offsets[-1]:
            raise ValueError("a file of it is cut short")

    def __len__(self) -> int:
        return len(self.hashes)

    def _map(self, name: str) -> np.ndarray:
        dtype = np.dtype(self.meta["dtype"] if name == "tokens" else ARRAYS[name])
        path = self.folder / f"{name}.bin"
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)  # an empty file has no map


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def tokenised(path, kind: str, tokenizer, folder, skip_bad_lines=False, workers=None, think_share=None) -> Cache:
    """The cache of one data file under `folder`, built if it is not there.

    kind: "text", "chat" or "pair". think_share: the share of chats that keep their thinking (data/thinking.py); None
    changes nothing. workers: processes, all cores by default. UserError with file and line for the first bad rows. With
    skip_bad_lines they are left out instead, counted in `meta["bad_lines"]` and reported.
    """
    path = check_file(path)
    key = cache_key(path, kind, tokenizer, skip_bad_lines, think_share)
    final = Path(folder) / f"{path.name.split('.')[0][:NAME_CHARS]}-{key}"
    # A folder gets this name when it is whole. So if it cannot be read now, it was damaged later.
    with usable(final):
        if not final.exists():
            _build(path, kind, tokenizer, final, skip_bad_lines, workers, think_share)
        try:
            cache = Cache(final)
        except PermissionError:
            raise
        except (OSError, ValueError, KeyError) as error:  # a broken disk, or edited files: a build is whole
            raise UserError(f"{final} is damaged ({error}); delete the folder, and it is made again") from None
    if cache.meta["bad_lines"]:
        _say_bad(path, cache.meta["bad_lines"], cache.meta["first_bad"])
    if len(cache) == 0:
        raise UserError(f"{path} holds no usable rows")
    return cache


@contextlib.contextmanager
def usable(path: Path):
    """A context around reads and writes of `path` in the folder of caches. UserError where the folder or the path
    belongs to another user, is read-only, or is a file."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        why = f"{error.filename}: {error.strerror}"
        raise UserError(f"the cache {path} cannot be used ({why}); name another --out_dir") from None


def cache_key(path, kind: str, tokenizer, skip_bad_lines: bool, think_share: float | None) -> str:
    """A hash, 16 hex digits, of everything that decides the content of a cache."""
    # Do not change the spelling of the words that come before the file's bytes: existing caches would not be found.
    digest = hashlib.blake2b(digest_size=8)
    suffixes = Path(path).suffixes
    version = VERSION if kind != "text" or {".csv", ".txt", ".md"} & set(suffixes) else TEXT_VERSION
    rows = kind if think_share is None else f"{kind}:{think_share}"
    digest.update(f"{version} {rows} {tokenizer_hash(tokenizer)} {skip_bad_lines} {suffixes}".encode())
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- build
def _build(path, kind, tokenizer, final: Path, skip_bad_lines: bool, workers, think_share):
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    building = final.with_name(f"{final.name}.building-{uuid.uuid4().hex[:8]}")
    building.mkdir()  # tempfile would make a folder that other users cannot read
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32  # half the disk for vocabularies below 65,537
    meta = {"file": str(path), "kind": kind, "dtype": np.dtype(dtype).name, "bad_lines": 0, "first_bad": []}
    try:
        with named(building), contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(building / f"{name}.bin", "wb")) for name in ARRAYS}
            for arrays, bad in _encoded_batches(path, kind, tokenizer, workers, think_share):
                # All bad rows are counted, the first few are shown. Without skip_bad_lines the build stops when there
                # are enough to show, so that a user can mend several at a time.
                meta["bad_lines"] += len(bad)
                meta["first_bad"] += bad[: BAD_LINES_SHOWN - len(meta["first_bad"])]
                for name, file in files.items():
                    file.write(np.asarray(arrays[name], dtype if name == "tokens" else ARRAYS[name]).tobytes())
                if bad and not skip_bad_lines and len(meta["first_bad"]) >= BAD_LINES_SHOWN:
                    break
            files["meta"] = stack.enter_context(open(building / "meta.json", "wb"))
            files["meta"].write(json.dumps(meta).encode())
            for file in files.values():  # else a power cut after the renaming could leave an empty file
                file.flush()
                os.fsync(file.fileno())
        if meta["bad_lines"] and not skip_bad_lines:
            lines = "\n".join(f"       {path}:{line}: {reason}" for line, reason in meta["first_bad"][1:])
            line, reason = meta["first_bad"][0]
            raise UserError(f"{path}:{line}: {reason} (--skip_bad_lines leaves such lines out)\n{lines}".rstrip())
        try:
            os.rename(building, final)
        except OSError:
            if not final.exists():
                raise
            # Another process has finished the same cache first: use that one.
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(final: Path):
    """Deletes what killed builds of this cache left: folders that nothing has been written to for an hour."""
    for folder in final.parent.glob(f"{final.name}.building-*"):
        with contextlib.suppress(OSError):  # it is another user's, or has just been renamed
            written = max((file.stat().st_mtime for file in folder.iterdir()), default=folder.stat().st_mtime)
            if time.time() - written > 3600:
                shutil.rmtree(folder, ignore_errors=True)


def _encoded_batches(path, kind, tokenizer, workers, think_share):
    """Yields (arrays, bad lines) batch by batch in the file's order, encoded by this process or by workers."""
    workers = workers or default_workers()
    # Starting a worker takes longer than tokenising a few batches.
    if path.stat().st_size < 4 * BATCH_CHARS:
        workers = 1
    with tqdm(desc=f"tokenising {path.name}", unit=" documents", disable=not sys.stderr.isatty(), leave=False) as bar:
        # Each worker gets the tokenizer's files once, as text, and builds its own tokenizer from them.
        context = (kind, think_share, json.dumps(tokenizer_to_dict(tokenizer)))
        for encoded in ordered_map(_encode_in_worker, in_batches(raw_rows(path), BATCH_CHARS), workers, *context):
            yield encoded
            bar.update(len(encoded[0]["hashes"]))


@functools.lru_cache(maxsize=1)
def worker_tokenizer(files: str):
    """The tokenizer of these files. A worker builds it once: that takes longer than tokenising a batch."""
    return tokenizer_from_dict(json.loads(files))


def _encode_in_worker(batch, kind: str, think_share: float | None, tokenizer_files: str):
    return encode_batch(batch, kind, worker_tokenizer(tokenizer_files), think_share)


def encode_batch(batch, kind: str, tokenizer, think_share=None) -> tuple[dict, list]:
    """[(line, raw row), ...] -> (the arrays of a cache for these rows, [(line, reason), ...] of the bad ones)."""
    rows, bad = [], []
    for line, raw in batch:
        try:
            row = parse(raw, kind)
            rows.append(row if kind == "text" else _documents(row, kind, tokenizer, think_share))
        except UNUSABLE as error:  # a BadRow, or an error from rendering the messages
            bad.append((line, str(error)))
    if kind == "text":
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        # All texts of a batch in one call: a call costs more than tokenising a short text.
        encoded = zip(encode_texts(tokenizer, rows), rows)
        # The text and the end token are learned. The start token is not: no token stands before it.
        documents = [Document([start, *ids, end], len(ids) + 1, _hash(text)) for ids, text in encoded]
    else:
        documents = [document for row in rows for document in row]
    arrays = {
        "tokens": _joined([d.ids for d in documents]),
        "learn": _joined([d.mask for d in documents]),
        "turns": _joined([d.turns for d in documents]),
        "roles": _joined([d.roles for d in documents]),
        "lengths": [len(d.ids) for d in documents],
        "learned": [d.learned for d in documents],
        "hashes": [d.digest for d in documents],
        "turn_counts": [len(d.turns) for d in documents],
    }
    return arrays, bad


def _documents(row, kind: str, tokenizer, think_share: float | None) -> list[Document]:
    """One chat -> one document; one pair -> two, of which only the last answer is learned."""
    if kind == "chat":
        digest = chat_hash(row)  # before thinking is taken out, so that the hash does not depend on think_share
        row = row if think_share is None else keep_thinking(row, think_share)
        return [_document(row, tokenizer, digest)]
    digest = chat_hash(row["chosen"][:-1])  # of the prompt: all pairs of a prompt are on the same side of a split
    pair = [_document(row[side], tokenizer, digest, last_only=True) for side in ("chosen", "rejected")]
    if pair[0].ids == pair[1].ids:  # the rows differ (blanks at an end, thinking under a key) but not as tokens
        raise BadRow("chosen and rejected are the same answer: there is nothing to prefer")
    return pair


def _document(messages, tokenizer, digest: int, last_only=False) -> Document:
    ids, mask, turns = render_spans(tokenizer, messages)
    if last_only:  # the earlier answers of a pair are the same on both sides, so there is no preference in them
        mask = [0] * turns[-1] + mask[turns[-1] :]
    return Document(ids, sum(mask), digest, mask, turns, [ROLES.index(message["role"]) for message in messages])


def chat_hash(messages) -> int:
    """A 64-bit hash of what is said in a conversation. Other keys of a message (an id, a score) do not count, nor does
    the spelling of thinking, tools and calls: in the content or under their own keys, as JSON text or as lists."""
    # Copies must have the same hash. Else one spelling of a conversation could be trained on and another validated on.
    messages, tools = normalise_conversation(messages)
    told = [{"tools": tools}] if tools else []
    for message in messages:
        content, calls = message["content"], []
        if message["role"] == "assistant":
            text = assistant_text(message)
            content, calls = CALL.sub("", text).strip(), [_one_spelling(call) for call in CALL.findall(text)]
        told.append({"role": message["role"], "content": content} | ({"tool_calls": calls} if calls else {}))
    return _hash(json.dumps(told, ensure_ascii=False, sort_keys=True))


def _one_spelling(call: str) -> str:
    """A call's JSON with sorted keys and no needless blanks or escapes; text that is not JSON as it is."""
    try:
        return json.dumps(json.loads(call), ensure_ascii=False, sort_keys=True)
    except (ValueError, RecursionError):
        return call


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _joined(lists) -> np.ndarray:
    return np.concatenate([np.asarray(items, np.int64) for items in lists]) if lists else np.zeros(0, np.int64)


def _say_bad(path, count: int, first: list):
    reasons = "; ".join(f"line {line}: {reason}" for line, reason in first[:BAD_LINES_SHOWN])
    print(f"warning: {path}: {count} bad line(s) left out ({reasons})", file=sys.stderr)
