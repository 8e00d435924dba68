"""What an answer is worth, where that can be checked: a function of two texts, no model.

An answer is well-formed if it is one <think> block, one <answer> block and nothing else: no special token either, such
as the one that begins a turn. It is right if, besides, what stands in the answer block is the known answer. This is
stricter than data.answer_match.is_right, which looks for the answer anywhere in a text: a model that is rewarded learns
to please the rule, and would learn to name many answers, or to think without end.
"""

import re

from data.answer_match import normalise

FORM = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
MARKER = re.compile(r"<\|[^<>|]*\|>|</?s>|<unk>")  # special tokens: ours, and those of MiniMind's earlier vocabularies
TAGS_IN_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


def answer_block(text: str) -> str | None:
    """What stands in the answer block of a well-formed text, None where the text is not well-formed."""
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
    """One spelling of answers that differ in blanks: "x = 5" is "x=5" and "1 000" is "1000", but "1 2" is not "12"."""
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", normalise(answer))
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def reward(text: str, answer: str, format_reward: float) -> float:
    """1 for the right answer, and format_reward for a well-formed text, whatever it answers."""
    return exact_match(text, answer) + format_reward * (answer_block(text) is not None)
