"""Black-box distillation: a teacher behind an OpenAI-compatible API answers prompts, the answers become rows for SFT.

Every answer is appended to a journal (OUT.answers) the moment it comes, so that a run that is killed, or stopped by a
limit, is paid for once: the same command goes on with the prompts that have no answer yet. The rows are written from
the journal in the order of the prompts, so the output does not depend on the order in which answers came.

Protocol: POST {base_url}/chat/completions, as in OpenAI's API reference; `reasoning_content` as DeepSeek's has it.
"""

import hashlib
import http.client
import json
import math
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from model.files import named, replaced
from trainer.cli import RunFailed, UserError
from trainer.lock import lock
from trainer.read import UNUSABLE, BadRow, parse_record, raw_rows, with_beside

MOVED = (301, 302, 303, 307, 308)
WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries; doubled each time
LONGEST_REPLY = 2**26  # bytes; more is no answer
# Why an answer is not whole, by the server's finish_reason (OpenAI's, DeepSeek's); others name a natural end.
CUT_SHORT = {"length": "cut at max_tokens", "content_filter": "cut by the server's filter",
             "insufficient_system_resource": "cut off by the server"}  # fmt: skip
REFUSED_IN_A_ROW = 20  # so many failed prompts one after another end the run: the server is gone


@dataclass(frozen=True)
class Teacher:
    """Where to ask, and how."""

    base_url: str
    model: str
    api_key: str = ""
    max_tokens: int = 1024
    temperature: float = 0.7
    timeout: float = 120.0  # seconds
    retries: int = 5
    first_wait: float = FIRST_WAIT

    def ask(self, messages: list[dict], stop: threading.Event | None = None) -> dict:
        """One request with its retries -> {"content", "reasoning_content", "tokens"} or {"failed": reason, "tokens"}.

        stop: set where the run ends; no retry is made then. Raises UserError where no request can succeed: a wrong
        key, address or model, a server that has moved (403 can be one prompt's fault, with a server that judges them).
        """
        pause, stop = self.first_wait, stop or threading.Event()
        for attempt in range(self.retries + 1):
            try:
                return self._ask_once(messages)
            except urllib.error.HTTPError as error:
                said = _body(error)
                if error.code in MOVED:
                    to = error.headers.get("Location", "elsewhere")
                    raise UserError(f"{self.base_url} answers {error.code}: moved to {to}; name where it is") from None
                if error.code in (401, 404):
                    raise UserError(f"{self.base_url} answers {error.code}: {said.strip()[:300]}") from None
                if error.code not in WORTH_ANOTHER_TRY:
                    return {"failed": f"status {error.code}", "detail": said[:300], "tokens": 0}
                reason, named = f"status {error.code}", error.headers.get("Retry-After", "")
                pause = max(pause, float(named)) if named.isdecimal() else pause
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
                reason = type(getattr(error, "reason", error)).__name__
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError):
                reason = "no chat completion in the reply"
            if attempt < self.retries and stop.wait(min(pause, LONGEST_WAIT)):
                break
            pause *= 2
        return {"failed": reason, "tokens": 0}

    def _ask_once(self, messages: list[dict]) -> dict:
        body = {"model": self.model, "messages": messages, "max_tokens": self.max_tokens,
                "temperature": self.temperature}  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        completion = json.loads(fetch(request, self.timeout))
        choice = completion["choices"][0]
        tokens = max(0, int((completion.get("usage") or {}).get("total_tokens") or 0))
        content = (choice["message"].get("content") or "").strip()
        if choice.get("finish_reason") in CUT_SHORT:
            return {"failed": CUT_SHORT[choice["finish_reason"]], "tokens": tokens}
        if not content:
            return {"failed": "empty answer", "tokens": tokens}
        thinking = (choice["message"].get("reasoning_content") or "").strip()
        (content + thinking).encode()  # half a surrogate pair cannot be written down
        return {"content": content, "tokens": tokens} | ({"reasoning_content": thinking} if thinking else {})


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go along to whatever server the reply names, the question would not."""

    def redirect_request(self, *_):
        return None


OPENER = urllib.request.build_opener(_StayHere)


def fetch(request: urllib.request.Request, seconds: float) -> bytes:
    """What the server replies within so many seconds, as a whole: a socket's timeout is for each piece, and a reply
    that drips would take for ever. OSError or HTTPException where none comes, ValueError above LONGEST_REPLY."""
    end, content = time.monotonic() + seconds, bytearray()
    with OPENER.open(request, timeout=seconds) as reply:
        while piece := reply.read1(2**16):
            content += piece
            if len(content) > LONGEST_REPLY:
                raise ValueError(f"a reply of more than {LONGEST_REPLY // 2**20} MB")
            if time.monotonic() > end:
                raise TimeoutError(f"no whole reply in {seconds:g} seconds")
        if reply.length:  # what the server announced and did not send
            raise http.client.IncompleteRead(bytes(content), reply.length)
    return bytes(content)


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def check_address(flag: str, url: str) -> None:
    """Raises UserError for what is no address of a server."""
    try:
        address = urllib.parse.urlsplit(url)
        whole = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if not whole:
        raise UserError(f"{flag} {url}: write it as http://HOST:PORT/v1")


def check_asking(teacher: Teacher, in_flight: int, max_requests: int | None, token_budget: int | None) -> None:
    """Raises UserError for what no request can be made of."""
    check_address("--base_url", teacher.base_url)
    if not (teacher.api_key.isascii() and teacher.api_key.isprintable()):
        raise UserError("--api_key: a key has no line breaks and no letters outside ASCII")
    if not math.isfinite(teacher.temperature) or teacher.temperature < 0:
        raise UserError(f"--temperature must be a number from 0, not {teacher.temperature}")
    least = {"--timeout": teacher.timeout, "--max_tokens": teacher.max_tokens, "--in_flight": in_flight,
             "--max_requests": max_requests, "--token_budget": token_budget}  # fmt: skip
    for name, value in least.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} must be above 0, not {value}")
    if teacher.retries < 0:
        raise UserError(f"--retries must not be negative, but is {teacher.retries}")


def distill(path, out, teacher: Teacher, system=None, in_flight=4, max_requests=None, token_budget=None) -> dict:
    """Answers for the prompts of `path` -> rows in `out` (.jsonl), {"conversations": [...]}.

    in_flight: requests at a time. max_requests: prompts asked by this run; token_budget: tokens of all runs together,
    as the server counts them. A limit stops asking; what was answered is written, and the same command goes on later.
    """
    out = Path(out)
    if not out.name.endswith(".jsonl"):
        raise UserError(f"--out {out}: the answers are JSON lines; let the name end in .jsonl")
    check_asking(teacher, in_flight, max_requests, token_budget)
    prompts = read_prompts(path)
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
    todo, stop = iter(waiting[:max_requests]), threading.Event()
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
                    under_way[pool.submit(teacher.ask, [*before, *prompts[i]], stop)] = i
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
            stop.set()
            pool.shutdown(cancel_futures=True)  # waits for the requests under way: their answers are paid for
            for done, i in under_way.items():
                if not done.cancelled() and not done.exception():
                    journal.append(i, done.result())
            raise


def read_prompts(path) -> list[list[dict]]:
    """The messages to send for each prompt. A .txt file has one prompt a line; rows of JSON have "prompt", "question",
    or a conversation, of which the last answer is left out and asked for anew."""
    path = Path(path)
    if path.suffix == ".txt":
        if not path.exists():
            raise UserError(f"no such file: {path}")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() cuts at more than line ends
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
        prompts = [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]
    else:
        prompts = []
        for line, raw in raw_rows(path):
            try:
                prompts.append(_prompt(parse_record(raw)))
                json.dumps(prompts[-1], ensure_ascii=False).encode()  # half a surrogate pair cannot be sent
            except UNUSABLE as error:
                raise UserError(f"{path}:{line}: {error}") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def _prompt(record: dict) -> list[dict]:
    messages = record.get("conversations", record.get("messages"))
    if messages is None:
        text = record.get("prompt", record.get("question"))
        if not isinstance(text, str) or not text.strip():
            raise BadRow('no text under "prompt" or "question" and no "conversations"')
        return [{"role": "user", "content": text}]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise BadRow('"conversations" must be a list of messages')
    messages = with_beside(messages, record) if messages else messages
    if told := next((key for m in messages for key in ("tools", "tool_calls", "function_call") if m.get(key)), None):
        raise BadRow(f'"{told}" in the conversation: a teacher is asked for words only; leave the row out')
    messages = [{"role": m["role"], "content": m.get("content") or ""} for m in messages]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise BadRow("the conversation has no question of the user")
    return messages


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
