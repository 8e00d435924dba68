"""Multiple-choice exams: reading them, asking them, counting.

A question has four options and one right letter. Nothing is generated: the model says how probable each answer is, and
the most probable one is its choice. Three ways to ask:

  chat        as MiniMind v1 did: a user turn with question and options, the letter as first token of the answer
  completion  as lm-evaluation-harness 0.4.13 asks a base model: instruction, worked examples ("shots"), question, cue
  text        a user turn with the question alone, each option's own words as the answer (the cloze form of an exam:
              Gu et al. 2024, OLMES, arXiv 2406.08446). It asks what a model knows; the others also ask it to find an
              option's letter, which models this small learn late or never, and then stay at chance whatever they know

C-Eval: Huang et al. 2023 (arXiv 2305.08322). ACLUE: Zhang & Li 2023 (arXiv 2310.09550). CMMLU: Li et al. 2023
(arXiv 2306.09212). TMMLU+: Tam et al. 2024 (arXiv 2403.01858). OpenBookQA: Mihaylov et al. 2018 (arXiv 1809.02789).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from data.reading import raw_rows
from data.row_shapes import parse_record
from model.tokenizer import encode_text

LETTERS = "ABCD"
SUBJECTS = Path(__file__).with_name("exam_subjects.json")  # as the harness's prompts call them; groups of the authors
V1_SYSTEM = "开始回答问题"  # MiniMind v1's system message


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is laid out and asked. `instruction` holds {} for the subject's name."""

    split: str  # where the questions are, by default
    shots_from: str  # where the worked examples are
    instruction: str
    cue: str = "答案："


BENCHMARKS = {
    "ceval": Benchmark("val", "dev", "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n"),
    "aclue": Benchmark("test", "dev", "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n"),
    "cmmlu": Benchmark("test", "dev", "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n"),
    "tmmluplus": Benchmark("test", "train", "以下為{}的單選題，請提供正確答案的選項。\n\n", cue="Answer:"),
    "openbookqa": Benchmark("test", "train", ""),
}


@dataclass
class Question:
    text: str
    options: tuple[str, str, str, str]
    answer: str  # one of LETTERS


@dataclass
class Subject:
    """One file of an exam. `title` is its name in the exam's own language, `group` what the exam files it under."""

    name: str
    title: str
    group: str | None
    questions: list[Question]
    shots: list[Question]


@dataclass
class Answer:
    """What the model made of one question."""

    question: Question
    chosen: str
    probabilities: list[float]  # of the four answers, among themselves
    right: bool = field(init=False)

    def __post_init__(self):
        self.right = self.chosen == self.question.answer


# ---------------------------------------------------------------------------------------------------------- reading
def read_exam(folder, benchmark: str, split: str | None = None) -> list[Subject]:
    """The subjects of <folder>/<split>/*.csv (or *.jsonl), or of <folder>/*_<split>.csv.

    Titles and groups are those of exam_subjects.json; a subject that is not in it is called by its file's name.
    UserError with file and line of what is wrong.
    """
    folder, plan = Path(folder), BENCHMARKS[benchmark]
    split = split or plan.split
    files = _files(folder, split)
    if not files:
        raise UserError(f"no questions in {folder}: neither {split}/*.csv nor *_{split}.csv (or .jsonl)")
    known = json.loads(SUBJECTS.read_text(encoding="utf-8")).get(benchmark, {})
    examples = {_name(file, plan.shots_from): file for file in _files(folder, plan.shots_from)}
    subjects = []
    for file in files:
        name = _name(file, split)
        title, group = known.get(name, (name, None))
        shots = read_questions(examples[name]) if name in examples and split != plan.shots_from else []
        subjects.append(Subject(name, title, group, read_questions(file), shots))
    return subjects


def _files(folder: Path, split: str) -> list[Path]:
    places = (f"{split}/*.csv", f"{split}/*.jsonl", f"*_{split}.csv", f"{split}.jsonl", f"data/*_{split}.csv")
    return next((sorted(folder.glob(place)) for place in places if any(folder.glob(place))), [])


def _name(file: Path, split: str) -> str:
    """Of the subject; a benchmark that is one file a split has one subject, named after its folder."""
    return file.parent.name if file.stem == split else file.stem.removesuffix(f"_{split}")


def read_questions(path: Path) -> list[Question]:
    """Columns question, A, B, C, D, answer (any case, further ones ignored), or OpenBookQA's JSON lines."""
    questions = []
    parts = _of_openbookqa if path.suffix == ".jsonl" else _of_columns
    for line, raw in raw_rows(path):
        try:
            questions.append(_question(*parts(parse_record(raw))))
        except ValueError as error:  # BadRow is one, too
            raise UserError(f"{path}:{line}: {error}") from None
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _of_columns(row: dict):
    """-> (text, options, answer)."""
    row = {name.strip().lower(): value for name, value in row.items()}
    missing = [name for name in ("question", *LETTERS, "answer") if name.lower() not in row]
    if missing:
        raise ValueError(f"no column {', '.join(missing)} (found: {', '.join(row)})")
    return row["question"], [row[letter.lower()] for letter in LETTERS], row["answer"]


def _of_openbookqa(row: dict):
    """-> (text, options, answer)."""
    try:
        stem = row["question"] if isinstance(row.get("question"), dict) else row
        choices = stem["choices"]
        if isinstance(choices, list):  # OpenBookQA's own file; on the Hugging Face hub it is a dict of two lists
            choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
        options = dict(zip(choices["label"], choices["text"], strict=True))
        text = stem.get("stem") or stem["question_stem"]
        return text, [options[letter] for letter in LETTERS], row["answerKey"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a question of OpenBookQA: {type(error).__name__} {error}") from None


def _question(text, options, answer) -> Question:
    if not all(isinstance(part, str) for part in (text, *options, answer)):
        raise ValueError("question, options and answer must be texts")
    if answer.strip() not in tuple(LETTERS):
        raise ValueError(f"the answer is {answer!r}, not one of A, B, C, D")
    return Question(text, tuple(options), answer.strip())


# ----------------------------------------------------------------------------------------------------------- asking
@dataclass
class Graded:
    """Answers by subject, and what had to be left out of prompts to fit the context."""

    answers: dict[str, list[Answer]]
    shots_dropped: int = 0
    prompts_cut: int = 0


def take_exam(engine, subjects: list[Subject], ask) -> Graded:
    """Puts all questions at once; ask(subject, question) -> (prompt ids, token ids of each answer, shots dropped)."""
    asked = [(subject, question, *ask(subject, question)) for subject in subjects for question in subject.questions]
    result = Graded({subject.name: [] for subject in subjects})
    prompts, continuations = [], []
    for *_, prompt, letters, dropped in asked:
        room = engine.context - max(map(len, letters))
        result.shots_dropped += dropped
        result.prompts_cut += len(prompt) > room
        prompts += [prompt[-room:]] * len(LETTERS)  # the end of a prompt says what is asked for
        continuations += letters
    scores = engine.score(prompts, continuations)
    for i, (subject, question, *_) in enumerate(asked):
        four = [score.total for score in scores[4 * i : 4 * i + 4]]
        result.answers[subject.name].append(answer_of(question, four))
    return result


def answer_of(question: Question, log_p: list[float]) -> Answer:
    """The most probable of the four answers, and their probabilities among themselves."""
    weights = [math.exp(x - max(log_p)) for x in log_p]
    chosen = LETTERS[log_p.index(max(log_p))]
    return Answer(question, chosen, [w / sum(weights) for w in weights])


class AskByChat:
    """MiniMind v1's way. `system` may be empty: no system turn."""

    def __init__(self, engine, system: str = V1_SYSTEM):
        self.engine, self.system = engine, system
        self.letters = [encode_text(engine.tokenizer, letter) for letter in LETTERS]

    def __call__(self, subject: Subject, question: Question):
        options = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, question.options, strict=True))
        messages = [{"role": "user", "content": f"{question.text}。选择 {options}"}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return self.engine.encode(messages), self.letters, 0


class AskByText:
    """The cloze form. A gap at the end of the question is left out: the answer fills it."""

    def __init__(self, engine, system: str = ""):
        self.engine, self.system = engine, system

    def __call__(self, subject: Subject, question: Question):
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": question.text.rstrip("_ ")})
        options = [encode_text(self.engine.tokenizer, option) for option in question.options]
        return self.engine.encode(messages), options, 0


class AskByCompletion:
    """lm-evaluation-harness's way. Worked examples are dropped from the end until prompt and answer fit."""

    def __init__(self, engine, benchmark: str, shots: int):
        self.engine, self.benchmark, self.shots = engine, benchmark, shots

    def __call__(self, subject: Subject, question: Question):
        shots = subject.shots[: self.shots]
        for n in range(len(shots), -1, -1):
            prompt, letters = self.encode(subject, shots[:n], question)
            if len(prompt) + max(map(len, letters)) <= self.engine.context:
                break
        return prompt, letters, len(shots) - n

    def encode(self, subject: Subject, shots: list[Question], question: Question):
        context = completion_prompt(self.benchmark, subject.title, shots, question)
        choices = question.options if self.benchmark == "openbookqa" else LETTERS
        return split_pair(self.engine.tokenizer, context, [f" {choice}" for choice in choices])


def completion_prompt(benchmark: str, title: str, shots: list[Question], question: Question) -> str:
    """The text of one question. OpenBookQA's continuations are the options themselves, so it shows no letters."""
    plan = BENCHMARKS[benchmark]
    parts = [plan.instruction.format(title)]
    for q in (*shots, question):
        if benchmark == "openbookqa":
            asked, answer = q.text, q.options[LETTERS.index(q.answer)]
        else:
            options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, q.options, strict=True))
            asked, answer = f"{q.text.strip()}\n{options}\n{plan.cue}", q.answer
        parts.append(asked if q is question else f"{asked} {answer}\n\n")
    return "".join(parts)


def split_pair(tokenizer, context: str, choices: list[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context and of each choice after it, encoded together and cut where the context ends.

    Blanks at the end of the context go to the choices: a word and the blank before it are one token.
    """
    stripped = context.rstrip()
    ids = tokenizer.encode(stripped)
    blanks = context[len(stripped) :]
    return ids, [tokenizer.encode(stripped + blanks + choice)[len(ids) :] for choice in choices]
