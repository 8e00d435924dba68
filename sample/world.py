"""The small world of the embedded sample: facts, and the wordings in which they are told and asked.

The facts are data (dataset/world/*.json, written for this project); this file reads them and turns a fact and a
template into a sentence. A relation is a kind of fact ("the capital of a country"), an entity is what it is about
("France"), its value is the answer ("Paris"). Templates have these fields:

    {e} entity   {v} value   {u} unit or verb of the fact, where it has one
    {N} the relation's noun phrase ("the capital of France")   {K} its question without the mark
    {S} its sentence without the full stop ("the capital of France is Paris")
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from data.answer_match import is_right, normalise, value_pattern

WORLD_DIR = Path(__file__).resolve().parent.parent / "dataset" / "world"


@dataclass(frozen=True)
class Phrasing:
    """One way to ask: a template, and whether the answer to it is a sentence or the bare value."""

    text: str
    style: str = "sentence"


@dataclass
class Relation:
    """A kind of fact with its own wordings and the general ones of its language."""

    name: str
    language: str
    noun: str
    ask: str
    state: str
    subject: str | None  # the exam's subject; None: not examined
    group: str | None  # relations of one group share entities
    follow_up: str | None  # a question that names the entity by a pronoun
    frames: list  # Phrasing: the general ways to ask of its language
    own_phrasings: list  # Phrasing: ways to ask that fit this relation only
    unseen: list  # templates that are used for no fact in training
    statements: list  # templates of the pretraining text
    facts: list = field(default_factory=list)

    @property
    def phrasings(self):
        """All ways to ask that are trained on, but for the pairs of fact and phrasing that are held out."""
        return self.frames + self.own_phrasings


@dataclass(frozen=True)
class Fact:
    """One fact; `rivals` are the other values of its relation."""

    relation: Relation
    entity: str
    value: str
    unit: str
    rivals: tuple

    def __hash__(self):
        return hash(self.key)

    @property
    def key(self):
        """(relation name, entity): what tells this fact from all others."""
        return self.relation.name, self.entity

    @property
    def english(self):
        """True if the fact is told in English."""
        return self.relation.language == "en"

    def fill(self, template, value=None):
        """The template with this fact's words in place; `value` replaces the true value (for wrong answers)."""
        words = {"e": self.entity, "v": self.value if value is None else value, "u": self.unit}
        relation = self.relation
        phrases = {
            key: getattr(relation, name).format(**words) for key, name in (("N", "noun"), ("K", "ask"), ("S", "state"))
        }
        text = template.format(**words, **phrases)
        return text[0].upper() + text[1:] if self.english and not template.startswith(("{v}", "{e}")) else text

    def sentence(self, value=None):
        """The fact as a full sentence with its full stop."""
        return self.fill("{S}." if self.english else "{S}。", value)

    def answer(self, style="sentence", value=None):
        """The reply to a question: a sentence, or the bare value with its full stop."""
        if style == "sentence":
            return self.sentence(value)
        return self.fill("{v}." if self.english else "{v}。", value)


@dataclass
class SampleWorld:
    """Everything the generator says: relations, frames (wordings of a language), and the other data files.

    `domain` holds the relations of a subject that only an adapter is taught.
    """

    relations: list
    frames: dict
    talk: dict
    identity: dict
    domain: list
    arithmetic: dict

    @property
    def facts(self):
        """All facts in the order of the data files."""
        return [fact for relation in self.relations for fact in relation.facts]


def with_chatter(frames, question, rng):
    """The question with a sentence before or after it that has nothing to do with it, as people talk.

    So the model learns to find the question in what is said, which helps with wordings it has never seen.
    """
    place = rng.choice(["before", "after", "both"])
    if place != "after":
        question = rng.choice(frames["before"]) + question
    if place != "before":
        question += rng.choice(frames["after"])
    return question


def load_world(folder=WORLD_DIR):
    """Read the data files of `folder` into a SampleWorld, checked: ValueError names the fact that cannot be scored."""
    data = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}
    frames = data["frames"]
    relations = [
        build_relation(row, language, frames[language])
        for language in ("zh", "en")
        for row in data[f"relations_{language}"]
    ]
    domain = [build_relation(row, "zh", frames["zh"]) for row in data["domain"]]
    world = SampleWorld(relations, frames, data["talk"], data["identity"], domain, data["arithmetic"])
    for relation in relations + domain:
        check_relation(relation)
    return world


def build_relation(row, language, frames):
    """One relation from its JSON row; the general frames of its language come first."""
    statements = [text + ("." if language == "en" else "。") for text in row["statements"]]
    if "subject" in row:  # "the book says that my name is ..." would be odd: facts of the assistant go without frames
        statements = frames["statements"] + statements
    relation = Relation(
        name=row["relation"],
        language=language,
        noun=row["noun"],
        ask=row["ask"],
        state=row["state"],
        subject=row.get("subject"),
        group=row.get("group"),
        follow_up=row.get("follow_up"),
        frames=[Phrasing(**frame) for frame in frames["train"]],
        own_phrasings=[Phrasing(text) for text in row["questions"]],
        unseen=frames["unseen"] + row["unseen"],
        statements=statements + frames["dialogue"],
    )
    values = list(dict.fromkeys(fact[1] for fact in row["facts"]))
    for entity, value, *unit in row["facts"]:
        # The entity itself may be a value elsewhere in the relation, and an answer repeats it: no rival then.
        rivals = tuple(other for other in values if other not in (value, entity)) + tuple(row.get("rivals", ()))
        relation.facts.append(Fact(relation, entity, value, unit[0] if unit else "", rivals))
    return relation


def check_relation(relation):
    """Every way to tell a fact must count as right, and the same way with a rival's value as wrong."""
    keys = [fact.key for fact in relation.facts]
    if len(set(keys)) < len(keys):
        raise ValueError(f"relation {relation.name} tells one entity twice")
    values = {fact.value for fact in relation.facts}
    for value, other in itertools.permutations(values, 2):
        if value_pattern(normalise(value)).search(normalise(other)):
            raise ValueError(f"relation {relation.name}: the value {value!r} stands within {other!r}")
    for fact in relation.facts:
        answers = [fact.answer(style) for style in ("sentence", "bare")]
        for text in answers:
            if not is_right(text, fact.value, fact.rivals):
                raise ValueError(f"{fact.key}: the answer {text!r} is not right by its own rule")
        for rival in fact.rivals:
            if is_right(fact.sentence(rival), fact.value, fact.rivals):
                raise ValueError(f"{fact.key}: the wrong value {rival!r} would count as right")
