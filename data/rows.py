"""Packed rows of training data: which documents, in which order, as tensors.

A row is `seq_len` slots filled with whole documents, or pieces of them (data/packing.py). Documents of a row do not see
each other: `segment_ids` numbers them from 1, 0 is padding. The order is a function of (seed, epoch, index) alone, so a
resumed run, or one with other processes, meets the same rows.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from data.packing import Items, chat_items, pack, pack_texts, pair_items
from data.token_cache import Cache, tokenised

IGNORED = -100  # label of a position from which nothing is learned, as in transformers
ENOUGH_KEPT = 0.95  # of the tokens that could be learned: below it a run begins with a warning


class PackedRows:
    """Rows of one split of some caches; TextRows, ChatRows and PairRows below say what is special of each kind.

    documents: indices into the caches' documents laid end to end. Packing decides how many items of which lengths make
    up each row (`slots`, `row_offsets`). It is done once, so rows per epoch are constant; each epoch puts other items
    of the same length into the same slots, and walks the rows in another order.
    training=False: in their order, and no text that fits a row is cut, so that a figure is one of whole documents.
    """

    per_unit = 1  # items that are placed as a whole, side by side in one row

    def __init__(self, caches: list[Cache], documents: np.ndarray, seq_len: int, seed: int, training=True):
        self.caches, self.documents, self.seq_len = caches, documents, seq_len
        self.seed, self.training = seed, training
        # Which cache a document lies in, and where there. Below, "document" is always an index into `documents`.
        firsts = np.cumsum([0] + [len(cache) for cache in caches])
        self.source = np.searchsorted(firsts, documents, side="right") - 1
        self.local = documents - firsts[self.source]
        lengths = self._of_documents(lambda cache: np.diff(cache.offsets))
        self.items, self.slots, self.row_offsets = self._packed(lengths)
        self.unit_lengths = self.items.lengths.reshape(-1, self.per_unit).sum(axis=1)
        self.learned = self._learned_tokens(lengths)
        self._epochs: dict[int, tuple] = {}

    def _packed(self, lengths: np.ndarray) -> tuple[Items, np.ndarray, np.ndarray]:
        """Documents of these lengths, cut and packed: (items, slots, row_offsets), see data/packing.py."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.row_offsets) - 1

    @property
    def most_documents(self) -> int:
        """Of one row."""
        return int(np.diff(self.row_offsets).max()) * self.per_unit

    # ------------------------------------------------------------------------------------------------------- figures
    def real_token_share(self) -> float:
        """Tokens that are not padding / slots of the rows."""
        return float(self.unit_lengths.sum()) / (len(self) * self.seq_len)

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
        """In words, for the run's first lines: how much of what is to be learned the rows hold."""
        return f", {self.learned_kept_share():.1%} of the learned tokens kept"

    def _of_documents(self, numbers) -> np.ndarray:
        """numbers(cache) is one number for each document of a cache -> those of this split's documents, (n,)."""
        found = np.empty(len(self.documents), np.int64)
        for c, cache in enumerate(self.caches):
            found[self.source == c] = numbers(cache)[self.local[self.source == c]]
        return found

    def _learned_tokens(self, lengths: np.ndarray) -> int:
        """Tokens with a label in an epoch's rows. Of conversations (texts know it without looking)."""
        items = self.items
        # The cache knows how many tokens a whole document teaches. Only what was cut is counted token by token, so that
        # a large file is not read before training.
        whole = items.lengths == lengths[items.document]
        learned = int(self._of_documents(lambda cache: cache.learned)[items.document[whole]].sum())
        first = np.maximum(items.start, items.learn_from)
        for i in np.flatnonzero(~whole):
            cache, begin = self._where(items.document[i])
            learned += int(np.count_nonzero(cache.learn[begin + first[i] : begin + items.end[i]]))
        return learned

    # ------------------------------------------------------------------------------------------------------- tensors
    def batch(self, indices) -> dict[str, torch.Tensor]:
        """Rows by global index (epoch * len + place in the epoch) as tensors; an index below 0 is an empty row.

        input_ids, labels, segment_ids (B, seq_len) int64; count: targets learned, by which a sum of losses is divided;
        real_tokens: slots not padded.
        """
        return self._tensors([self._items_of_row(*divmod(index, len(self))) if index >= 0 else () for index in indices])

    def _tensors(self, items_of_rows) -> dict[str, torch.Tensor]:
        rows = [self._row(items) for items in items_of_rows]
        ids, labels, segments = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))
        return {
            "input_ids": ids, "labels": labels, "segment_ids": segments,
            # The loss predicts each token from the one before, so a label in the first slot is no target.
            "count": (labels[:, 1:] != IGNORED).sum(), "real_tokens": (segments > 0).sum(),
        }  # fmt: skip

    def _row(self, items) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The items of one row side by side: ids, labels and segment ids, (seq_len,) each."""
        T = self.seq_len
        ids, labels, segments = np.zeros(T, np.int64), np.full(T, IGNORED, np.int64), np.zeros(T, np.int64)
        at = 0  # the first free slot
        for segment, i in enumerate(items, start=1):
            cache, begin = self._where(self.items.document[i])
            prefix, start, end = self.items.prefix[i], self.items.start[i], self.items.end[i]
            positions = np.concatenate([np.arange(prefix), np.arange(start, end)])  # in the document
            place = slice(at, at + len(positions))
            ids[place] = cache.tokens[begin + positions]
            learned = (positions >= self.items.learn_from[i]) & self._teaches(cache, begin + positions)
            labels[place] = np.where(learned, ids[place], IGNORED)
            # Labels stand at their own token and the loss shifts them by one: the first token of this item would be
            # predicted from the last token of the item before, which is another document.
            labels[at] = IGNORED
            segments[place] = segment
            at = place.stop
        return ids, labels, segments

    def _teaches(self, cache: Cache, places: np.ndarray) -> np.ndarray:
        """Whether the tokens at these places of a cache are to be learned: those of the answers."""
        return cache.learn[places] > 0

    def _where(self, document: int) -> tuple[Cache, int]:
        """A document's cache, and the place of its first token there."""
        cache = self.caches[self.source[document]]
        return cache, cache.offsets[self.local[document]]

    # --------------------------------------------------------------------------------------------------------- order
    def _items_of_row(self, epoch: int, index: int) -> np.ndarray:
        """The items of the row at this place of an epoch."""
        rows, unit_of_slot = self._order(epoch)
        row = rows[index]
        units = unit_of_slot[self.row_offsets[row] : self.row_offsets[row + 1]]
        return (units[:, None] * self.per_unit + np.arange(self.per_unit)).flatten()

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row at each place of the epoch, unit in each slot): permutations drawn from (seed, epoch)."""
        orders = self._epochs
        if epoch not in orders:
            n = len(self.unit_lengths)
            rng = np.random.default_rng([self.seed, epoch])
            rows = rng.permutation(len(self)) if self.training else np.arange(len(self))
            tie_break = rng.random(n) if self.training else np.arange(n)
            # A slot takes only units of its own length. Sort the slots by length, and the units by length, in random
            # order among equals: then the k-th unit fits the k-th slot.
            unit_of_slot = np.empty(n, np.int64)
            unit_of_slot[np.argsort(self.slots, kind="stable")] = np.lexsort((tie_break, self.unit_lengths))
            # A step may straddle two epochs, not three. A new dict: a thread that fetches rows may read the old one.
            orders = {e: orders[e] for e in sorted(orders)[-1:]} | {epoch: (rows, unit_of_slot)}
            self._epochs = orders
        return orders[epoch]


class TextRows(PackedRows):
    """Plain texts: every token is learned but a document's first, which nothing stands before."""

    def _packed(self, lengths):
        return pack_texts(lengths, self.seq_len, fill=self.training)

    def _teaches(self, cache, places):
        return np.ones(len(places), bool)

    def _learned_tokens(self, lengths):
        return int((self.items.end - self.items.learn_from).sum())


class ChatRows(PackedRows):
    """Conversations: the answers are learned, by the cache's mask."""

    def _packed(self, lengths):
        items = chat_items(lengths, self._messages, self.seq_len)
        return items, *pack(items.lengths, self.seq_len)

    def _messages(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the messages of a conversation begin, and their roles."""
        cache, local = self.caches[self.source[document]], self.local[document]
        place = slice(cache.turn_offsets[local], cache.turn_offsets[local + 1])
        return cache.turns[place], cache.roles[place]


class PairRows(PackedRows):
    """Preference pairs: of two answers to one prompt, the last turns are learned.

    A pair's two documents are items 2i and 2i + 1 and stand next to each other in one row: odd segments are chosen,
    even ones rejected.
    """

    per_unit = 2

    def __init__(self, *args, **flags):
        self.per_document: dict[str, np.ndarray] = {}  # numbers by document that go with a batch, by their names
        super().__init__(*args, **flags)

    def _packed(self, lengths):
        last_turns = self._of_documents(lambda cache: cache.turns[cache.turn_offsets[1:] - 1])
        items, self.prompts_cut, self.answers_cut = pair_items(lengths, last_turns, self.seq_len)
        return items, *pack(items.lengths.reshape(-1, 2).sum(axis=1), self.seq_len)

    def what_was_cut(self):
        text = super().what_was_cut()
        text += f"; {self.prompts_cut:,} pairs cut at the front of the prompt" if self.prompts_cut else ""
        return text + (f", {self.answers_cut:,} of them in the answers too" if self.answers_cut else "")

    def _tensors(self, items_of_rows):
        """As for the others, but count is the number of pairs; documents (B, S): the document of each segment, -1 where
        a row has fewer segments than S; and the numbers of per_document, (B, S)."""
        documents = np.full((len(items_of_rows), max(2, *map(len, items_of_rows))), -1)
        for line, items in zip(documents, items_of_rows, strict=True):
            line[: len(items)] = self.documents[self.items.document[np.asarray(items, np.int64)]]
        # An index of -1 takes the last document's number, which no loss reads: there is no such segment.
        numbers = {name: torch.from_numpy(values[documents]) for name, values in self.per_document.items()}
        documents = torch.from_numpy(documents)
        pairs = (documents[:, ::2] >= 0).sum()
        return super()._tensors(items_of_rows) | {"documents": documents, "count": pairs, **numbers}


ROWS = {"text": TextRows, "chat": ChatRows, "pair": PairRows}


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
    """(training rows, validation rows) of the kind "text", "chat" or "pair"; the latter None where no document was held
    out.

    val_caches: validate on all of these and train on all of the others.
    """
    train, val = split_documents(caches, 0 if val_caches else val_split)
    if len(train) == 0:
        raise UserError(f"--val_split {val_split} leaves no document to train on; lower it or bring more data")
    if val_caches:
        val = np.arange(sum(map(len, val_caches)))
    val_rows = ROWS[kind](val_caches or caches, val, seq_len, seed, training=False) if len(val) else None
    return ROWS[kind](caches, train, seq_len, seed), val_rows


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


def load_rows(kind: str, files, tokenizer, args, world, val_files=None, think_share=None):
    """(training rows, validation rows or None) of data files, tokenised into --out_dir's cache.

    kind, think_share: as for data.token_cache.tokenised. args: --seq_len, --seed, --val_split, --out_dir and
    --skip_bad_lines.
    val_files: validate on these instead of on a part of the data.
    """

    def caches(files) -> list[Cache]:
        folder = Path(args.out_dir) / "cache"
        skip = args.skip_bad_lines
        return [tokenised(file, kind, tokenizer, folder, skip, think_share=think_share) for file in files]

    # The first process tokenises, the others find what it left.
    train_caches = world.first_then_all(lambda: caches(files))
    val_caches = world.first_then_all(lambda: caches(val_files)) if val_files else None
    rows = packed_splits(train_caches, kind, args.seq_len, args.seed, args.val_split, val_caches)
    if world.first and (kept := rows[0].learned_kept_share()) < ENOUGH_KEPT:
        print(f"warning: answers longer than a row lose their end, {1 - kept:.1%} of what could be learned; "
              f"raise --seq_len {args.seq_len}", file=sys.stderr)  # fmt: skip
    return rows
