"""Cuts documents into items that fit a row, and lays items into rows with almost nothing left over.

An item is a slice of one document: (document, prefix, start, end, learn_from). Its tokens are those of
[0, prefix) + [start, end); only positions from learn_from on are learned, what stands before is context.
"""

import bisect
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from model.chat_template import ROLES

SYSTEM, USER, ASSISTANT = map(ROLES.index, ("system", "user", "assistant"))
ENOUGH = 0.97  # of the rows: what would save fewer is no reason to cut a text that fits a row


def text_items(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Documents of these lengths -> items (n, 5) of at most `longest` tokens.

    A longer document goes on in a further item that repeats its last token as context, so every token but the first
    is learned exactly once.
    """
    lengths = np.asarray(lengths, np.int64)
    pieces = np.maximum(1, -(-(lengths - 1) // (longest - 1)))  # each brings longest - 1 new tokens to learn
    document = np.repeat(np.arange(len(lengths)), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(document)) - first[document]) * (longest - 1)
    end = np.minimum(start + longest, lengths[document])
    return np.stack([document, np.zeros_like(start), start, end, start + 1], axis=1)


def chat_items(lengths: np.ndarray, messages, longest: int) -> np.ndarray:
    """Conversations -> items (n, 5); `messages(i)` gives where conversation i's messages begin, and their roles.

    A conversation that fits is one item. A longer one is split after answers; the next item repeats, unlearned, the
    system turn that the conversation begins with and the exchange before, each where it fits whole beside the next
    answer and what was asked. Only these are cut where they are longer than the row together: first the question's
    front, then, if the answer alone is longer, the answer's end. roles: indices into model.chat_template.ROLES.
    """
    lengths = np.asarray(lengths, np.int64)
    document = np.flatnonzero(lengths <= longest)
    zero = np.zeros_like(document)
    short = np.stack([document, zero, zero, lengths[document], zero], axis=1)
    split = [_split_chat(i, lengths[i], messages(i), longest) for i in np.flatnonzero(lengths > longest)]
    return np.concatenate([short, np.array([item for items in split for item in items], np.int64).reshape(-1, 5)])


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
            asked = not steps or roles[first] in (SYSTEM, USER)
            exchange = borders[first] if asked else steps[-1].exchange
            steps.append(Step(exchange, borders[first], borders[i], borders[i + 1]))
            first = i + 1
    return head, steps


def _split_chat(document: int, length: int, messages, longest: int) -> list[tuple]:
    """Items of one conversation that is longer than a row; what follows its last answer is left out."""
    head, steps = _steps(length, *messages)
    items, at = [], 0  # at: the first step not yet placed
    while at < len(steps):
        step, last = steps[at], at
        if step.end - step.begin > longest:
            end = min(step.end, step.answer + longest)
            prefix, start = 0, max(step.begin, end - longest)
        else:
            start = step.exchange if step.end - step.exchange <= longest else step.begin
            prefix = head if head + step.end - start <= longest else 0
            before = steps[max(at - 1, 0)].exchange
            start = before if prefix + step.end - before <= longest else start
            while last + 1 < len(steps) and prefix + steps[last + 1].end - start <= longest:
                last += 1
            end = steps[last].end
        items.append((document, prefix, start, end, step.begin))
        at = last + 1
    return items


def pair_items(lengths: np.ndarray, answers: np.ndarray, longest: int) -> tuple[np.ndarray, int, int]:
    """Pairs -> (items (2n, 5), pairs cut at the front of their prompt, pairs whose answers are cut too).

    lengths (2n,): chosen and rejected in turns; answers (2n,): where each one's last turn begins, at the end of the
    common prompt. The two items of a pair together have at most `longest` tokens. What a pair has too many is taken
    from the front of the prompt, the same for both; where the answers alone are longer, from their ends.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    prompt = np.asarray(answers, np.int64).reshape(-1, 2).min(axis=1)
    surplus = np.maximum(0, lengths.sum(axis=1) - longest)
    start = np.minimum(-(-surplus // 2), prompt)
    kept = lengths - start[:, None]
    first = np.minimum(kept[:, 0], np.maximum(longest // 2, longest - kept[:, 1]))  # a short one leaves room
    second = np.minimum(kept[:, 1], longest - first)
    end = start[:, None] + np.stack([first, second], axis=1)
    starts = np.repeat(start, 2)
    zero = np.zeros_like(starts)
    items = np.stack([np.arange(lengths.size), zero, starts, end.flatten(), zero], axis=1)
    return items, int((start > 0).sum()), int((end < lengths).any(axis=1).sum())


# ------------------------------------------------------------------------------------------------------------ rows
def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Item lengths -> (slots, row_offsets): row r holds items of lengths slots[row_offsets[r]:row_offsets[r + 1]].

    Best fit over the histogram of lengths, longest first (Krell et al. 2021, arXiv 2107.02027): items of one length are
    alike, so whole groups are placed at once and millions of items take seconds.
    """
    open_rows = defaultdict(list)  # room left -> [(how many rows, the lengths in them), ...]
    rooms: list[int] = []  # the keys of open_rows, sorted
    for length, count in sorted(Counter(lengths.tolist()).items(), reverse=True):
        while count:
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                rows, pattern, room = count, (), row_length
            else:
                room = rooms[at]
                rows, pattern = open_rows[room].pop()
                if not open_rows[room]:
                    del open_rows[room], rooms[at]
            each = min(room // length, count)  # the tightest row stays the tightest until it is full
            placed = min(rows, count // each)
            left = rows - placed if pattern else 0  # rows that were not opened need not be kept
            for n, p, r in ((left, pattern, room), (placed, pattern + each * (length,), room - each * length)):
                if n:
                    if r not in open_rows:
                        bisect.insort(rooms, r)
                    open_rows[r].append((n, p))
            count -= placed * each
    patterns = [entry for room in rooms for entry in open_rows[room]]
    slots = [np.tile(np.array(pattern, np.int64), n) for n, pattern in patterns]
    sizes = [np.full(n, len(pattern), np.int64) for n, pattern in patterns]
    return np.concatenate(slots), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


def pack_texts(lengths: np.ndarray, row_length: int, fill=True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of text documents and their packing, (items, slots, row_offsets).

    Documents are cut only where they are longer than the row. If that leaves rows too empty (documents of 300 tokens in
    rows of 512) and `fill`, all are cut at a half, a quarter, ... of the row, where that saves rows: a token sees less
    before it, but more tokens are learned in a step, which is worth more (docs/log.md).
    """
    fewest = -(-int(np.sum(lengths)) // row_length)  # rows there must be; the last one may be far from full
    whole = best = _packed(lengths, row_length, row_length)
    for parts in (2, 4, 8) if fill else ():
        if fewest >= ENOUGH * _rows(best) or row_length // parts < 2:
            break
        best = min(best, _packed(lengths, row_length // parts, row_length), key=_rows)
    return best if _rows(best) < ENOUGH * _rows(whole) else whole


def _packed(lengths: np.ndarray, longest: int, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    items = text_items(lengths, longest)
    return items, *pack(item_lengths(items), row_length)


def _rows(packed) -> int:
    return len(packed[2]) - 1


def item_lengths(items: np.ndarray) -> np.ndarray:
    """Tokens of each item, (n,)."""
    return items[:, 1] + items[:, 3] - items[:, 2]
