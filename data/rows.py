"""Packed rows of training data: which documents, in which order, as tensors.

A row has `seq_len` slots, filled with whole documents or pieces of them (data/packing.py). Documents of a row do not
see each other: `segment_ids` numbers them from 1, and 0 is padding. Which row stands where depends on (seed, epoch,
index) alone, so a resumed run, or one with another number of processes, gets the same rows.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from data.packing import Items, chat_items, pack, pack_texts, pair_items
from data.token_cache import Cache, tokenised

IGNORED = -100  # label of a position from which nothing is learned, as in transformers
ENOUGH_KEPT = 0.95  # share of the learned tokens that rows keep; below it a run begins with a warning


class PackedRows:
    """The rows of one split of some caches. TextRows, ChatRows and PairRows below add what differs between the kinds.

    documents: the documents of the split, numbered through all caches (the second cache goes on where the first ends).
    Packing says which lengths make up each row (`slots`, `row_offsets`, see data/packing.py). It is done once, so every
    epoch has the same number of rows. Each epoch puts other items of the same length into the slots, and walks the rows
    in another order.
    training=False: rows in their order, and no text that fits a row is cut, so that a validation figure is one of whole
    documents.
    """

    per_unit = 1  # items that must stand side by side in one row: 2 for pairs

    def __init__(self, caches: list[Cache], documents: np.ndarray, seq_len: int, seed: int, training=True):
        self.caches, self.documents, self.seq_len = caches, documents, seq_len
        self.seed, self.training = seed, training
        # For each document of the split: which cache it is in, and its number there. Everywhere below, "document" is an
        # index into `documents`, `source` and `local`.
        firsts = np.cumsum([0] + [len(cache) for cache in caches])
        self.source = np.searchsorted(firsts, documents, side="right") - 1
        self.local = documents - firsts[self.source]
        lengths = self._of_documents(lambda cache: np.diff(cache.offsets))
        self.items, self.slots, self.row_offsets = self._packed(lengths)
        # Slots and the order of an epoch deal in units: one item, or the two items of a pair.
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
        """The most documents that one row has."""
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
        """All three shares, under their names in a run's result."""
        return {
            "real_token_share": self.real_token_share(),
            "learned_token_share": self.learned_token_share(),
            "learned_kept_share": self.learned_kept_share(),
        }

    def what_was_cut(self) -> str:
        """For the run's first lines: how much of what could be learned the rows keep, in words."""
        return f", {self.learned_kept_share():.1%} of the learned tokens kept"

    def _of_documents(self, numbers) -> np.ndarray:
        """A number for each document of this split, (n,) int64; numbers(cache) gives those of a whole cache."""
        found = np.empty(len(self.documents), np.int64)
        for c, cache in enumerate(self.caches):
            found[self.source == c] = numbers(cache)[self.local[self.source == c]]
        return found

    def _learned_tokens(self, lengths: np.ndarray) -> int:
        """Tokens with a label in the rows of an epoch. (TextRows has a shorter way.)"""
        items = self.items
        # The cache knows how many tokens of a whole document are learned. Only cut documents are counted token by
        # token: to count all would read the whole file before training.
        whole = items.lengths == lengths[items.document]
        learned = int(self._of_documents(lambda cache: cache.learned)[items.document[whole]].sum())
        first = np.maximum(items.start, items.learn_from)  # what lies before is context
        for i in np.flatnonzero(~whole):
            cache, begin = self._where(items.document[i])
            learned += int(np.count_nonzero(cache.learn[begin + first[i] : begin + items.end[i]]))
        return learned

    # ------------------------------------------------------------------------------------------------------- tensors
    def batch(self, indices) -> dict[str, torch.Tensor]:
        """The rows at these global indices (epoch * len + place in the epoch) as tensors.

        input_ids, labels, segment_ids: (B, seq_len) int64. count: the number of targets, by which the sum of the losses
        is divided. real_tokens: slots that are not padding. An index below 0 gives an empty row: the last step of an
        epoch may have fewer rows than a batch needs.
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
        at = 0  # the first free slot; slots that stay free are padding: id 0, no label, segment 0
        for segment, i in enumerate(items, start=1):
            cache, begin = self._where(self.items.document[i])
            prefix, start, end = self.items.prefix[i], self.items.start[i], self.items.end[i]
            positions = np.concatenate([np.arange(prefix), np.arange(start, end)])  # of the tokens, in their document
            place = slice(at, at + len(positions))
            ids[place] = cache.tokens[begin + positions]
            learned = (positions >= self.items.learn_from[i]) & self._teaches(cache, begin + positions)
            labels[place] = np.where(learned, ids[place], IGNORED)
            # Labels stand at their own token, and the loss predicts each token from the slot before it. For the first
            # token of this item that slot holds another document, so it has no label.
            labels[at] = IGNORED
            segments[place] = segment
            at = place.stop
        return ids, labels, segments

    def _teaches(self, cache: Cache, places: np.ndarray) -> np.ndarray:
        """Whether the tokens at these places of a cache are learned: those of the answers are."""
        return cache.learn[places] > 0

    def _where(self, document: int) -> tuple[Cache, int]:
        """The cache that a document is in, and the place of its first token there."""
        cache = self.caches[self.source[document]]
        return cache, cache.offsets[self.local[document]]

    # --------------------------------------------------------------------------------------------------------- order
    def _items_of_row(self, epoch: int, index: int) -> np.ndarray:
        """The items of the row at this place of an epoch."""
        rows, unit_of_slot = self._order(epoch)
        row = rows[index]
        units = unit_of_slot[self.row_offsets[row] : self.row_offsets[row + 1]]
        # Unit u stands for items u * per_unit, ..., u * per_unit + per_unit - 1.
        return (units[:, None] * self.per_unit + np.arange(self.per_unit)).flatten()

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row at each place of the epoch, unit in each slot): two permutations, drawn from (seed, epoch)."""
        orders = self._epochs
        if epoch not in orders:
            n = len(self.unit_lengths)
            rng = np.random.default_rng([self.seed, epoch])
            rows = rng.permutation(len(self)) if self.training else np.arange(len(self))
            tie_break = rng.random(n) if self.training else np.arange(n)
            # A slot takes only units of its own length. Sort the slots by length. Sort the units by length too, in
            # random order among equals. Then the k-th unit fits into the k-th slot.
            unit_of_slot = np.empty(n, np.int64)
            unit_of_slot[np.argsort(self.slots, kind="stable")] = np.lexsort((tie_break, self.unit_lengths))
            # Keep two epochs: a step may begin in one and end in the next. Make a new dict rather than change the old
            # one, which the thread that assembles rows may be reading.
            orders = {e: orders[e] for e in sorted(orders)[-1:]} | {epoch: (rows, unit_of_slot)}
            self._epochs = orders
        return orders[epoch]


class TextRows(PackedRows):
    """Plain texts: every token is learned but the first of a document, which has no token before it."""

    def _packed(self, lengths):
        return pack_texts(lengths, self.seq_len, fill=self.training)

    def _teaches(self, cache, places):
        return np.ones(len(places), bool)

    def _learned_tokens(self, lengths):
        return int((self.items.end - self.items.learn_from).sum())


class ChatRows(PackedRows):
    """Conversations: the answers are learned; the cache has the mask."""

    def _packed(self, lengths):
        items = chat_items(lengths, self._messages, self.seq_len)
        return items, *pack(items.lengths, self.seq_len)

    def _messages(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the messages of a conversation begin, and their roles."""
        cache, local = self.caches[self.source[document]], self.local[document]
        place = slice(cache.turn_offsets[local], cache.turn_offsets[local + 1])
        return cache.turns[place], cache.roles[place]


class PairRows(PackedRows):
    """Preference pairs: two answers to one prompt. The loss compares the last turns, which are the learned tokens.

    Pair i is items 2i (chosen) and 2i + 1 (rejected). They stand side by side in one row, so in every row the odd
    segments are chosen and the even ones rejected.
    """

    per_unit = 2

    def __init__(self, *args, **flags):
        # name -> a number for each document, which batch() adds for each segment (the reference's log-probabilities).
        self.per_document: dict[str, np.ndarray] = {}
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
        """As in PackedRows, with three differences: count is the number of pairs; documents (B, S) is the document of
        each segment, numbered through all caches, -1 where a row has fewer than S segments; the numbers of per_document
        are added as (B, S)."""
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
    """(documents for training, documents for validation), numbered through all caches.

    The hash of what a document says decides, so copies of a text are on the same side, in whatever file they stand.
    """
    hashes = np.concatenate([cache.hashes for cache in caches])
    # The hashes are uniform below 2^64, so this holds out the share val_split. 2^64 - 2048 is the largest float that a
    # uint64 can hold.
    held_out = hashes < np.uint64(min(val_split * 2.0**64, 2.0**64 - 2048))
    if val_split == 0:
        held_out[:] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def packed_splits(caches, kind: str, seq_len: int, seed: int, val_split: float, val_caches=None):
    """(training rows, validation rows or None where no document was held out) of the kind "text", "chat" or "pair".

    val_caches: validate on all of these, and train on all of `caches`.
    """
    train, val = split_documents(caches, 0 if val_caches else val_split)
    if len(train) == 0:
        raise UserError(f"--val_split {val_split} leaves no document to train on; lower it or bring more data")
    if val_caches:
        val = np.arange(sum(map(len, val_caches)))
    val_rows = ROWS[kind](val_caches or caches, val, seq_len, seed, training=False) if len(val) else None
    return ROWS[kind](caches, train, seq_len, seed), val_rows


def token_bytes(tokenizer) -> torch.Tensor | None:
    """UTF-8 bytes that each token stands for, (vocabulary,) int64; 0 for markers and tags.

    None unless the vocabulary is byte-level, where each character of an entry is one byte. No bits per byte are given
    then.
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

    # The first process tokenises, the others wait and then read its cache.
    train_caches = world.first_then_all(lambda: caches(files))
    val_caches = world.first_then_all(lambda: caches(val_files)) if val_files else None
    rows = packed_splits(train_caches, kind, args.seq_len, args.seed, args.val_split, val_caches)
    if world.first and (kept := rows[0].learned_kept_share()) < ENOUGH_KEPT:
        print(f"warning: answers longer than a row lose their end, {1 - kept:.1%} of what could be learned; "
              f"raise --seq_len {args.seq_len}", file=sys.stderr)  # fmt: skip
    return rows
