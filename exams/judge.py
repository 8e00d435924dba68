"""Answers of two models compared by a third one behind an OpenAI-compatible API, each pair in both orders.

Judges tend to prefer the answer they read first, or the one they read last (Zheng et al. 2023, arXiv 2306.05685). So
every pair is judged twice, with the order swapped. A model wins a prompt only if both verdicts say so; anything else is
a tie. How often the two verdicts agree is reported too: it says how far the judge can be trusted.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations

from common.chat_api import NO_REPLY, ChatApi
from common.errors import RunFailed, UserError

IN_FLIGHT = 4  # requests at a time
LIST_SECONDS = 30.0  # for the server's list of its models
ASK = """You compare two answers to the same question. Judge whether they are correct, helpful and to the point, in \
the language of the question; length is no merit, and the order in which they stand means nothing.

[Question]
{question}
[End of question]

[Answer 1]
{first}
[End of answer 1]

[Answer 2]
{second}
[End of answer 2]

Think briefly, then end with one line of JSON that gives each answer from 1 (useless) to 10 (perfect):
{{"answer_1": <number>, "answer_2": <number>}}"""
SCORES = re.compile(r'\{\s*"answer_1"\s*:\s*([\d.]+)\s*,\s*"answer_2"\s*:\s*([\d.]+)\s*\}')


@dataclass
class Verdict:
    """On two answers to prompt number `prompt`: the scores of columns a and b, read in the order a, b and in b, a."""

    prompt: int
    a: int
    b: int
    scores: tuple[tuple[float, float] | None, tuple[float, float] | None]  # (of a, of b); None: no verdict
    replies: tuple[str, str]

    @property
    def winners(self) -> tuple[int | None, ...]:
        """By order: 1 where a is better, -1 where b is, 0 where they are equal, None without a verdict."""
        return tuple(s and (s[0] > s[1]) - (s[0] < s[1]) for s in self.scores)


def connect(address: str, model: str | None, key: str) -> ChatApi:
    """The judge, checked by asking its server for the list of models; `model` None: the first of that list."""
    import openai

    api = ChatApi(address, model or "", key, temperature=0.0)
    api.check("--judge")
    try:
        known = api.client.with_options(timeout=30, max_retries=0).models.list()
        return replace(api, model=model or known.data[0].id)
    except openai.APIStatusError as error:
        if error.status_code in (401, 403):
            said = "the key in OPENAI_API_KEY is not taken"
            raise UserError(f"--judge {address} answers {error.status_code}: {said}") from None
    except openai.OpenAIError as error:
        raise UserError(f"--judge {address}: {error.__cause__ or error}; is the server running?") from None
    except NO_REPLY:
        pass
    if model is None:  # a server without a list of models may still judge
        raise UserError(f"--judge {address} names no model: add --judge_model NAME")
    return api


def transcript(prompt: str | list[dict]) -> str:
    """What was asked, as the judge reads it: a text, or all messages of a conversation."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def judge(api: ChatApi, questions: list[str], columns: list[list[str]], tell: Callable) -> list[Verdict]:
    """Judges all pairs of columns on all questions. columns: each model's answers, in the order of the questions.

    tell(done, of) is called after each pair. RunFailed if no reply holds a verdict.
    """
    tasks = [(i, a, b) for i in range(len(questions)) for a, b in combinations(range(len(columns)), 2)]

    def compare(task) -> Verdict:
        i, a, b = task
        (here, said), (there, said_swapped) = (
            _ask(api, questions[i], columns[first][i], columns[second][i]) for first, second in ((a, b), (b, a))
        )
        return Verdict(i, a, b, (here, there and there[::-1]), (said, said_swapped))

    verdicts = []
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            for verdict in pool.map(compare, tasks):
                verdicts.append(verdict)
                tell(len(verdicts), len(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if all(scores is None for verdict in verdicts for scores in verdict.scores):
        raise RunFailed(
            f"{api.base_url}: no verdict in {2 * len(tasks)} replies, the first: {verdicts[0].replies[0]!r}"
        )
    return verdicts


def _ask(api: ChatApi, question: str, first: str, second: str) -> tuple[tuple[float, float] | None, str]:
    """-> (the scores of the first and the second answer, the reply); None where there are none from 1 to 10."""
    reply = api.ask([{"role": "user", "content": ASK.format(question=question, first=first, second=second)}])
    text = reply.get("content") or reply["failed"]
    found = SCORES.findall(text)
    try:
        scores = tuple(map(float, found[-1])) if found else ()
    except ValueError:  # 1.2.3
        scores = ()
    return (scores if len(scores) == 2 and all(1 <= x <= 10 for x in scores) else None), text


def summarise(verdicts: list[Verdict], names: list[str]) -> dict:
    """Mean score of each model over both orders, and for each pair wins, ties and agreement."""
    scores: dict[int, list[float]] = {i: [] for i in range(len(names))}
    for verdict in verdicts:
        for a, b in filter(None, verdict.scores):
            scores[verdict.a].append(a)
            scores[verdict.b].append(b)
    pairs = []
    for a, b in combinations(range(len(names)), 2):
        winners = [v.winners for v in verdicts if (v.a, v.b) == (a, b)]
        whole = [pair for pair in winners if None not in pair]
        pairs.append({
            "a": names[a], "b": names[b], "wins_a": whole.count((1, 1)), "wins_b": whole.count((-1, -1)),
            "ties": sum(x != y or x == 0 for x, y in whole), "no_verdict": len(winners) - len(whole),
            "agreement": sum(x == y for x, y in whole) / len(whole) if whole else None,
            "first_preferred": sum((x == 1) + (y == -1) for x, y in whole), "verdicts": 2 * len(whole),
        })  # fmt: skip
    return {"scores": {names[i]: sum(s) / len(s) if s else None for i, s in scores.items()}, "pairs": pairs}


def table(summary: dict) -> list[str]:
    """The summary as Markdown."""
    lines = ["| model | mean score |", "|---|---|"]
    lines += [f"| `{name}` | {'-' if x is None else f'{x:.2f}'} |" for name, x in summary["scores"].items()]
    lines += ["", "| A | B | A wins | B wins | ties | no verdict | orders agree |", "|---|---|---|---|---|---|---|"]
    for p in summary["pairs"]:
        agree = "-" if p["agreement"] is None else f"{p['agreement']:.0%}"
        cells = (f"`{p['a']}`", f"`{p['b']}`", p["wins_a"], p["wins_b"], p["ties"], p["no_verdict"], agree)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def rows(verdicts: list[Verdict], questions: list[str], columns: list[list[str]], names: list[str]) -> list[str]:
    """A line of JSON for each verdict, with what was compared."""
    return [
        json.dumps({"question": questions[v.prompt], "names": (names[v.a], names[v.b]),
                    "answers": (columns[v.a][v.prompt], columns[v.b][v.prompt])} | asdict(v), ensure_ascii=False) + "\n"
        for v in verdicts
    ]  # fmt: skip
