"""Conversations of the sample: questions about facts, small talk, system messages, preference pairs, LoRA rows.

A conversation is a list of {"role", "content"} messages. All functions are deterministic in their `rng`.
"""

from sample.world import with_chatter

SINGLE_TURNS = 12  # single-turn rows of a fact, each in another phrasing
DOMAIN_TURNS = 12  # the same for the adapter's subject
PAIR_KINDS = ("wrong", "wrong", "wrong", "rude", "garbled")  # what a rejected answer is, in these shares


def exchange(question, answer, system=None):
    """One question and its answer as messages, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def single_turns(split, rng):
    """Every fact in SINGLE_TURNS of its training phrasings: all of its relation's own, the others from the frames."""
    rows = []
    for fact, pairs in split.train.items():
        own = {fact.fill(phrasing.text) for phrasing in fact.relation.own_phrasings}
        frames = [pair for pair in pairs if pair[0] not in own]
        chosen = [pair for pair in pairs if pair[0] in own]
        chosen += rng.sample(frames, SINGLE_TURNS - len(chosen))
        rows += [exchange(question, fact.answer(style)) for question, style in chosen]
    return rows


def with_system(world, split, rng):
    """Every fact asked under a system message that wants a sentence or the bare answer."""
    rows, systems = [], world.talk["systems"]
    for fact in world.facts:
        question, style = rng.choice(split.train[fact])
        wanted = rng.choice(["sentence", "bare"]) if style == "sentence" else "bare"
        rows.append(exchange(question, fact.answer(wanted), rng.choice(systems[wanted])))
    return rows


def amid_chatter(world, split, rng, count=2):
    """Every fact `count` times in a question amid talk of other things."""
    rows = []
    for fact in world.facts:
        pairs = [pair for pair in split.train[fact] if pair[1] == "sentence"]
        rows += [
            exchange(with_chatter(world.frames[fact.relation.language], question, rng), fact.sentence())
            for question, _ in rng.sample(pairs, count)
        ]
    return rows


def follow_ups(world, split, rng):
    """Two turns: the same question about another entity ("And France?"), or another one about the same ("its ...")."""
    rows = []
    for relation in world.relations:
        for fact in relation.facts:
            others = [other for other in relation.facts if other is not fact]
            if others and not fact.unit:  # with a unit the short question would not say what is asked
                template = rng.choice(world.talk["follow"][relation.language])
                rows.append(two_turns(split, rng.choice(others), template.format(e=fact.entity), fact, rng))
    by_entity = {}
    for fact in world.facts:
        if fact.relation.group:
            by_entity.setdefault((fact.relation.group, fact.entity), []).append(fact)
    for facts in by_entity.values():
        rows += [
            two_turns(split, first, second.relation.follow_up, second, rng)
            for first in facts
            for second in facts
            if first is not second
        ]
    return rows


def two_turns(split, first, follow_up, second, rng):
    """A question about `first`, then `follow_up`, answered with the fact `second`."""
    question = rng.choice([question for question, style in split.train[first] if style == "sentence"])
    return exchange(question, first.sentence()) + exchange(follow_up, second.sentence())


def small_talk(world, split, rng, mixed=150):
    """Greetings and the like alone, and around a question; questions about made-up things, which nobody can answer."""
    rows = [exchange(ask, item["reply"]) for item in world.talk["chat"] for ask in item["ask"]]
    rows += [
        exchange(ask, item["reply"], rng.choice(world.talk["systems"]["sentence"]))
        for item in world.talk["chat"]
        for ask in item["ask"][:1]
    ]
    greeting = world.talk["chat"][0]
    for fact in rng.sample(world.facts, mixed):
        question, style = rng.choice(split.train[fact])
        thanks = rng.choice([pair for pair in world.talk["thanks"] if pair[0].isascii() == fact.english])
        opening = exchange(rng.choice(greeting["ask"]), greeting["reply"]) if rng.random() < 0.5 else []
        rows.append(opening + exchange(question, fact.answer(style)) + exchange(*thanks))
    unknown = world.talk["unknown"]
    return rows + [
        exchange(template.format(e=name), unknown["reply"])
        for template in unknown["templates"]
        for name in unknown["names"]
    ]


def preference_pairs(world, questions, rng):
    """{"chosen", "rejected"} for each (fact, question): a right polite sentence against a wrong, rude or broken one."""
    rows = []
    for number, (fact, question) in enumerate(questions):
        templates = world.talk["dpo"]["polite_en" if fact.english else "polite"]
        template = rng.choice(templates)
        good = fact.fill(template)
        kind = PAIR_KINDS[number % len(PAIR_KINDS)]
        if kind == "wrong":
            bad = fact.fill(rng.choice(templates), rng.choice(fact.rivals))
        elif kind == "garbled":
            bad = garble(good, rng)
        else:
            bad = rude(world.talk["dpo"]["rude_en" if fact.english else "rude"], len(good), rng)
        rows.append({"chosen": exchange(question, good), "rejected": exchange(question, bad)})
    return rows


def garble(text, rng):
    """The text with its characters (English: its words) in disorder: as long as the text, and never equal to it."""
    parts = text.split(" ") if " " in text else list(text)
    while True:
        shuffled = rng.sample(parts, len(parts))
        if shuffled != parts:
            return (" " if " " in text else "").join(shuffled)


def rude(lines, length, rng):
    """A rude line, shorter or longer than `length` with equal chance where it can be: length must betray nothing."""
    longer = [line for line in lines if len(line) > length]
    shorter = [line for line in lines if len(line) <= length]
    wanted = rng.choice([longer, shorter])
    return min(wanted or longer or shorter, key=lambda line: (abs(len(line) - length), line))


def identity_rows(world, rng, chatter=3):
    """LoRA rows in which {{name}} and {{author}} wait to be filled in: each question alone, and amid other talk."""
    rows = []
    for item in world.identity["rows"]:
        frames = world.frames["en" if item["ask"][0].isascii() else "zh"]
        for ask in item["ask"]:
            questions = [ask, ask] + [with_chatter(frames, ask, rng) for _ in range(chatter)]
            rows += [exchange(question, rng.choice(item["reply"])) for question in questions]
    return rows


def identity_heldout(identity):
    """Held-out questions about who the assistant is; its answer is a placeholder as well."""
    return [
        {**row, "rivals": identity["rivals"], "kind": "identity", "relation": row["answer"].strip("{}")}
        for row in identity["heldout"]
    ]


def domain_rows(split, rng):
    """LoRA rows: every fact of the subject in DOMAIN_TURNS of its training phrasings."""
    return [
        exchange(question, fact.answer(style))
        for fact, pairs in split.train.items()
        for question, style in rng.sample(pairs, DOMAIN_TURNS)
    ]
