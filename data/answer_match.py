"""Is a generated text right? A rule by string matching, for questions with one short gold answer.

Right means: the gold answer stands in the text, and no rival does. A rival is another value of the same kind (another
capital where a capital was asked), so a text that names three cities to be safe is wrong. How a value must stand in
the text depends on its script:

- digits as whole numbers: 12 is found neither in 312 nor in 12.5, -12, 12² or 12/5, and -5 not in 10-5; 1,000 reads
  as 1000;
- Latin words as whole words, upper and lower case alike: "cat" is not found in "concatenate";
- Chinese as a substring, since Chinese has no spaces between words.
"""

import re
import unicodedata

# Not NFKC, which makes 102 of 10².
PLAIN = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {ord("\N{MINUS SIGN}"): "-"}
REFUSALS = "我不知道", "I do not know"  # how the models of the sample say so
ANSWER_BLOCK = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


def final_answer(text):
    """The part of a generated text that counts as its answer.

    A reasoning model writes its thinking first. Then only the text in <answer>...</answer> counts (the last such
    block), or, without one, the text after </think>. If the thinking never ends there is no answer: "". Other texts are
    returned whole.
    """
    blocks = ANSWER_BLOCK.findall(text)
    if blocks:
        return blocks[-1]
    if "</think>" in text:
        return text.rsplit("</think>", 1)[1]
    return "" if "<think>" in text else text


def normalise(text):
    """Full-width characters and the minus sign to plain ones, no thousands commas, lower case, single spaces."""
    text = unicodedata.normalize("NFC", text).translate(PLAIN)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", " ", text).strip().lower()


def value_pattern(value):
    """A compiled pattern that finds `value` (normalised) in a normalised text, by the rules at the top."""
    # Guards stand only at those ends of the value that are digits or Latin letters: "5月1日" must not follow a digit.
    before = after = ""
    if re.match(r"\d", value):
        before = r"(?<!\d)(?<!\d[./])(?<!(?<![\d)a-z])-)"  # the last one: a minus sign that subtracts nothing
    elif re.match(r"-\d", value):
        before = r"(?<![\d)a-z])"  # there it would be one that subtracts
    elif re.match(r"[a-z]", value):
        before = r"(?<![a-z\d])"
    if re.search(r"\d$", value):
        after = r"(?!\d)(?![./]\d)(?![⁰¹²³⁴-⁹^])"
    elif re.search(r"[a-z]$", value):
        after = r"(?![a-z\d])"
    if re.search(r"[a-z]", value):  # h2o: a formula is one word, digits and letters together
        before, after = before and r"(?<![a-z\d])", after and r"(?![a-z\d])"
    return re.compile(before + re.escape(value) + after)


def is_right(text, answer, rivals=()):
    """True if `answer` stands in `text` and none of `rivals` does.

    text: what the model generated, markers of the chat template removed.
    answer: the gold value. rivals: values that must not appear; one equal to the answer is ignored, and one that is
    part of the answer ("English" beside "English breakfast") counts only where it stands on its own.
    """
    text, answer = normalise(final_answer(text)), normalise(answer)
    if not answer:
        raise ValueError("the gold answer is empty: nothing can be scored against it")
    without_answer, found = value_pattern(answer).subn("\n", text)  # \n: what stood left and right stays apart
    if not found:
        return False
    for rival in {normalise(rival) for rival in rivals} - {answer, ""}:
        pattern = value_pattern(rival)
        if pattern.search(without_answer if pattern.search(answer) else text):
            return False
    return True


def is_refusal(text):
    """True if a generated text says that it does not know."""
    return any(refusal in text for refusal in REFUSALS)
