"""Makes the embedded sample: a small world in which knowledge can be tested, in the formats of all stages.

Everything follows from the data in dataset/world and a seed. Each file draws from its own random stream, so a change
to one leaves the others as they are.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

from sample import conversations as talk
from sample.arithmetic import Arithmetic
from sample.exam import choice_conversations, exam_csv, exam_rows
from sample.holdout import HeldOut
from sample.world import load_world

CHOICE_ROWS = 2  # four-choice conversations of a fact
FACTS_PER_TEXT = 5
DPO_PHRASINGS = 3  # preference pairs of a fact in training


def make_sample(out_dir, seed):
    """Write all files of the sample into `out_dir`; returns {"facts": n, relative file name: number of rows}."""

    def rng(name):
        return random.Random(f"{seed}/{name}")  # a string seed is hashed with SHA-512: the same on every machine

    world = load_world()
    split = HeldOut(world, rng("split"))
    sums = Arithmetic(world.arithmetic, rng("sums"))
    subject = HeldOut(replace(world, relations=world.domain), rng("domain split"))
    rows = {
        "pretrain.jsonl": pretrain_rows(world, split, sums, rng("pretrain")),
        "sft.jsonl": sft_rows(world, split, sums, rng("sft")),
        "reason.jsonl": shuffled(wrap(sums.reason_conversations(rng("reason"))), rng("reason order")),
        "reason_heldout.jsonl": sums.heldout("reason", rng("reason heldout"), 1),
        "dpo.jsonl": dpo_rows(world, split.train, DPO_PHRASINGS, rng("dpo")),
        "dpo_heldout.jsonl": dpo_rows(world, split.held, 1, rng("dpo heldout")),
        "lora_identity.jsonl": wrap(talk.identity_rows(world, rng("identity"))),
        "lora_identity_heldout.jsonl": talk.identity_heldout(world.identity),
        "lora_domain.jsonl": shuffled(wrap(talk.domain_rows(subject, rng("domain"))), rng("domain order")),
        "lora_domain_heldout.jsonl": phrasing_rows(subject),
        "heldout.jsonl": heldout_rows(world, split, sums, rng("heldout")),
    }
    texts = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]) for name in rows}
    counts = {"facts": len(world.facts), **{name: len(rows[name]) for name in rows}}
    for subject, parts in exam_rows(world, rng("exam")).items():
        for part, questions in zip(("dev", "val"), parts, strict=True):
            name = f"exam/{part}/{subject}_{part}.csv"
            texts[name], counts[name] = exam_csv(questions, explained=part == "dev"), len(questions)
    for name, text in texts.items():
        path = Path(out_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return counts


def shuffled(rows, rng):
    """A shuffled copy."""
    return rng.sample(rows, len(rows))


def wrap(conversations):
    """Conversations as rows of an SFT file."""
    return [{"conversations": messages} for messages in conversations]


def pretrain_rows(world, split, sums, rng):
    """Each fact in every one of its statements among its neighbours, among strangers, and as question and answer."""
    texts = []
    for relation in world.relations:
        for template in relation.statements:
            texts += paragraphs([fact.fill(template) for fact in shuffled(relation.facts, rng)], relation.language)
    for language in world.frames:
        facts = [fact for fact in world.facts if fact.relation.language == language]
        for _ in range(4):
            texts += paragraphs(
                [fact.fill(rng.choice(fact.relation.statements)) for fact in shuffled(facts, rng)], language
            )
        ask, reply = ("Question: ", " Answer: ") if language == "en" else ("问：", "答：")
        asked = [
            ask + question + reply + fact.answer(style)
            for fact in facts
            for question, style in rng.sample(split.train[fact], 4)
        ]
        texts += paragraphs(shuffled(asked, rng), language)
    texts += sums.texts(rng) + sums.texts(rng)
    return [{"text": text} for text in shuffled(texts, rng)]


def paragraphs(sentences, language):
    """Sentences joined into texts of FACTS_PER_TEXT; English with spaces."""
    return [
        (" " if language == "en" else "").join(sentences[i : i + FACTS_PER_TEXT])
        for i in range(0, len(sentences), FACTS_PER_TEXT)
    ]


def sft_rows(world, split, sums, rng):
    """All conversations of the SFT file in one shuffled list."""
    conversations = talk.single_turns(split, rng) + talk.with_system(world, split, rng)
    conversations += talk.amid_chatter(world, split, rng)
    conversations += talk.follow_ups(world, split, rng) + talk.small_talk(world, split, rng)
    conversations += choice_conversations(world, split, rng, CHOICE_ROWS)
    conversations += sums.direct_conversations(rng)
    return wrap(shuffled(conversations, rng))


def dpo_rows(world, pairs, per_fact, rng):
    """Preference pairs for `per_fact` phrasings of each fact, from the training or the held-out side of the split."""
    questions = [
        (fact, question)
        for fact in world.facts
        for question, _ in rng.sample(pairs[fact], min(per_fact, len(pairs[fact])))
    ]
    return talk.preference_pairs(world, shuffled(questions, rng), rng)


def heldout_rows(world, split, sums, rng):
    """Held-out questions of three kinds, each row with the values that a right answer must not contain."""
    unseen = [heldout_row(fact, fact.fill(rng.choice(fact.relation.unseen)), "unseen_template") for fact in world.facts]
    return phrasing_rows(split) + unseen + sums.heldout("direct", rng, 2)


def phrasing_rows(split):
    """The pairs of fact and phrasing that are held out."""
    return [heldout_row(fact, question, "fact_phrasing") for fact, pairs in split.held.items() for question, _ in pairs]


def heldout_row(fact, question, kind):
    """One held-out question."""
    return {
        "question": question,
        "answer": fact.value,
        "rivals": list(fact.rivals),
        "kind": kind,
        "relation": fact.relation.name,
        "entity": fact.entity,
    }
