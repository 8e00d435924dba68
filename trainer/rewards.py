"""The reward of an answer that can be checked: a function of two texts, without a model.

An answer is well-formed if it is one <think> block, one <answer> block and nothing else: no special token either, such
as the one that begins a turn. It is right if, besides, the answer block holds the known answer. This is stricter than
data.answer_match.is_right, which looks for the answer anywhere in a text. A model learns to satisfy whatever rule
rewards it: with the loose rule it would learn to name many answers.
"""

import re

from data.answer_match import normalise

FORM = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
MARKER = re.compile(r"<\|[^<>|]*\|>|</?s>|<unk>")  # special tokens: ours, and those of MiniMind's earlier vocabularies
TAGS_IN_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


def answer_block(text: str) -> str | None:
    """The content of the answer block of a well-formed text; None where the text is not well-formed."""
    match = FORM.fullmatch(text)
    # FORM alone would let a thought hold tags of its own: "<think>a<think>b</think>..."
    if match is None or TAG.findall(text) != TAGS_IN_ORDER or MARKER.search(text) or not match["answer"].strip():
        return None
    return match["answer"].strip()


def exact_match(text: str, answer: str) -> bool:
    """Whether a well-formed text's answer is the known one."""
    found = answer_block(text)
    return found is not None and _spelled(found) == _spelled(answer)


def _spelled(answer: str) -> str:
    """The answer without blanks that do not matter: "x = 5" -> "x=5" and "1 000" -> "1000", but "1 2" stays "1 2"."""
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", normalise(answer))
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def reward(text: str, answer: str, format_reward: float) -> float:
    """1 for the right answer, plus format_reward for a well-formed text, right or wrong."""
    return exact_match(text, answer) + format_reward * (answer_block(text) is not None)
