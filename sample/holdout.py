"""What is held out of the embedded sample: pairs of fact and phrasing that no training file may contain.

A fact is asked in some eighteen wordings. Two of them are held out for this fact and trained on for its neighbours,
so a model that answers them has learned the fact, not the words. A wording can be held out only if it is new to the
model: it must not be a part of another question, nor a near copy of one (character 3-grams, Jaccard 0.8).
"""

from collections import Counter

NEAR_COPY = 0.8  # Jaccard similarity of character 3-gram sets from which two questions count as the same


def trigrams(text):
    """The set of character 3-grams of a text (the text itself if it is shorter)."""
    return {text[i : i + 3] for i in range(len(text) - 2)} or {text}


def jaccard(one, other):
    """Size of the intersection over the size of the union of the two texts' 3-gram sets, 0 to 1."""
    one, other = trigrams(one), trigrams(other)
    return len(one & other) / len(one | other)


class HeldOut:
    """Splits the phrasings of every fact: `train[fact]` and `held[fact]` are lists of (question, style)."""

    def __init__(self, world, rng, per_fact=2):
        asked = {fact: [(fact.fill(p.text), p.style) for p in fact.relation.phrasings] for fact in world.facts}
        stems = {
            fact: [fact.fill(text) for text in world.frames[fact.relation.language]["choice"]] for fact in world.facts
        }
        everything = "\n".join(
            [question for pairs in asked.values() for question, _ in pairs]
            + [stem for texts in stems.values() for stem in texts]
        )
        users = Counter(phrasing.text for fact in world.facts for phrasing in fact.relation.phrasings)
        self.train, self.held = {}, {}
        for fact, pairs in asked.items():
            shared = [
                pair for pair, phrasing in zip(pairs, fact.relation.phrasings, strict=True) if users[phrasing.text] > 2
            ]  # else no other fact might be left that trains on it
            self.held[fact] = choose(rng.sample(shared, len(shared)), pairs, stems[fact], everything, per_fact)
            self.train[fact] = [pair for pair in pairs if pair not in self.held[fact]]
        check_rotation(world, self.train)


def choose(candidates, pairs, stems, everything, count):
    """The first `count` candidates (question, style) that stay new when the fact's other pairs are trained on."""
    held = []
    for candidate in candidates:
        question = candidate[0]
        others = [text for text, _ in pairs if text != question] + stems
        new = everything.count(question) == 1 and all(jaccard(question, text) < NEAR_COPY for text in others)
        if new and len(held) < count:
            held.append(candidate)
    return held


def check_rotation(world, train):
    """A held-out phrasing must be trained on with some other fact, or it would be an unseen template."""
    used = {
        phrasing.text
        for fact in world.facts
        for phrasing in fact.relation.phrasings
        if fact.fill(phrasing.text) in {question for question, _ in train[fact]}
    }
    for relation in world.relations:
        for phrasing in relation.phrasings:
            if phrasing.text not in used:
                raise ValueError(f"{relation.name}: {phrasing.text!r} is held out for every fact; use another seed")
