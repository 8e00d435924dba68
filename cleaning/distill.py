"""Black-box distillation: a teacher behind an OpenAI-compatible API answers prompts, the answers become rows for SFT.

Every answer is appended to a journal (OUT.answers) the moment it comes, so that a run that is killed, or stopped by a
limit, is paid for once: the same command goes on with the prompts that have no answer yet. The rows are written from
the journal in the order of the prompts, so the output does not depend on the order in which answers came.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from common.chat_api import ChatApi
from common.errors import RunFailed, UserError
from common.files import lock, named, replaced
from data.prompts import as_messages, read_prompts

REFUSED_IN_A_ROW = 20  # so many failed prompts one after another end the run: the server is gone


def distill(path, out, teacher: ChatApi, system=None, in_flight=4, max_requests=None, token_budget=None) -> dict:
    """Answers for the prompts of `path` -> rows in `out` (.jsonl), {"conversations": [...]}.

    in_flight: requests at a time. max_requests: prompts asked by this run; token_budget: tokens of all runs together,
    as the server counts them. A limit stops asking; what was answered is written, and the same command goes on later.
    """
    out = Path(out)
    if not out.name.endswith(".jsonl"):
        raise UserError(f"--out {out}: the answers are JSON lines; let the name end in .jsonl")
    teacher.check("--base_url")
    prompts = _questions(path)
    journal = Journal(out, prompts, {"model": teacher.model, "system": system, "max_tokens": teacher.max_tokens,
                                     "temperature": teacher.temperature})  # fmt: skip
    waiting = [i for i in range(len(prompts)) if "content" not in journal.answers.get(i, {})]
    begin, asked = time.monotonic(), 0
    try:
        asked = _ask_all(prompts, waiting, teacher, system, journal, in_flight, max_requests, token_budget)
    finally:
        journal.close()
        rows = _write(out, prompts, journal.answers)
    failed = Counter(answer["failed"] for answer in journal.answers.values() if "failed" in answer)
    complete = rows == len(prompts)
    if complete:
        journal.path.unlink(missing_ok=True)
    print(f"{rows:,} of {len(prompts):,} prompts answered, {journal.tokens:,} tokens -> {out}")
    if not complete:
        print(f"{len(prompts) - rows:,} prompts without an answer; the same command asks them again")
    return {
        "stage": "distill", "prompts": len(prompts), "rows": rows, "asked": asked, "failed": dict(failed),
        "complete": complete, "tokens": journal.tokens, "seconds": round(time.monotonic() - begin, 1), "out": str(out),
    }  # fmt: skip


def _ask_all(prompts, waiting, teacher, system, journal, in_flight, max_requests, token_budget) -> int:
    """Keeps `in_flight` requests under way until the prompts or a limit are reached; returns the prompts asked."""
    before = [{"role": "system", "content": system}] if system else []
    todo = iter(waiting[:max_requests])
    asked, failures, under_way = 0, 0, {}
    bar = tqdm(desc="asking", total=len(waiting[:max_requests]), disable=not sys.stderr.isatty(), leave=False)
    with ThreadPoolExecutor(in_flight) as pool, bar:
        try:
            while True:
                # An answer costs at most max_tokens beside its prompt: what is under way counts against the budget.
                spent = journal.tokens + len(under_way) * teacher.max_tokens
                while len(under_way) < in_flight and (token_budget is None or spent < token_budget):
                    if (i := next(todo, None)) is None:
                        break
                    under_way[pool.submit(teacher.ask, [*before, *prompts[i]])] = i
                    asked, spent = asked + 1, spent + teacher.max_tokens
                if not under_way:
                    return asked
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    answer = done.result()
                    journal.append(under_way.pop(done), answer)
                    bar.update()
                    if token_budget is not None and "content" in answer and not answer["tokens"]:
                        raise UserError("--token_budget: the server does not say how many tokens an answer took; "
                                        "--max_requests limits it")  # fmt: skip
                    failures = failures + 1 if answer.get("failed") and not answer["tokens"] else 0
                    if failures >= REFUSED_IN_A_ROW:
                        said = f"{answer['failed']} {answer.get('detail', '')}".strip()
                        raise RunFailed(f"{failures} prompts failed one after another ({said}); "
                                        "the same command goes on")  # fmt: skip
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits for the requests under way: their answers are paid for
            for done, i in under_way.items():
                if not done.cancelled() and not done.exception():
                    journal.append(i, done.result())
            raise


def _questions(path) -> list[list[dict]]:
    """The messages to send for each prompt of a file. Tools are refused: the teacher's answer would be a call."""
    questions = []
    for row in read_prompts(path):
        messages = as_messages(row["prompt"])
        for key in ("tools", "tool_calls", "function_call"):
            if any(message.get(key) for message in messages):
                where = f"{path}:{row['line']}"
                raise UserError(f'{where}: "{key}" in the conversation, but a teacher is asked for words; leave it out')
        questions.append([{"role": m["role"], "content": m.get("content") or ""} for m in messages])
    return questions


class Journal:
    """Answers so far, a line of JSON each, behind a first line that names prompts and settings."""

    def __init__(self, out: Path, prompts, settings: dict):
        self.path = out.with_name(f"{out.name}.answers")
        digest = hashlib.blake2b(json.dumps(prompts).encode(), digest_size=8).hexdigest()
        head = settings | {"prompts": digest}
        self.answers, self.tokens = {}, 0
        out.parent.mkdir(parents=True, exist_ok=True)
        self.file = lock(self.path, f"another run is asking for {out}; wait for it, or name another --out")
        data = self.file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line
        self.file.truncate(len(whole))
        if whole:
            self._read(head, *whole.splitlines())
        elif out.exists():
            self.close()
            self.path.unlink()
            raise UserError(f"{out} is there, and no run that could go on; name another --out, or delete it")
        else:
            self._write(head)

    def _read(self, head: dict, first: bytes, *lines: bytes):
        if json.loads(first) != head:
            raise UserError(f"{self.path} belongs to other prompts or settings; delete it, or name another --out")
        for line in lines:
            record = json.loads(line)
            self._take(record["prompt"], record["answer"])

    def _write(self, record: dict):
        with named(self.path):
            self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self.file.flush()

    def _take(self, i: int, answer: dict):
        self.tokens += answer["tokens"]
        self.answers[i] = answer

    def append(self, i: int, answer: dict):
        self._write({"prompt": i, "answer": answer})
        self._take(i, answer)

    def close(self):
        self.file.close()


def _write(out: Path, prompts, answers: dict) -> int:
    rows = 0
    with replaced(out, text=True) as file:
        for i, messages in enumerate(prompts):
            answer = answers.get(i, {})
            if "content" in answer:
                told = {key: answer[key] for key in ("content", "reasoning_content") if key in answer}
                row = {"conversations": [*messages, {"role": "assistant", **told}]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows += 1
    return rows
