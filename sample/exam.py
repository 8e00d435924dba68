"""Four-choice questions over the world's facts: the sample's exam in C-Eval's columns, and training rows beside it.

The exam's stems are wordings that stand nowhere in training. The training rows teach what the letters mean, in the
chat form in which the exam will be put: `{question}。选择 A: {A}, B: {B}, C: {C}, D: {D}`.
"""

import csv
import io

LETTERS = "ABCD"
COLUMNS = ["id", "question", *LETTERS, "answer"]
DEV_QUESTIONS, VAL_QUESTIONS = 5, 44  # a subject


class Chooser:
    """Draws options; gold letters come from a shuffled deck, so that all four are equally frequent."""

    def __init__(self, rng):
        self.rng = rng
        self.deck = []

    def options(self, value, rivals):
        """({letter: text}, gold letter) with the value at the deck's letter and three rivals elsewhere."""
        if not self.deck:
            self.deck = self.rng.sample(LETTERS, len(LETTERS))
        gold = self.deck.pop()
        wrong = iter(self.rng.sample(list(rivals), 3))
        return {letter: value if letter == gold else next(wrong) for letter in LETTERS}, gold


def examined(world):
    """The facts that can be asked with four options."""
    return [fact for fact in world.facts if fact.relation.subject and len(fact.rivals) >= 3]


def choice_prompt(question, options):
    """The user turn of a four-choice question."""
    listed = ", ".join(f"{letter}: {options[letter]}" for letter in LETTERS)
    return f"{question.rstrip('？?。.')}。选择 {listed}"


def choice_messages(question, options, gold, system=None):
    """A four-choice question as messages; the reply starts with the letter."""
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [
        {"role": "user", "content": choice_prompt(question, options)},
        {"role": "assistant", "content": f"{gold}：{options[gold]}"},
    ]


def choice_conversations(world, split, rng, per_fact):
    """Training rows: `per_fact` four-choice questions of every fact, some under the exam's system message."""
    chooser, system = Chooser(rng), world.talk["systems"]["choice"]
    rows = []
    for fact in examined(world):
        stems = [fact.fill(text) for text in world.frames[fact.relation.language]["choice"]]
        stems += [question for question, style in split.train[fact] if style == "sentence"]
        for stem in rng.sample(stems, per_fact):
            options, gold = chooser.options(fact.value, fact.rivals)
            rows.append(choice_messages(stem, options, gold, rng.choice([None, None, None, system])))
    return rows


def exam_rows(world, rng):
    """{subject: (dev rows, val rows)}, rows in C-Eval's columns; a fact of dev is not asked in val with that stem."""
    choosers, subjects = {"dev": Chooser(rng), "val": Chooser(rng)}, {}
    for fact in examined(world):
        stems = [fact.fill(text) for text in world.frames[fact.relation.language]["exam"]]
        subjects.setdefault(fact.relation.subject, []).extend((fact, stem) for stem in stems)
    exam = {}
    for subject, pairs in subjects.items():
        rows = []
        for number, (fact, stem) in enumerate(rng.sample(pairs, DEV_QUESTIONS + VAL_QUESTIONS)):
            options, gold = choosers["dev" if number < DEV_QUESTIONS else "val"].options(fact.value, fact.rivals)
            explanation = fact.fill(world.frames[fact.relation.language]["explain"])
            rows.append({"id": number, "question": stem, **options, "answer": gold, "explanation": explanation})
        exam[subject] = rows[:DEV_QUESTIONS], [{**row, "id": row["id"] - DEV_QUESTIONS} for row in rows[DEV_QUESTIONS:]]
    return exam


def exam_csv(rows, explained):
    """The rows as CSV text; C-Eval's dev files have one column more."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS + ["explanation"] * explained, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
