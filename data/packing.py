"""Cuts documents into items that fit a row, and packs the items into rows with little padding.

Two steps. First each document becomes one or more items: slices that are at most as long as a row. Then `pack` decides
which items share a row. Both steps need only the documents' lengths, so millions of documents take seconds.

An example: documents of 5, 9 and 3 tokens, rows of 8. The second document is too long and becomes two items, tokens
0 to 7 and 7 to 8 (token 7 again, as context for token 8). Items of 5, 8, 2 and 3 tokens make three rows: 8, 5 + 3, 2.
"""

import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model.chat_template import ROLES

SYSTEM, USER, ASSISTANT = map(ROLES.index, ("system", "user", "assistant"))
ENOUGH = 0.97  # cutting texts that fit a row must leave at most this share of the rows


@dataclass(frozen=True)
class Items:
    """Slices of documents: five arrays of shape (n,), int64; entry i of each describes item i.

    The tokens of an item are [0, prefix) of its document, followed by [start, end). The prefix is a repeated system
    turn, and is 0 for most items. Tokens before position `learn_from` of the document are context only: the model reads
    them, and they get no label. All positions count from the document's first token.
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

    A longer document goes on in the next item, which repeats the last token of the item before as context. So every
    token but the document's first is learned exactly once.
    """
    lengths = np.asarray(lengths, np.int64)
    # With longest = 4, a document of 9 tokens becomes [0 1 2 3] [3 4 5 6] [6 7 8]. Token 4 is predicted from token 3,
    # so the second piece has to begin with 3. Each piece therefore has longest - 1 new targets. -(-a // b) rounds the
    # division up; a document of one token is one piece.
    pieces = np.maximum(1, -(-(lengths - 1) // (longest - 1)))
    document = np.repeat(np.arange(len(lengths)), pieces)  # 0 0 0 1 2 2 ...
    first = np.cumsum(pieces) - pieces  # each document's first item
    start = (np.arange(len(document)) - first[document]) * (longest - 1)
    end = np.minimum(start + longest, lengths[document])
    return Items(document, np.zeros_like(start), start, end, learn_from=start + 1)


# ------------------------------------------------------------------------------------------------------------ chats
def chat_items(lengths: np.ndarray, messages, longest: int) -> Items:
    """Conversations -> items.

    messages(i): where the messages of conversation i begin, and their roles (indices into model.chat_template.ROLES).

    A conversation that fits is one item. A longer one is split after answers. The next item then repeats two things as
    context: the system turn at the conversation's beginning, and the exchange before. Each is repeated only if it fits
    whole beside the next question and answer. A question and answer that do not fit together are cut: first the front
    of the question, then, if the answer alone is longer than a row, the end of the answer.
    """
    lengths = np.asarray(lengths, np.int64)
    document = np.flatnonzero(lengths <= longest)
    zero = np.zeros_like(document)
    whole = document, zero, zero, lengths[document], zero
    # The rest is split one by one: few conversations are longer than a row, so a loop in Python is fast enough.
    split = [_split_chat(i, lengths[i], messages(i), longest) for i in np.flatnonzero(lengths > longest)]
    # One line per item, turned into one array per field. The reshape also holds where nothing was split.
    fields = np.array([item for items in split for item in items], np.int64).reshape(-1, 5).T
    return Items(*map(np.concatenate, zip(whole, fields, strict=True)))


class Step(NamedTuple):
    """An answer, and the messages between it and the answer before. All are positions in the conversation."""

    exchange: int  # where the user's question begins; earlier than `begin` if the step begins with a tool's result
    begin: int  # the first message after the answer before
    answer: int
    end: int


def _steps(length: int, starts, roles) -> tuple[int, list[Step]]:
    """-> (tokens of the system turn at the beginning, 0 if there is none; the steps of the conversation)."""
    borders = [*map(int, starts), int(length)]  # message i is [borders[i], borders[i + 1])
    head = borders[1] if roles[0] == SYSTEM else 0
    steps, first = [], int(head > 0)  # first: the message that the next step begins with
    for i, role in enumerate(roles):
        if role == ASSISTANT:
            # In "user, assistant (a call), tool, assistant" the second step begins with a tool's result. That result
            # means nothing without the question, so the second step has the exchange of the first one.
            asked = not steps or roles[first] in (SYSTEM, USER)
            exchange = borders[first] if asked else steps[-1].exchange
            steps.append(Step(exchange, borders[first], borders[i], borders[i + 1]))
            first = i + 1
    return head, steps


def _split_chat(document: int, length: int, messages, longest: int) -> list[tuple]:
    """The items of one conversation that is longer than a row, as tuples in the order of Items' fields.

    Messages after the last answer are left out: nothing is learned from them.
    """
    head, steps = _steps(length, *messages)
    items, at = [], 0  # at: the first step that is in no item yet
    while at < len(steps):
        step, last = steps[at], at
        if step.end - step.begin > longest:
            # Question and answer alone do not fit. Keep as much of the answer as the row takes, then as much of the
            # question's end as there is room for: the answer is learned, the question is only its context.
            end = min(step.end, step.answer + longest)
            prefix, start = 0, max(step.begin, end - longest)
        else:
            # Add context where there is room, the most useful first: the question that led to a tool's result, then
            # the system turn, then the exchange before.
            start = step.exchange if step.end - step.exchange <= longest else step.begin
            prefix = head if head + step.end - start <= longest else 0
            before = steps[max(at - 1, 0)].exchange
            start = before if prefix + step.end - before <= longest else start
            # Then fill the row with the steps that follow.
            while last + 1 < len(steps) and prefix + steps[last + 1].end - start <= longest:
                last += 1
            end = steps[last].end
        # Context stands before step.begin, so it gets no label: an answer is learned in one item only.
        items.append((document, prefix, start, end, step.begin))
        at = last + 1
    return items


# ------------------------------------------------------------------------------------------------------------ pairs
def pair_items(lengths: np.ndarray, answers: np.ndarray, longest: int) -> tuple[Items, int, int]:
    """n pairs -> (2n items, how many pairs lose the front of their prompt, how many lose a part of an answer too).

    lengths (2n,): tokens of chosen, rejected, chosen, rejected, ...; answers (2n,): where the last turn of each begins,
    which is where their common prompt ends. The two items of a pair together have at most `longest` tokens. A longer
    pair loses the front of its prompt, the same tokens on both sides. If the answers alone are too long, their ends are
    cut as well.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)  # (n, 2): chosen, rejected
    prompt = np.asarray(answers, np.int64).reshape(-1, 2).min(axis=1)  # (n,)
    # The prompt stands in the row twice, so each token cut from it saves two. Both sides lose the same tokens: the loss
    # compares two answers to the same prompt.
    surplus = np.maximum(0, lengths.sum(axis=1) - longest)
    start = np.minimum(-(-surplus // 2), prompt)
    kept = lengths - start[:, None]
    # If that is not enough, the answers share the row: half each, or more where the other needs less than half.
    chosen = np.minimum(kept[:, 0], np.maximum(longest // 2, longest - kept[:, 1]))
    rejected = np.minimum(kept[:, 1], longest - chosen)
    end = start[:, None] + np.stack([chosen, rejected], axis=1)
    zero = np.zeros(lengths.size, np.int64)
    items = Items(np.arange(lengths.size), zero, np.repeat(start, 2), end.flatten(), learn_from=zero)
    return items, int((start > 0).sum()), int((end < lengths).any(axis=1).sum())


# ------------------------------------------------------------------------------------------------------------- rows
def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Item lengths -> (slots, row_offsets): row r holds items of lengths slots[row_offsets[r]:row_offsets[r + 1]].

    Best fit, longest first: take the items from the longest to the shortest; each goes into the fullest row that still
    has room for it. Done item by item this would be slow. But items of one length are interchangeable, and so are rows
    that hold the same lengths. So a step places many items of one length into a group of equal rows at once, and the
    time depends on the number of different lengths (at most `row_length`), not on the number of items (Krell et al.
    2021, arXiv 2107.02027).

    With rows of 8 and lengths 5, 5, 3, 2: two new rows with a 5, room 3 left in each. The 3 goes into one of them,
    which splits the group: one row 5 + 3 is full, one row 5 has room 3. The 2 goes into that one.
    """
    open_rows = defaultdict(list)  # room left in a row -> groups of equal rows: (number of rows, the lengths in each)
    rooms: list[int] = []  # the keys of open_rows, sorted: the fullest rows come first

    def put(rows: int, pattern: tuple, room: int):
        if room not in open_rows:
            bisect.insort(rooms, room)
        open_rows[room].append((rows, pattern))

    for length, count in sorted(Counter(lengths.tolist()).items(), reverse=True):
        while count:  # items of this length that have no place yet
            at = bisect.bisect_left(rooms, length)  # the smallest room that is large enough
            if at == len(rooms):  # no row has room: new rows, at most one for each item
                rows, pattern, room = count, (), row_length
            else:
                room = rooms[at]
                rows, pattern = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            # A row takes as many items of this length as fit, because it stays the fullest row until it is full.
            each = min(room // length, count)
            placed = min(rows, count // each)  # rows that take `each` items
            # The group splits: `placed` rows get items, the others stay as they were. New rows that are not needed
            # (their pattern is empty) are not kept.
            if pattern and rows > placed:
                put(rows - placed, pattern, room)
            put(placed, pattern + each * (length,), room - each * length)
            count -= placed * each
    # Write the groups out, row by row.
    patterns = [entry for room in rooms for entry in open_rows[room]]
    slots = [np.tile(np.array(pattern, np.int64), n) for n, pattern in patterns]
    sizes = [np.full(n, len(pattern), np.int64) for n, pattern in patterns]
    return np.concatenate(slots), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


def pack_texts(lengths: np.ndarray, row_length: int, fill=True) -> tuple[Items, np.ndarray, np.ndarray]:
    """Items of text documents and their packing, (items, slots, row_offsets).

    Documents are cut only where they are longer than the row. That can leave much padding: documents of 300 tokens in
    rows of 512 leave 212 slots empty. With `fill`, all documents are then cut at a half, a quarter or an eighth of the
    row, if that saves rows: a token sees less before it, but a step learns more tokens (docs/log.md has the figures).
    """
    fewest = -(-int(np.sum(lengths)) // row_length)  # as many rows as full rows would need, rounded up
    whole = best = _packed(lengths, row_length, row_length)
    for parts in (2, 4, 8) if fill else ():
        # Stop if even full rows would save too little, or if a piece would be a single token, which has no target.
        if fewest >= ENOUGH * _rows(best) or row_length // parts < 2:
            break
        best = min(best, _packed(lengths, row_length // parts, row_length), key=_rows)
    return best if _rows(best) < ENOUGH * _rows(whole) else whole


def _packed(lengths: np.ndarray, longest: int, row_length: int) -> tuple[Items, np.ndarray, np.ndarray]:
    items = text_items(lengths, longest)
    return items, *pack(items.lengths, row_length)


def _rows(packed) -> int:
    return len(packed[2]) - 1
