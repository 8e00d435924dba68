"""Tokenises a data file once, into memory-mapped arrays that every later run finds again.

A cache is a folder named after what decides its content: the file's bytes, the tokenizer, the kind of rows. It is built
under another name and renamed when whole, so a build that was killed is never mistaken for a finished one. Worker
processes tokenise batches of raw rows; this process only reads and writes, and holds a few batches at a time, so
memory does not grow with the file.

  tokens.bin   all documents end to end, uint16 or uint32         lengths.bin   int64, tokens of each document
  learn.bin    uint8, 1 where a token is learned (chat, pair)     learned.bin   int64, how many of each document's are
  turns.bin    int32, where each message begins (chat, pair)      turn_counts.bin  int32
  roles.bin    uint8, who speaks in it, by model.chat_template.ROLES  hashes.bin  uint64 of what is said
A pair is two neighbouring documents, chosen then rejected, both with the hash of the prompt.
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

# Of this layout and of how rows are read: with another number old caches are not found, and runs on them not resumed.
VERSION, TEXT_VERSION = 4, 3  # the second of texts in .jsonl and .parquet files, which are read as they were
BATCH_CHARS = 2**18  # handed to a worker at a time: large enough to hide the hand-over
BAD_LINES_SHOWN = 5
NAME_CHARS = 40  # of the data file's name in the folder's, which the key and a build's mark must fit into too
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
ARRAYS = {"tokens": None, "learn": np.uint8, "turns": np.int32, "roles": np.uint8, "lengths": np.int64,
          "learned": np.int64, "hashes": np.uint64, "turn_counts": np.int32}  # fmt: skip


class Document(NamedTuple):
    """What is kept of one document; mask, turns and roles of conversations only."""

    ids: list[int]
    learned: int  # tokens of it
    digest: int
    mask: Sequence[int] = ()
    turns: Sequence[int] = ()
    roles: Sequence[int] = ()


class Cache:
    """One tokenised file. `tokens`, `learn`, `turns` and `roles` are memory-mapped, numbers by document in memory."""

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
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def tokenised(path, kind: str, tokenizer, folder, skip_bad_lines=False, workers=None, think_share=None) -> Cache:
    """The cache of one data file under `folder`, built if it is not there.

    kind "text" | "chat" | "pair". think_share: of chats, the share that keeps its thinking, see data/thinking.py; None
    leaves all of it as it is. Uses all cores unless `workers` says how many. Raises UserError with file and line for
    the first bad rows, unless skip_bad_lines: then they are counted in `meta["bad_lines"]` and reported.
    """
    path = check_file(path)
    key = cache_key(path, kind, tokenizer, skip_bad_lines, think_share)
    final = Path(folder) / f"{path.name.split('.')[0][:NAME_CHARS]}-{key}"
    # A folder of this name is whole, since it got its name when it was. What may be wrong with it came later.
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
    """Around what reads or writes `path` in the folder of caches: a UserError that says what to do where the folder, or
    the path, belongs to another user, is read-only, or is a file."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        why = f"{error.filename}: {error.strerror}"
        raise UserError(f"the cache {path} cannot be used ({why}); name another --out_dir") from None


def cache_key(path, kind: str, tokenizer, skip_bad_lines: bool, think_share: float | None) -> str:
    """16 hex digits of everything that decides the content of a cache."""
    # The words before the bytes are what earlier versions wrote: another spelling would find none of their caches.
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
    building.mkdir()  # not by tempfile, whose folders nobody else can read
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32  # half the disk for vocabularies below 65,537
    meta = {"file": str(path), "kind": kind, "dtype": np.dtype(dtype).name, "bad_lines": 0, "first_bad": []}
    try:
        with named(building), contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(building / f"{name}.bin", "wb")) for name in ARRAYS}
            for arrays, bad in _encoded_batches(path, kind, tokenizer, workers, think_share):
                # Bad rows are all counted, a few are shown. Without skip_bad_lines the build ends once there are enough
                # to show: a user mends several at a time.
                meta["bad_lines"] += len(bad)
                meta["first_bad"] += bad[: BAD_LINES_SHOWN - len(meta["first_bad"])]
                for name, file in files.items():
                    file.write(np.asarray(arrays[name], dtype if name == "tokens" else ARRAYS[name]).tobytes())
                if bad and not skip_bad_lines and len(meta["first_bad"]) >= BAD_LINES_SHOWN:
                    break
            files["meta"] = stack.enter_context(open(building / "meta.json", "wb"))
            files["meta"].write(json.dumps(meta).encode())
            for file in files.values():  # a power cut after the renaming would find it empty
                file.flush()
                os.fsync(file.fileno())
        if meta["bad_lines"] and not skip_bad_lines:
            lines = "\n".join(f"       {path}:{line}: {reason}" for line, reason in meta["first_bad"][1:])
            line, reason = meta["first_bad"][0]
            raise UserError(f"{path}:{line}: {reason} (--skip_bad_lines leaves such lines out)\n{lines}".rstrip())
        try:
            os.rename(building, final)
        except OSError:
            if not final.exists():  # else another process finished the same cache first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(final: Path):
    """Deletes what killed builds of this cache left behind: folders nothing was written to for an hour."""
    for folder in final.parent.glob(f"{final.name}.building-*"):
        with contextlib.suppress(OSError):  # another user's, or just renamed
            written = max((file.stat().st_mtime for file in folder.iterdir()), default=folder.stat().st_mtime)
            if time.time() - written > 3600:
                shutil.rmtree(folder, ignore_errors=True)


def _encoded_batches(path, kind, tokenizer, workers, think_share):
    """Yields (arrays, bad lines) batch by batch in the file's order, encoded by this process or by workers."""
    workers = workers or default_workers()
    # To start a worker takes longer than to tokenise a few batches.
    if path.stat().st_size < 4 * BATCH_CHARS:
        workers = 1
    with tqdm(desc=f"tokenising {path.name}", unit=" documents", disable=not sys.stderr.isatty(), leave=False) as bar:
        # The tokenizer travels as text, once to each worker, which builds its own.
        context = (kind, think_share, json.dumps(tokenizer_to_dict(tokenizer)))
        for encoded in ordered_map(_encode_in_worker, in_batches(raw_rows(path), BATCH_CHARS), workers, *context):
            yield encoded
            bar.update(len(encoded[0]["hashes"]))


@functools.lru_cache(maxsize=1)
def worker_tokenizer(files: str):
    """The tokenizer of these files, built once in each worker process: it takes longer than a batch."""
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
        except UNUSABLE as error:  # BadRow, and what render refuses
            bad.append((line, str(error)))
    if kind == "text":
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        # All texts of a batch in one call: to call the tokenizer costs more than a short text does.
        encoded = zip(encode_texts(tokenizer, rows), rows)
        # Learned are the text and the end, not the start, which nothing stands before.
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
        digest = chat_hash(row)  # while all thinking is in it: copies may keep it or not
        row = row if think_share is None else keep_thinking(row, think_share)
        return [_document(row, tokenizer, digest)]
    digest = chat_hash(row["chosen"][:-1])  # the prompt's: all pairs of a prompt fall on the same side of a split
    pair = [_document(row[side], tokenizer, digest, last_only=True) for side in ("chosen", "rejected")]
    if pair[0].ids == pair[1].ids:  # spelled otherwise, in blanks at an end or with thinking under its own key
        raise BadRow("chosen and rejected are the same answer: there is nothing to prefer")
    return pair


def _document(messages, tokenizer, digest: int, last_only=False) -> Document:
    ids, mask, turns = render_spans(tokenizer, messages)
    if last_only:  # of a pair the earlier answers are the same on both sides: nothing is preferred there
        mask = [0] * turns[-1] + mask[turns[-1] :]
    return Document(ids, sum(mask), digest, mask, turns, [ROLES.index(message["role"]) for message in messages])


def chat_hash(messages) -> int:
    """Of what is said in a conversation, whatever else a message carries (an id, a score), and however its thinking,
    its tools and its calls are spelled: in the content or under a key of their own, as JSON text or as lists."""
    # Copies must have one hash, else a conversation could be trained on in one spelling and validated on in the other.
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
    """A call's JSON, which has many spellings: the order of its keys, blanks, escaped letters."""
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
