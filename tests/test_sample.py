"""The embedded sample: made again byte for byte, nothing held out stands in training, every row in its format."""

import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from data.answer_match import final_answer, is_right
from sample.arithmetic import work_out
from sample.make_sample import make_sample
from sample.world import load_world

SAMPLE = Path(__file__).resolve().parent.parent / "dataset" / "sample"
TRAINING = "pretrain", "sft", "dpo", "reason", "lora_identity", "lora_domain"
HELD_OUT = "heldout", "reason_heldout", "lora_identity_heldout", "lora_domain_heldout"


def read(name):
    text = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def exam(part):
    rows = []
    for path in sorted((SAMPLE / "exam" / part).glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += [{"subject": path.stem, **row} for row in csv.DictReader(file)]
    return rows


def messages(row):
    return row["conversations"] if "conversations" in row else row["chosen"] + row["rejected"]


def stem(question):
    """A four-choice question without its options."""
    return question.split("。选择 A:")[0]


def grams(text):
    return {text[i : i + 3] for i in range(len(text) - 2)} or {text}


class Nearest:
    """The greatest Jaccard similarity of 3-gram sets between a text and any of many, by an inverted index."""

    def __init__(self, texts):
        self.sets = [grams(text) for text in set(texts)]
        self.where = defaultdict(list)
        for number, found in enumerate(self.sets):
            for gram in found:
                self.where[gram].append(number)

    def similarity(self, text):
        mine = grams(text)
        shared = Counter(number for gram in mine for number in self.where.get(gram, ()))
        return max((n / (len(mine) + len(self.sets[i]) - n) for i, n in shared.items()), default=0)


def named(entity):
    """A pattern for the entity in a question: English ones as whole words ("go" is not named by "forgot")."""
    return re.compile(rf"\b{re.escape(entity)}\b" if entity.isascii() else re.escape(entity))


def value_of(chain):
    """The value of a chain such as 4×6+4 or 7-1-2: products first, then from left to right."""
    terms = re.findall(r"([+-]?)(\d+)(?:×(\d+))?", chain)
    return sum((-1 if sign == "-" else 1) * int(a) * int(b or 1) for sign, a, b in terms)


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def training():
    """{file: rows} of everything a model may be trained on."""
    return {name: read(name) for name in TRAINING}


@pytest.fixture(scope="module")
def questions(training):
    """All distinct user turns of all training files, and the questions in pretraining text."""
    found = {
        stem(m["content"])
        for name in TRAINING[1:]
        for row in training[name]
        for m in messages(row)
        if m["role"] == "user"
    }
    for row in training["pretrain"]:
        found.update(re.findall(r"问：(.+?)答：", row["text"]))
        found.update(re.findall(r"Question: (.+?) Answer: ", row["text"]))
    return found


def test_the_same_seed_gives_the_committed_bytes(tmp_path):
    make_sample(tmp_path, 42)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    committed = {path.relative_to(SAMPLE): path.read_bytes() for path in SAMPLE.rglob("*.*")}
    assert made.keys() == committed.keys()
    assert all(made[name] == committed[name] for name in made)


def test_another_seed_splits_otherwise_and_is_sound(tmp_path):
    make_sample(tmp_path, 7)
    assert (tmp_path / "heldout.jsonl").read_bytes() != (SAMPLE / "heldout.jsonl").read_bytes()


def test_every_fact_stands_in_twelve_training_phrasings(world, training):
    asked = defaultdict(set)
    for row in training["sft"]:
        turns = row["conversations"]
        if len(turns) == 2:
            asked[turns[0]["content"]].add(turns[1]["content"])
    assert len(world.facts) >= 300 and sum(fact.english for fact in world.facts) >= 60
    for fact in world.facts:
        wordings = {fact.fill(p.text) for p in fact.relation.phrasings}
        told = [q for q in wordings if any(is_right(a, fact.value, fact.rivals) for a in asked[q])]
        assert len(told) >= 12, fact.key


def test_no_held_out_question_stands_in_training(training):
    text = "\n".join(m["content"] for name in TRAINING[1:] for row in training[name] for m in messages(row))
    text += "\n".join(row["text"] for row in training["pretrain"])
    held = [row["question"] for name in HELD_OUT for row in read(name)]
    held += [row["chosen"][0]["content"] for row in read("dpo_heldout")]
    held += [row["question"] for part in ("dev", "val") for row in exam(part)]
    assert len(held) > 2000
    assert [question for question in held if question in text] == []


@pytest.mark.parametrize(("name", "at_least"), [("heldout", 500), ("lora_domain_heldout", 100)])
def test_held_out_pairs_are_no_near_copies_of_the_same_facts_questions(questions, name, at_least):
    """Compared with all training questions that name the entity, a superset of the fact's own."""
    rows = [row for row in read(name) if row["kind"] == "fact_phrasing"]
    assert len(rows) >= at_least
    by_entity = {
        entity: Nearest(q for q in questions if named(entity).search(q)) for entity in {row["entity"] for row in rows}
    }
    for row in rows:
        assert by_entity[row["entity"]].similarity(row["question"]) < 0.8, row["question"]


def test_unseen_templates_are_near_no_training_question_with_the_entity_masked(world, questions):
    entities = sorted({fact.entity for fact in world.facts}, key=len, reverse=True)
    mask = re.compile("|".join(named(entity).pattern for entity in entities))
    trained = Nearest(mask.sub("□", question) for question in questions)
    rows = [row for row in read("heldout") if row["kind"] == "unseen_template"]
    assert {(row["relation"], row["entity"]) for row in rows} == {fact.key for fact in world.facts}
    for masked in {mask.sub("□", row["question"]) for row in rows}:
        assert trained.similarity(masked) < 0.8, masked


def test_no_exam_stem_is_near_a_training_question(questions):
    trained = Nearest(questions)
    for row in exam("dev") + exam("val"):
        assert trained.similarity(row["question"]) < 0.8, row["question"]


def operand_pairs(text):
    """{(sign, operands)} of all sums of exactly two numbers in a text; longer chains (4×6+4) are steps, not pairs."""
    signs = {"加": "+", "减": "-", "乘": "×"}
    text = re.sub("[加减乘]", lambda match: signs[match.group()], text)
    for chain in re.findall(r"\d+(?:[+\-×]\d+)+", text):
        parts = re.split(r"([+\-×])", chain)
        if len(parts) == 3:
            a, sign, b = int(parts[0]), parts[1], int(parts[2])
            yield (sign, a, b) if sign == "-" else (sign, max(a, b), min(a, b))


def test_no_held_out_operand_pair_stands_in_training_in_either_order(training):
    trained = {
        pair
        for name in TRAINING
        for row in training[name]
        for pair in operand_pairs(json.dumps(row, ensure_ascii=False))
    }
    rows = [row for row in read("heldout") if row["kind"] == "arithmetic"] + read("reason_heldout")
    assert len(rows) >= 200 + 80
    for row in rows:
        pairs = set(operand_pairs(row["question"]))
        assert len(pairs) == 1 and not pairs & trained, row["question"]
    assert {("+", 9, 8), ("-", 17, 8), ("×", 9, 7)} <= trained


def test_gold_answers_are_right_and_rivals_wrong(world):
    for row in read("heldout") + read("reason_heldout") + read("lora_domain_heldout"):
        assert row["rivals"] and is_right(row["answer"], row["answer"], row["rivals"])
        assert not any(is_right(rival, row["answer"], row["rivals"]) for rival in row["rivals"])
    for fact in world.facts:
        assert all(is_right(fact.answer(style), fact.value, fact.rivals) for style in ("sentence", "bare"))


def test_sft_conversations_alternate_and_end_with_the_assistant(training):
    files = "sft", "reason", "lora_identity", "lora_domain"
    for turns in (row["conversations"] for name in files for row in training[name]):
        roles = [m["role"] for m in turns if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(m["role"] != "system" for m in turns[1:]) and all(m["content"] for m in turns)
    sft = [row["conversations"] for row in training["sft"]]
    assert sum(turns[0]["role"] == "system" for turns in sft) >= 300
    assert sum(sum(m["role"] == "user" for m in turns) > 1 for turns in sft) >= 300


def test_worked_sums_are_true_in_every_step(training):
    assert work_out(47, "+", 38) == "个位：7+8=15，写5，进1。\n十位：4+3+1=8，写8。\n所以47+38=85。"
    assert work_out(52, "-", 38) == "个位：12-8=4，写4，借1。\n十位：5-1-3=1，写1。\n所以52-38=14。"
    assert work_out(47, "×", 6) == "个位：7×6=42，写2，进4。\n十位：4×6+4=28，写28。\n所以47×6=282。"
    for row in training["reason"]:
        reply = row["conversations"][1]["content"]
        assert re.fullmatch(r"<think>\n.+\n</think>\n<answer>\n\d+\n</answer>", reply, re.DOTALL)
        sums = re.findall(r"([\d+×-]+)=(\d+)", reply)
        assert len(sums) == 3 and all(value_of(left) == int(right) for left, right in sums)
        assert sums[-1][1] == final_answer(reply).strip()
    assert len(training["reason"]) >= 2000


def test_preference_pairs_share_the_prompt_and_betray_nothing_by_length(training):
    held = read("dpo_heldout")
    assert len(training["dpo"]) >= 1500 and len(held) >= 500
    for rows in (training["dpo"], held):
        assert all(row["chosen"][:-1] == row["rejected"][:-1] for row in rows)
        gaps = [len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"]) for row in rows]
        longer, shorter = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        assert abs(sum(gaps)) / len(gaps) < 1 and 0.42 < longer / (longer + shorter) < 0.58
        assert all(row["chosen"][-1]["content"] != row["rejected"][-1]["content"] for row in rows)
    sft = {m["content"] for row in training["sft"] for m in row["conversations"]}
    prompts = {row["chosen"][0]["content"] for row in training["dpo"]} | sft
    assert not any(row["chosen"][0]["content"] in prompts for row in held)


def test_identity_rows_keep_their_placeholders_and_held_out_questions_are_new(training):
    rows, held = training["lora_identity"], read("lora_identity_heldout")
    assert len(rows) >= 60 and len(held) == 20
    assert all(
        "{{name}}" in r["conversations"][1]["content"] or "{{author}}" in r["conversations"][1]["content"] for r in rows
    )
    assert Counter(r["conversations"][0]["content"].isascii() for r in rows)[True] >= 20
    asked = Nearest(r["conversations"][0]["content"] for r in rows)
    for row in held:
        assert row["answer"] in ("{{name}}", "{{author}}")
        assert asked.similarity(row["question"]) < 0.8, row["question"]


def test_the_adapters_subject_is_new_and_told_in_characters_the_base_model_has_read(world, training):
    """An adapter moves no embedding: it cannot teach a character that the vocabulary spells in untrained bytes."""
    assert len(training["lora_domain"]) >= 500
    read_before = Counter("".join(row["text"] for row in training["pretrain"]))
    told = {c for row in training["lora_domain"] for m in row["conversations"] for c in m["content"]}
    assert not [c for c in told if read_before[c] < 5]
    known = {fact.sentence() for fact in world.facts}
    taught = {fact.sentence() for relation in world.domain for fact in relation.facts}
    assert len(taught) == 50 and not taught & known


def test_exam_is_balanced_and_its_answers_are_true(world):
    dev, val = exam("dev"), exam("val")
    sizes = Counter(row["subject"] for row in val)
    assert len(sizes) >= 5 and min(sizes.values()) >= 40 and len(val) >= 240
    assert set(Counter(row["subject"] for row in dev).values()) == {5}
    assert all(row["explanation"] for row in dev) and all("explanation" not in row for row in val)
    for rows in (dev, val):
        letters = Counter(row["answer"] for row in rows)
        assert set(letters) == set("ABCD") and max(letters.values()) - min(letters.values()) <= 4
    asked = {
        (fact.fill(text), fact.value) for fact in world.facts for text in world.frames[fact.relation.language]["exam"]
    }
    for row in dev + val:
        assert len({row[letter] for letter in "ABCD"}) == 4
        assert (row["question"], row[row["answer"]]) in asked


@pytest.mark.parametrize(
    ("text", "answer", "rivals", "right"),
    [
        ("法国的首都是巴黎。", "巴黎", ["伦敦"], True),
        ("不是伦敦，是巴黎。", "巴黎", ["伦敦"], False),
        ("312", "12", [], False),
        ("12.5", "12", [], False),
        ("-12", "12", [], False),
        ("13-12=1", "12", [], True),
        ("一千米等于1,000米。", "1000", ["100", "10"], True),
        ("１２个月", "12", ["1", "2"], True),
        ("是10²。", "102", [], False),
        ("是−5。", "-5", ["5"], True),
        ("是−5。", "5", [], False),
        ("10-5=5", "-5", [], False),
        ("3-8=-5", "-5", [], True),
        ("10²=100", "10", [], False),
        ("10^2", "10", [], False),
        ("1/2", "1", [], False),
        ("1/2", "2", [], False),
        ("3/4和1/2。", "1/2", [], True),
        ("12km", "12", [], True),
        ("11月1日", "1月1日", [], False),
        ("concatenate", "cat", [], False),
        ("A Cat.", "cat", ["dog"], True),
        ("一氧化碳是CO。", "CO", ["CO2"], True),
        ("CO2", "CO", [], False),
        ("是诺贝尔", "贝尔", ["诺贝尔"], False),
        ("English breakfast", "English breakfast", ["English"], True),
        ("<think>\n是伦敦吗\n</think>\n<answer>\n巴黎\n</answer>", "巴黎", ["伦敦"], True),
        ("<think>\n巴黎", "巴黎", [], False),
        ("", "巴黎", [], False),
    ],
)
def test_the_rule_of_scoring(text, answer, rivals, right):
    assert is_right(text, answer, rivals) is right
