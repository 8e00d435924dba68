"""Open questions with known answers: the rows of a file checked, asked side by side, and scored.

A row is {"question", "answer", "rivals"?, "kind"?, "history"?}: "rivals" are wrong answers, "history" is what is asked
before it in the same conversation.
"""

from common.errors import UserError
from data.answer_match import is_refusal, is_right
from data.prompts import as_messages
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import Completion

BROKEN = "\N{REPLACEMENT CHARACTER}"  # stands where bytes make no character


def check_question(row: dict, where: str) -> None:
    """Raises UserError for a row that cannot be scored, before anything is generated."""
    if not isinstance(row.get("answer"), str) or not row["answer"].strip():
        raise UserError(f'{where}: no "answer", or an empty one')
    rivals = row.get("rivals") or []
    if not isinstance(rivals, list) or not all(isinstance(rival, str) for rival in rivals):
        raise UserError(f'{where}: "rivals" must be a list of texts')
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(text, str) and text.strip() for text in history):
        raise UserError(f'{where}: "history" must be a list of questions')
    if not isinstance(row.get("kind"), str | None):
        raise UserError(f'{where}: "kind" must be a text')


def answer_rows(
    engine: Engine, rows: list[dict], params: SamplingParams, system: str | None = None, histories: list | None = None
) -> list[Completion]:
    """The answers to the rows' prompts, as read_prompts gives them, generated side by side.

    system: of the rows that have none. histories: for each row the questions that are asked before its own. The model's
    own answers stand between them, so the first questions of all rows are answered together, then the second ones, and
    so on.
    """
    asked = [[*before, row["prompt"]] for before, row in zip(histories or [()] * len(rows), rows, strict=True)]
    talks, answers = [[] for _ in rows], [None for _ in rows]
    for turn in range(max(map(len, asked))):
        asking = [i for i in range(len(rows)) if turn < len(asked[i])]
        for i in asking:
            talks[i] = as_messages([*talks[i], *as_messages(asked[i][turn])], rows[i].get("system", system))
        for i, answer in zip(asking, engine.generate([talks[i] for i in asking], params), strict=True):
            talks[i].append({"role": "assistant", "content": answer.text})
            answers[i] = answer
    return answers


def scored(rows: list[dict], texts: list[str]) -> tuple[list[dict], list[str], dict]:
    """-> the rows with what was generated and whether it is right, a table by kind, and the figures."""
    kinds, refused, kept = {}, {}, []
    for row, text in zip(rows, texts, strict=True):
        right, kind = is_right(text, row["answer"], row.get("rivals") or ()), row.get("kind") or "all"
        kinds.setdefault(kind, []).append(right)
        refused.setdefault(kind, []).append(is_refusal(text))
        told = {key: row[key] for key in ("history", "question", "answer", "kind") if key in row}
        kept.append(told | {"generated": text, "right": right})
    table = []
    for kind, rights in kinds.items():
        says_no = f"  {sum(refused[kind])} answered by I do not know" if any(refused[kind]) else ""
        table.append(f"{kind:<24} {sum(rights):>5} of {len(rights):>5}  {sum(rights) / len(rights):6.1%}{says_no}")
    total = sum(map(sum, kinds.values()))
    table.append(f"{'together':<24} {total:>5} of {len(rows):>5}  {total / len(rows):6.1%}")
    figures = {
        "n": len(rows), "accuracy": total / len(rows), "by_kind": {k: sum(r) / len(r) for k, r in kinds.items()},
        "refused": {k: sum(r) / len(r) for k, r in refused.items()}, "broken": sum(BROKEN in text for text in texts),
    }  # fmt: skip
    return kept, table, figures
