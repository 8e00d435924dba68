"""What a stage's rows teach, for the training record: turns, thinking, tool calls, and a few questions to try.

The chat page reads it from the weights' file: it offers what the model was taught, and says of the rest that it was
not. A thousand documents, spread evenly over the training part, are looked at.
"""

from collections import Counter

import numpy as np

from data.rows import PackedRows, PairRows, TextRows
from model.chat_template import ROLES

LOOKED_AT = 1000
EXAMPLES, SHORTEST, LONGEST = 6, 3, 40  # how many examples, and their characters
BEGINNING = 12  # characters of a text that a base model is asked to continue


def taught(rows: PackedRows, tokenizer) -> dict:
    """-> {"kind", "documents" looked at, "examples"}, and for conversations the shares of documents with so many
    questions {"1": 0.9, "2": 0.1}, with thinking, with tool calls and with a system message. {} for pairs: they teach
    which answer to prefer, not how to chat."""
    if isinstance(rows, PairRows):
        return {}
    chosen = np.unique(np.linspace(0, len(rows.documents) - 1, min(LOOKED_AT, len(rows.documents))).astype(int))
    if isinstance(rows, TextRows):
        texts = (_said(tokenizer, _document(rows, i)[0][: 4 * BEGINNING])[:BEGINNING] for i in chosen)
        return {"kind": "text", "documents": len(chosen), "examples": _spread([text for text in texts if text])}
    think, think_end, call = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<tool_call>"])
    turns, shares, questions = Counter(), Counter(), []
    for i in chosen:
        ids, learned, begins, roles = _document(rows, i)
        said = ids[learned > 0].tolist()
        turns[str(int((roles == ROLES.index("user")).sum()))] += 1
        shares["thinking"] += _thinks(tokenizer, said, think, think_end)
        shares["tools"] += call in said
        shares["system"] += ROLES[roles[0]] == "system"
        if ROLES[roles[0]] == "user":
            end = begins[1] if len(begins) > 1 else len(ids)
            question = _said(tokenizer, ids[:end]).removeprefix("user").strip()
            if SHORTEST <= len(question) <= LONGEST and "\n" not in question:
                questions.append(question)
    n = len(chosen)
    return {
        "kind": "chat", "documents": n, "turns": {name: round(turns[name] / n, 4) for name in sorted(turns, key=int)},
        **{name: round(shares[name] / n, 4) for name in ("thinking", "tools", "system")},
        "examples": _spread(questions),
    }  # fmt: skip


def _document(rows: PackedRows, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and mask of document i of the rows, (T,) each; where its messages begin, and who speaks in them."""
    cache, local = rows.caches[rows.source[i]], rows.local[i]
    place = slice(cache.offsets[local], cache.offsets[local + 1])
    messages = slice(cache.turn_offsets[local], cache.turn_offsets[local + 1])
    return cache.tokens[place], cache.learn[place], cache.turns[messages], cache.roles[messages]


def _said(tokenizer, ids) -> str:
    """The text of tokens, without markers, and without a character that is cut at the end."""
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=True).rstrip("\ufffd").strip()


def _thinks(tokenizer, said: list[int], think: int, think_end: int) -> bool:
    """Whether there is a block of thinking with something in it: an empty one teaches to answer at once."""
    if think not in said:
        return False
    block = said[said.index(think) + 1 :]
    return bool(_said(tokenizer, block[: block.index(think_end)] if think_end in block else block))


def _spread(texts: list[str]) -> list[str]:
    """A few of them, none twice, evenly from the first to the last."""
    texts = list(dict.fromkeys(texts))
    return texts[:: max(1, len(texts) // EXAMPLES)][:EXAMPLES]
