"""What an answer is worth, where that can be checked: a function of two texts, no model.

An answer is well-formed if it is one <think> block, one <answer> block and nothing else: no special token either, such
as the one that begins a turn. It is right if, besides, what stands in the answer block is the known answer.
"""

import re
import unicodedata

FORM = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
# Full-width characters in their plain form, and the minus sign as what is typed for it. Not NFKC: it makes 102 of 10².
PLAIN = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {ord("\N{MINUS SIGN}"): "-"}
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MARKER = re.compile(r"<\|[^<>|]*\|>|</?s>|<unk>")  # special tokens: ours, and those of MiniMind's earlier vocabularies
TAGS_IN_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


def generated_text(tokenizer, completion) -> str:
    """All that the engine's completion says, special tokens spelled out, up to the token that ended it."""
    ended = completion.finish_reason == "stop"
    ids = completion.token_ids[:-1] if ended else completion.token_ids
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def final_answer(text: str) -> str | None:
    """What stands in the answer block of a well-formed text, None where the text is not well-formed."""
    match = FORM.fullmatch(text)
    if match is None or TAG.findall(text) != TAGS_IN_ORDER or MARKER.search(text) or not match["answer"].strip():
        return None
    return match["answer"].strip()


def known_answer(text: str) -> str | None:
    """The last answer block of a text that need not be well-formed otherwise: that of a worked example."""
    found = ANSWER.findall(text)
    return found[-1].strip() or None if found else None


def normalise(answer: str) -> str:
    """Answers that differ in this form only are the same: full-width characters and the minus sign, capitals, blanks
    (but 1 2 is not 12), 1,000 or 1 000 and 1000."""
    text = " ".join(unicodedata.normalize("NFC", answer).translate(PLAIN).lower().split())
    text = re.sub(r"(?<=\d)[, ](?=\d{3}(?!\d))", "", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def is_right(text: str, answer: str) -> bool:
    """Whether a well-formed text's answer is the known one."""
    found = final_answer(text)
    return found is not None and normalise(found) == normalise(answer)


def reward(text: str, answer: str, format_reward: float) -> float:
    """1 for the right answer, and format_reward for a well-formed text, whatever it answers."""
    return is_right(text, answer) + format_reward * (final_answer(text) is not None)
