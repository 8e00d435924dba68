"""Packed rows of training data: which documents, in which order, as tensors.

A row is `seq_len` slots filled with whole documents, or pieces of them (data/packing.py). Documents of a row do not see
each other: `segment_ids` numbers them from 1, 0 is padding. The order is a function of (seed, epoch, index) alone, so a
resumed run, or one with other processes, meets the same rows.
"""

import numpy as np
import torch

from common.errors import UserError
from data.packing import chat_items, item_lengths, pack, pack_texts, pair_items
from data.token_cache import Cache

IGNORED = -100  # label of a position from which nothing is learned, as in transformers


class PackedRows:
    """Rows of one split of some caches.

    kind "text" | "chat" | "pair"; documents: indices into the caches' documents laid end to end. Rows per epoch are
    constant; each epoch puts other documents of the same length into the same places and walks the rows in another
    order. A pair's two documents stand next to each other in one row: odd segments are chosen, even ones rejected.
    training=False: in their order, and no text that fits a row is cut, so that a figure is one of whole documents.
    """

    def __init__(self, caches: list[Cache], documents: np.ndarray, kind: str, seq_len: int, seed: int, training=True):
        self.caches, self.seq_len, self.seed, self.training, self.kind = caches, seq_len, seed, training, kind
        self.documents = documents
        firsts = np.cumsum([0] + [len(cache) for cache in caches])
        self.source = np.searchsorted(firsts, documents, side="right") - 1  # which cache each document lies in
        self.local = documents - firsts[self.source]
        lengths = self._of_documents(lambda cache: np.diff(cache.offsets))
        if kind == "text":
            self.items, self.slots, self.row_offsets = pack_texts(lengths, seq_len, fill=training)
            self.lengths = item_lengths(self.items)
        else:
            if kind == "pair":
                answers = self._of_documents(lambda cache: cache.turns[cache.turn_offsets[1:] - 1])  # the last turns
                self.items, *self.cut_pairs = pair_items(lengths, answers, seq_len)
            else:
                self.items = chat_items(lengths, self._messages, seq_len)
            # what is placed as a whole, an item or the two of a pair
            self.lengths = item_lengths(self.items).reshape(-1, 2 if kind == "pair" else 1).sum(axis=1)
            self.slots, self.row_offsets = pack(self.lengths, seq_len)
        self.learned = self._learned(lengths)
        self.per_document: dict[str, np.ndarray] = {}  # numbers by document that go with a batch of pairs
        self._epochs: dict[int, tuple] = {}

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.row_offsets) - 1

    @property
    def most_documents(self) -> int:
        """Of one row."""
        return int(np.diff(self.row_offsets).max()) * (2 if self.kind == "pair" else 1)

    def real_token_share(self) -> float:
        """Tokens that are not padding / slots of the rows."""
        return float(self.lengths.sum()) / (len(self) * self.seq_len)

    def learned_token_share(self) -> float:
        """Tokens with a label / slots of the rows."""
        return self.learned / (len(self) * self.seq_len)

    def learned_kept_share(self) -> float:
        """Learned tokens in the rows / learned tokens in the documents: below 1 where an answer was cut."""
        return self.learned / max(int(self._of_documents(lambda cache: cache.learned).sum()), 1)

    def shares(self) -> dict[str, float]:
        """The three, for a run's result."""
        return {
            "real_token_share": self.real_token_share(),
            "learned_token_share": self.learned_token_share(),
            "learned_kept_share": self.learned_kept_share(),
        }

    def what_was_cut(self) -> str:
        """In words, for the run's first lines: how much of what is to be learned the rows hold, and pairs cut."""
        prompts, answers = getattr(self, "cut_pairs", (0, 0))
        text = f", {self.learned_kept_share():.1%} of the learned tokens kept"
        text += f"; {prompts:,} pairs cut at the front of the prompt" if prompts else ""
        return text + (f", {answers:,} of them in the answers too" if answers else "")

    def _of_documents(self, numbers) -> np.ndarray:
        """numbers(cache) is one number for each document of a cache -> those of this split's documents, (n,)."""
        found = np.empty(len(self.documents), np.int64)
        for c, cache in enumerate(self.caches):
            found[self.source == c] = numbers(cache)[self.local[self.source == c]]
        return found

    def _learned(self, lengths: np.ndarray) -> int:
        """Tokens with a label in an epoch's rows. Only what was cut is counted token by token."""
        document, _, start, end, learn_from = self.items.T
        if self.kind == "text":
            return int((end - learn_from).sum())
        whole = item_lengths(self.items) == lengths[document]
        learned = int(self._of_documents(lambda cache: cache.learned)[document[whole]].sum())
        first = np.maximum(start, learn_from)
        for i in np.flatnonzero(~whole):
            cache, begin = self._where(document[i])
            learned += int(np.count_nonzero(cache.learn[begin + first[i] : begin + end[i]]))
        return learned

    def batch(self, indices) -> dict[str, torch.Tensor]:
        """Rows by global index (epoch * len + place in the epoch) as tensors; an index below 0 is an empty row.

        input_ids, labels, segment_ids (B, seq_len) int64; weight: targets learned; real_tokens: slots not padded.
        Pairs: weight is their number; documents (B, S), the document of each segment or -1, and per_document's (B, S).
        """
        items = [self._items_of_row(*divmod(index, len(self))) if index >= 0 else () for index in indices]
        rows = [self._row(row) for row in items]
        ids, labels, segments = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))
        batch = {
            "input_ids": ids, "labels": labels, "segment_ids": segments,
            "weight": (labels[:, 1:] != IGNORED).sum(), "real_tokens": (segments > 0).sum(),
        }  # fmt: skip
        return batch | self._pairs(items) if self.kind == "pair" else batch

    def _pairs(self, items_of_rows) -> dict[str, torch.Tensor]:
        documents = np.full((len(items_of_rows), max(2, *map(len, items_of_rows))), -1)
        for line, items in zip(documents, items_of_rows, strict=True):
            line[: len(items)] = self.documents[self.items[np.asarray(items, np.int64), 0]]
        numbers = {name: torch.from_numpy(values[documents]) for name, values in self.per_document.items()}
        documents = torch.from_numpy(documents)
        return {"documents": documents, "weight": (documents[:, ::2] >= 0).sum(), **numbers}

    def _items_of_row(self, epoch: int, index: int):
        rows, item_of_slot = self._order(epoch)
        row = rows[index]
        items = item_of_slot[self.row_offsets[row] : self.row_offsets[row + 1]]
        return items if self.kind != "pair" else np.stack([2 * items, 2 * items + 1], axis=1).flatten()

    def _row(self, items):
        ids, labels, segments = self._empty()
        at = 0
        for segment, item in enumerate(items, start=1):
            document, prefix, start, end, learn_from = self.items[item]
            cache, begin = self._where(document)
            place = slice(at, at + prefix + end - start)
            where = np.concatenate([np.arange(prefix), np.arange(start, end)])  # positions in the document
            ids[place] = cache.tokens[begin + where]
            learned = where >= learn_from
            if self.kind != "text":
                learned &= cache.learn[begin + where] > 0
            labels[place] = np.where(learned, ids[place], IGNORED)
            labels[at] = IGNORED  # its target would be predicted from the document before
            segments[place] = segment
            at = place.stop
        return ids, labels, segments

    def _empty(self):
        T = self.seq_len
        return np.zeros(T, np.int64), np.full(T, IGNORED, np.int64), np.zeros(T, np.int64)

    def _order(self, epoch: int):
        """(row at each place of the epoch, item in each slot): permutations drawn from (seed, epoch)."""
        orders = self._epochs
        if epoch not in orders:
            rng = np.random.default_rng([self.seed, epoch])
            rows = rng.permutation(len(self)) if self.training else np.arange(len(self))
            tie_break = rng.random(len(self.lengths)) if self.training else np.arange(len(self.lengths))
            item_of_slot = np.empty(len(self.lengths), np.int64)
            item_of_slot[np.argsort(self.slots, kind="stable")] = np.lexsort((tie_break, self.lengths))
            # A step may straddle two epochs, not three. A new dict: a thread that fetches rows may read the old one.
            orders = {e: orders[e] for e in sorted(orders)[-1:]} | {epoch: (rows, item_of_slot)}
            self._epochs = orders
        return orders[epoch]

    def _where(self, document: int) -> tuple[Cache, int]:
        cache = self.caches[self.source[document]]
        return cache, cache.offsets[self.local[document]]

    def _messages(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the messages of a conversation begin, and their roles."""
        cache, local = self.caches[self.source[document]], self.local[document]
        place = slice(cache.turn_offsets[local], cache.turn_offsets[local + 1])
        return cache.turns[place], cache.roles[place]


def split_documents(caches: list[Cache], val_split: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the documents for training and for validation.

    The hash of a document's text decides, so copies of a text fall on the same side, in whatever file they stand.
    """
    hashes = np.concatenate([cache.hashes for cache in caches])
    held_out = hashes < np.uint64(min(val_split * 2.0**64, 2.0**64 - 2048))
    if val_split == 0:
        held_out[:] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def packed_splits(caches, kind: str, seq_len: int, seed: int, val_split: float, val_caches=None):
    """(training rows, validation rows); the latter None where no document was held out.

    val_caches: validate on all of these and train on all of the others.
    """
    train, val = split_documents(caches, 0 if val_caches else val_split)
    if len(train) == 0:
        raise UserError(f"--val_split {val_split} leaves no document to train on; lower it or bring more data")
    if val_caches:
        val = np.arange(sum(map(len, val_caches)))
    val_rows = PackedRows(val_caches or caches, val, kind, seq_len, seed, training=False) if len(val) else None
    return PackedRows(caches, train, kind, seq_len, seed), val_rows


def token_bytes(tokenizer) -> torch.Tensor | None:
    """UTF-8 bytes that each token stands for, (vocabulary,); markers and tags count none.

    A byte-level vocabulary spells every byte as one character. None for other kinds: no bits per byte are given then.
    """
    if "ByteLevel" not in type(tokenizer.backend_tokenizer.decoder).__name__:
        return None
    table = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, i in tokenizer.get_vocab().items():
        table[i] = len(token)
    table[list(tokenizer.added_tokens_decoder)] = 0
    return table
