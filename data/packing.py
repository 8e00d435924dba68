"""Cuts documents into items that fit a row, and lays items into rows with almost nothing left over.

Two steps. First each document becomes items: slices of it that are at most as long as a row. Then `pack` decides which
items share a row. Only lengths are looked at here, no token: millions of documents take seconds.
"""

import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model.chat_template import ROLES

SYSTEM, USER, ASSISTANT = map(ROLES.index, ("system", "user", "assistant"))
ENOUGH = 0.97  # of the rows: what would save fewer is no reason to cut a text that fits a row


@dataclass(frozen=True)
class Items:
    """Slices of documents: arrays of one length, (n,) int64, entry i of each says one thing of item i.

    An item's tokens are its document's [0, prefix) and then [start, end). The prefix is a system turn that is repeated;
    mostly it is empty. Tokens before position `learn_from` of the document are context: the model reads them and learns
    nothing from them.
    """

    document: np.ndarray  # which document it is cut from
    prefix: np.ndarray
    start: np.ndarray
    end: np.ndarray
    learn_from: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each item, (n,)."""
        return self.prefix + self.end - self.start


# ------------------------------------------------------------------------------------------------------------ texts
def text_items(lengths: np.ndarray, longest: int) -> Items:
    """Documents of these lengths (d,) -> items of at most `longest` tokens.

    A longer document goes on in a further item that repeats its last token as context, so every token but the first
    is learned exactly once.
    """
    lengths = np.asarray(lengths, np.int64)
    # With longest = 4, a document of 9 tokens becomes [0 1 2 3] [3 4 5 6] [6 7 8]. Token 4 is predicted from token 3,
    # so the second piece has to begin with 3. Each piece therefore brings longest - 1 new targets; the division is
    # rounded up, and a document of one token is a piece too.
    pieces = np.maximum(1, -(-(lengths - 1) // (longest - 1)))
    document = np.repeat(np.arange(len(lengths)), pieces)  # 0 0 0 1 2 2 ...
    first = np.cumsum(pieces) - pieces  # each document's first item
    start = (np.arange(len(document)) - first[document]) * (longest - 1)
    end = np.minimum(start + longest, lengths[document])
    return Items(document, np.zeros_like(start), start, end, learn_from=start + 1)


# ------------------------------------------------------------------------------------------------------------ chats
def chat_items(lengths: np.ndarray, messages, longest: int) -> Items:
    """Conversations -> items; `messages(i)` gives where conversation i's messages begin, and their roles.

    A conversation that fits is one item. A longer one is split after answers; the next item repeats, unlearned, the
    system turn that the conversation begins with and the exchange before, each where it fits whole beside the next
    answer and what was asked. Only these are cut where they are longer than the row together: first the question's
    front, then, if the answer alone is longer, the answer's end. roles: indices into model.chat_template.ROLES.
    """
    lengths = np.asarray(lengths, np.int64)
    document = np.flatnonzero(lengths <= longest)
    zero = np.zeros_like(document)
    whole = document, zero, zero, lengths[document], zero
    # Few conversations are longer than a row, so a loop in Python over them is fast enough.
    split = [_split_chat(i, lengths[i], messages(i), longest) for i in np.flatnonzero(lengths > longest)]
    fields = np.array([item for items in split for item in items], np.int64).reshape(-1, 5).T
    return Items(*map(np.concatenate, zip(whole, fields, strict=True)))


class Step(NamedTuple):
    """An answer with what stands between it and the answer before; positions in the conversation."""

    exchange: int  # where the user began to speak: earlier than `begin` where that is a tool's result
    begin: int
    answer: int
    end: int


def _steps(length: int, starts, roles) -> tuple[int, list[Step]]:
    """-> (tokens of the system turn that the conversation begins with, its steps)."""
    borders = [*map(int, starts), int(length)]
    head = borders[1] if roles[0] == SYSTEM else 0
    steps, first = [], int(head > 0)  # first: the message that the next step begins with
    for i, role in enumerate(roles):
        if role == ASSISTANT:
            # user, assistant (a call), tool, assistant: the second answer belongs to the exchange of the first one,
            # because its step begins with a tool's result, which nobody understands without the question.
            asked = not steps or roles[first] in (SYSTEM, USER)
            exchange = borders[first] if asked else steps[-1].exchange
            steps.append(Step(exchange, borders[first], borders[i], borders[i + 1]))
            first = i + 1
    return head, steps


def _split_chat(document: int, length: int, messages, longest: int) -> list[tuple]:
    """The items, in the order of Items' fields, of one conversation that is longer than a row.

    What follows its last answer is left out: nothing is learned from it.
    """
    head, steps = _steps(length, *messages)
    items, at = [], 0  # at: the first step not yet placed
    while at < len(steps):
        step, last = steps[at], at
        if step.end - step.begin > longest:
            # Question and answer alone do not fit. Keep as much of the answer as the row takes, then as much of the
            # question's end as there is room for: what is learned is worth more than its context.
            end = min(step.end, step.answer + longest)
            prefix, start = 0, max(step.begin, end - longest)
        else:
            # Context is added only as long as the step still fits, the most useful first: the question behind a tool's
            # result, then the system turn, then the exchange before.
            start = step.exchange if step.end - step.exchange <= longest else step.begin
            prefix = head if head + step.end - start <= longest else 0
            before = steps[max(at - 1, 0)].exchange
            start = before if prefix + step.end - before <= longest else start
            # Then the row is filled with the steps that follow.
            while last + 1 < len(steps) and prefix + steps[last + 1].end - start <= longest:
                last += 1
            end = steps[last].end
        items.append((document, prefix, start, end, step.begin))
        at = last + 1
    return items


# ------------------------------------------------------------------------------------------------------------ pairs
def pair_items(lengths: np.ndarray, answers: np.ndarray, longest: int) -> tuple[Items, int, int]:
    """Pairs -> (2n items, pairs cut at the front of their prompt, pairs whose answers are cut too).

    lengths (2n,): chosen and rejected in turns; answers (2n,): where each one's last turn begins, at the end of the
    common prompt. The two items of a pair together have at most `longest` tokens. What a pair has too many is taken
    from the front of the prompt, the same for both; where the answers alone are longer, from their ends.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)  # (n, 2): chosen, rejected
    prompt = np.asarray(answers, np.int64).reshape(-1, 2).min(axis=1)
    # The prompt stands in the row twice, so each token cut from it saves two. Cut it alike on both sides: otherwise the
    # two answers would be compared after different prompts.
    surplus = np.maximum(0, lengths.sum(axis=1) - longest)
    start = np.minimum(-(-surplus // 2), prompt)
    kept = lengths - start[:, None]
    # If that is not enough, the answers share the row: half each, or more where the other one needs less than half.
    chosen = np.minimum(kept[:, 0], np.maximum(longest // 2, longest - kept[:, 1]))
    rejected = np.minimum(kept[:, 1], longest - chosen)
    end = start[:, None] + np.stack([chosen, rejected], axis=1)
    zero = np.zeros(lengths.size, np.int64)
    items = Items(np.arange(lengths.size), zero, np.repeat(start, 2), end.flatten(), learn_from=zero)
    return items, int((start > 0).sum()), int((end < lengths).any(axis=1).sum())


# ------------------------------------------------------------------------------------------------------------- rows
def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Item lengths -> (slots, row_offsets): row r holds items of lengths slots[row_offsets[r]:row_offsets[r + 1]].

    Best fit, longest first: each item goes into the fullest row that still has room for it. Items of one length are
    alike, so the histogram of lengths is packed in place of the items, whole groups of rows at once: the time goes with
    the number of different lengths, which is at most `row_length`, and not with the number of items (Krell et al. 2021,
    arXiv 2107.02027).
    """
    open_rows = defaultdict(list)  # room left in a row -> groups of equal rows: (how many, the lengths in each)
    rooms: list[int] = []  # the keys of open_rows, sorted: the fullest rows come first
    for length, count in sorted(Counter(lengths.tolist()).items(), reverse=True):
        while count:  # so many items of this length are not placed yet
            at = bisect.bisect_left(rooms, length)  # the smallest room that is large enough
            if at == len(rooms):  # there is none: new rows
                rows, pattern, room = count, (), row_length
            else:
                room = rooms[at]
                rows, pattern = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            each = min(room // length, count)  # items a row takes: the fullest row stays the fullest until it is full
            placed = min(rows, count // each)  # rows that take so many
            # The group splits: `placed` rows got items, the others stay as they were. New rows that were not needed
            # (pattern is empty) do not exist.
            left = rows - placed if pattern else 0
            for n, p, r in ((left, pattern, room), (placed, pattern + each * (length,), room - each * length)):
                if n:
                    if r not in open_rows:
                        bisect.insort(rooms, r)
                    open_rows[r].append((n, p))
            count -= placed * each
    # Write the groups out, row by row.
    patterns = [entry for room in rooms for entry in open_rows[room]]
    slots = [np.tile(np.array(pattern, np.int64), n) for n, pattern in patterns]
    sizes = [np.full(n, len(pattern), np.int64) for n, pattern in patterns]
    return np.concatenate(slots), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


def pack_texts(lengths: np.ndarray, row_length: int, fill=True) -> tuple[Items, np.ndarray, np.ndarray]:
    """Items of text documents and their packing, (items, slots, row_offsets).

    Documents are cut only where they are longer than the row. If that leaves rows too empty (documents of 300 tokens in
    rows of 512) and `fill`, all are cut at a half, a quarter, ... of the row, where that saves rows: a token sees less
    before it, but more tokens are learned in a step, which is worth more (docs/log.md).
    """
    fewest = -(-int(np.sum(lengths)) // row_length)  # rows there must be; the last one may be far from full
    whole = best = _packed(lengths, row_length, row_length)
    for parts in (2, 4, 8) if fill else ():
        # Stop where even full rows would save too little, or a piece would have no target.
        if fewest >= ENOUGH * _rows(best) or row_length // parts < 2:
            break
        best = min(best, _packed(lengths, row_length // parts, row_length), key=_rows)
    return best if _rows(best) < ENOUGH * _rows(whole) else whole


def _packed(lengths: np.ndarray, longest: int, row_length: int) -> tuple[Items, np.ndarray, np.ndarray]:
    items = text_items(lengths, longest)
    return items, *pack(items.lengths, row_length)


def _rows(packed) -> int:
    return len(packed[2]) - 1
