"""The sample's arithmetic: short sums to know by heart, long ones worked digit by digit.

Direct sums (additions and subtractions within 20, products up to 12 x 9) are answered at once. Worked ones (two-digit
additions and subtractions, two digits times one) are written out column by column, as <think> and <answer>, so that a
small model can learn the method: every step is a sum of single digits with its carry. Operand pairs are held out of
both; a step such as 4×6+4=28 is a chain of three operands and no pair.
"""

SIGNS = "+", "-", "×"
WITHHELD_DIRECT = {"+": 16, "-": 20, "×": 6}  # operand pairs kept out of training
WITHHELD_REASON = {"+": 90, "-": 90, "×": 60}
TRAINED_REASON = {"+": 950, "-": 950, "×": 560}


def compute(a, sign, b):
    """The value of a sum."""
    return {"+": a + b, "-": a - b, "×": a * b}[sign]


def same_sum(a, sign, b):
    """One name for a sum and its swapped twin: 3+5 is 5+3, 5-3 is not 3-5."""
    return (sign, a, b) if sign == "-" else (sign, max(a, b), min(a, b))


def direct_sums():
    """All direct sums as (a, sign, b), both orders of the commutative ones."""
    sums = [(a, "+", b) for a in range(1, 20) for b in range(1, 21 - a)]
    sums += [(a, "-", b) for a in range(1, 21) for b in range(1, a + 1)]
    times = [(a, "×", b) for a in range(1, 13) for b in range(1, 10)]
    return sums + times + [(b, "×", a) for a, _, b in times if a > 9]


def worked_sums():
    """All sums that are worked in columns, larger number first where the order matters."""
    two_digits = range(10, 100)
    return (
        [(a, "+", b) for a in two_digits for b in two_digits]
        + [(a, "-", b) for a in two_digits for b in range(10, a + 1)]
        + [(a, "×", b) for a in two_digits for b in range(2, 10)]
    )


def may_be_withheld(a, sign, b):
    """Single-digit sums are the steps of the worked ones and cannot be held out; nor can 10 to 18 minus one digit."""
    if sign == "-":
        return a > 18 or b > 9
    return max(a, b) > 9 and min(a, b) > 1


def withhold(sums, counts, rng, taken=frozenset()):
    """A set of same_sum names to hold out, counts[sign] of each sign, none of `taken`."""
    withheld = set()
    for sign in SIGNS:
        names = sorted({same_sum(*s) for s in sums if s[1] == sign and may_be_withheld(*s)} - taken)
        withheld |= set(rng.sample(names, counts[sign]))
    return withheld


def work_out(a, sign, b):
    """The column method in words, one line a column, then the result."""
    return {"+": add_columns, "-": subtract_columns, "×": multiply_columns}[sign](a, b)


def add_columns(a, b):
    """Two-digit addition, units first, with the carry (进) into the tens."""
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    return (
        f"个位：{a % 10}+{b % 10}={units}，写{units % 10}，进{carry}。\n"
        f"十位：{a // 10}+{b // 10}+{carry}={tens}，写{tens}。\n所以{a}+{b}={a + b}。"
    )


def subtract_columns(a, b):
    """Two-digit subtraction, units first, with the borrow (借) from the tens."""
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    tens = a // 10 - borrow - b // 10
    return (
        f"个位：{top}-{b % 10}={top - b % 10}，写{top - b % 10}，借{borrow}。\n"
        f"十位：{a // 10}-{borrow}-{b // 10}={tens}，写{tens}。\n所以{a}-{b}={a - b}。"
    )


def multiply_columns(a, b):
    """Two digits times one, units first, with the carry (进) into the tens."""
    units = a % 10 * b
    carry = units // 10
    tens = a // 10 * b + carry
    return (
        f"个位：{a % 10}×{b}={units}，写{units % 10}，进{carry}。\n"
        f"十位：{a // 10}×{b}+{carry}={tens}，写{tens}。\n所以{a}×{b}={a * b}。"
    )


def phrase(template, a, sign, b, words):
    """An arithmetic template filled in; `words` are the operators' names."""
    return template.format(a=a, b=b, op=sign, word=words[sign], c=compute(a, sign, b))


def reason_messages(question, a, sign, b):
    """A worked sum as two messages."""
    content = f"<think>\n{work_out(a, sign, b)}\n</think>\n<answer>\n{compute(a, sign, b)}\n</answer>"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": content}]


def heldout_row(question, a, sign, b, relation):
    """A held-out sum as a row to be scored; the rivals are near misses and the results of the other signs."""
    result = compute(a, sign, b)
    near = {result + step for step in (-10, -2, -1, 1, 2, 10)} | {compute(a, other, b) for other in SIGNS}
    rivals = sorted(rival for rival in near - {result, a, b} if rival >= 0)
    return {
        "question": question,
        "answer": str(result),
        "rivals": [str(rival) for rival in rivals],
        "kind": "arithmetic",
        "relation": relation,
        "entity": f"{a}{sign}{b}",
    }


class Arithmetic:
    """The split of all sums: what is trained on and what is held out, direct and worked."""

    def __init__(self, phrasings, rng):
        self.phrasings = phrasings
        direct, worked = direct_sums(), worked_sums()
        self.withheld_direct = withhold(direct, WITHHELD_DIRECT, rng)
        self.withheld_reason = withhold(worked, WITHHELD_REASON, rng, self.withheld_direct)
        withheld = self.withheld_direct | self.withheld_reason
        self.direct = [s for s in direct if same_sum(*s) not in withheld]
        self.worked = [
            s
            for sign in SIGNS
            for s in rng.sample(
                [s for s in worked if s[1] == sign and same_sum(*s) not in withheld], TRAINED_REASON[sign]
            )
        ]

    def ask(self, kind, a, sign, b, rng, count=1):
        """`count` different questions about a sum; kind "direct" or "reason"."""
        templates = self.phrasings[kind] + (self.phrasings["direct_words"] if kind == "direct" else [])
        return [phrase(template, a, sign, b, self.phrasings["words"]) for template in rng.sample(templates, count)]

    def direct_conversations(self, rng, count=2):
        """Short sums as conversations, each sum in `count` phrasings, answered with the whole equation."""
        return [
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{a}{sign}{b}={compute(a, sign, b)}。"},
            ]
            for a, sign, b in self.direct
            for question in self.ask("direct", a, sign, b, rng, count)
        ]

    def reason_conversations(self, rng):
        """Worked sums as conversations."""
        return [reason_messages(question, *s) for s in self.worked for question in self.ask("reason", *s, rng)]

    def texts(self, rng, per_document=8):
        """Short sums as pretraining text, some in words."""
        lines = [phrase(rng.choice(self.phrasings["pretrain"]), *s, self.phrasings["words"]) for s in self.direct]
        rng.shuffle(lines)
        return ["，".join(lines[i : i + per_document]) + "。" for i in range(0, len(lines), per_document)]

    def heldout(self, kind, rng, count):
        """The held-out sums as rows to be scored, each in `count` phrasings."""
        withheld = self.withheld_direct if kind == "direct" else self.withheld_reason
        return [
            heldout_row(question, a, sign, b, f"{kind}_{sign}")
            for sign, a, b in sorted(withheld)
            for question in self.ask(kind, a, sign, b, rng, count)
        ]
