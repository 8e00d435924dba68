"""A few rows of a stage file as training sees them: which tokens are learned, and how the rows pack.

found = preview("sft.jsonl", tokenizer, seq_len=512)
found.rows[0].ids, found.rows[0].learned       a row of the file: its tokens, and the mask
found.packed[0]                                a row of training: the segments that share it
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from cleaning.report import kind_of
from common.errors import UserError
from data.packing import chat_items, pack, pack_texts, pair_items
from data.reading import check_file, raw_rows
from data.token_cache import encode_batch

MOST_ROWS = 2000  # of the file that are read
PACKED = 12  # rows of training that are shown


@dataclass
class Row:
    """One document of the file. ids, learned: (T,); learned is 1 where the loss looks."""

    line: int
    ids: list[int]
    learned: list[int]


@dataclass
class Preview:
    """kind: "text", "chat" or "pair". whole: whether all rows of the file were read, or the first MOST_ROWS.

    bad           (line, why) of rows that cannot be used
    packed        of the first rows of training: the lengths of the pieces in each
    n_packed      rows of training in all; real: share of their slots that is no padding; cut: documents in pieces
    """

    kind: str
    whole: bool
    rows: list[Row]
    bad: list[tuple[int, str]]
    packed: list[list[int]]
    n_packed: int
    real: float
    cut: int


def preview(path, tokenizer, seq_len: int, shown: int = 20) -> Preview:
    """UserError where the file cannot be read or holds no usable row. shown: rows that are kept with their tokens."""
    if seq_len < 8:
        raise UserError(f"rows of training have at least 8 tokens, not {seq_len}")
    path = check_file(path)
    kind = kind_of(path)
    numbered = list(islice(raw_rows(path), MOST_ROWS + 1))
    whole, numbered = len(numbered) <= MOST_ROWS, numbered[:MOST_ROWS]
    arrays, bad = encode_batch(numbered, kind, tokenizer)
    lengths = np.asarray(arrays["lengths"], np.int64)
    if not len(lengths):
        raise UserError(f"{path} holds no usable rows")
    unusable = {line for line, _ in bad}
    lines = [line for line, _ in numbered if line not in unusable]
    lines = [line for line in lines for _ in range(2 if kind == "pair" else 1)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = []
    for i in range(min(shown * (2 if kind == "pair" else 1), len(lengths))):
        place = slice(starts[i], starts[i + 1])
        # Of a text every token is learned but the first, before which none stands.
        learned = [0] + [1] * (lengths[i] - 1) if kind == "text" else arrays["learn"][place].tolist()
        rows.append(Row(lines[i], arrays["tokens"][place].tolist(), learned))
    documents, slots, offsets = _packed(kind, arrays, lengths, seq_len)
    packed = [slots[offsets[i] : offsets[i + 1]].tolist() for i in range(min(PACKED, len(offsets) - 1))]
    real = float(slots.sum()) / ((len(offsets) - 1) * seq_len)
    cut = int((np.bincount(documents) > 1).sum())
    return Preview(kind, whole, rows, bad, packed, len(offsets) - 1, real, cut)


def _packed(kind: str, arrays: dict, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document of each item, slots, row_offsets), by the functions of data/packing.py, as data/rows.py calls them."""
    if kind == "text":
        items, slots, offsets = pack_texts(lengths, seq_len)
        return items.document, slots, offsets
    turns = np.concatenate([[0], np.cumsum(arrays["turn_counts"])]).astype(np.int64)
    begins, roles = np.asarray(arrays["turns"]), np.asarray(arrays["roles"])
    if kind == "chat":
        items = chat_items(
            lengths, lambda i: (begins[turns[i] : turns[i + 1]], roles[turns[i] : turns[i + 1]]), seq_len
        )
        return items.document, *pack(items.lengths, seq_len)
    items, _, _ = pair_items(lengths, begins[turns[1:] - 1], seq_len)
    return items.document, *pack(items.lengths.reshape(-1, 2).sum(axis=1), seq_len)
