"""Thinking in training data: <think>...</think> before an answer, in its text or under reasoning_content."""

import hashlib
import json
import re

BLOCK = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
EMPTY = "<think>\n\n</think>\n\n"  # how a model is told not to think: see model.tokenizer.render
REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def keep_thinking(messages: list[dict], share: float) -> list[dict]:
    """The messages; a share of 1 - `share` of all conversations gets empty think blocks in place of full ones.

    The conversation's hash decides, so it is the same in every epoch and every run.
    """
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
    place = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"think").digest(), "little") / 2**64
    if place < share:
        return messages
    return [without_thinking(m) if m["role"] == "assistant" else m for m in messages]


def without_thinking(message: dict) -> dict:
    """An assistant message with its think block emptied; one without such a block stays as it is."""
    if message.get("reasoning_content") is not None:
        return message | {"reasoning_content": ""}
    return message | {"content": BLOCK.sub(EMPTY, message["content"], count=1)}
