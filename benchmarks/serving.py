"""Many clients at one server for minutes: errors, equal answers, memory, latency, throughput.

scripts/serve_openai_api.py runs as a process of its own. First one client puts all questions one after the other
("one at a time"), then all clients put them over and over. Answers are greedy and streamed; each is compared with
Engine.generate of that question alone. A difference counts as a near tie where the engine's two best logits lie within
1e-4 at a place from which the server's text goes on with the second best.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import torch

from common.errors import RunFailed
from inference import open_model
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import Completion
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import save_weights

QUESTIONS = Path("dataset/sample/heldout.jsonl")
SHORT, LONG = 8, 96  # tokens of an answer at most: question by question something between
NEAR = 1e-4


def add_flags(parser) -> None:
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=300, metavar="S", help="(%(default)s)")
    parser.add_argument(
        "--slots", type=int, default=16, metavar="N", help="answers generated side by side (%(default)s)"
    )
    parser.add_argument("--questions", type=int, default=32, metavar="N", help="different questions (%(default)s)")
    parser.add_argument("--weight", metavar="PATH", help="(random weights of --preset)")
    parser.add_argument("--preset", default="minimind2-small", metavar="NAME", help="(%(default)s)")


@dataclass
class Measured:
    """What the clients saw; seconds."""

    answers: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    texts: dict[tuple[int, str], int] = field(default_factory=dict)  # (question, text): how often
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # (when, resident bytes of the server)


# -------------------------------------------------------------------------------------------------------- the clients
async def ask(client: httpx2.AsyncClient, number: int, body: dict, seen: Measured) -> None:
    """One streamed answer; what goes wrong is kept as a sentence."""
    begin, text, last, usage, done = time.perf_counter(), "", None, None, False
    try:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                seen.errors.append(f"{response.status_code}: {(await response.aread()).decode()[:200]}")
                return
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    seen.errors.append(chunk["error"]["message"])
                    return
                usage = chunk["usage"] or usage
                delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
                piece = delta.get("reasoning_content") or delta.get("content")
                if piece:
                    now = time.perf_counter()
                    (seen.first if last is None else seen.gaps).append(now - (last or begin))
                    last, text = now, text + piece
    except httpx2.HTTPError as error:
        seen.errors.append(f"{type(error).__name__}: {error}")
        return
    if not done or usage is None:
        seen.errors.append("a stream without usage or [DONE]")
        return
    seen.answers += 1
    seen.tokens += usage["completion_tokens"]
    seen.texts[number, text] = seen.texts.get((number, text), 0) + 1


async def one_at_a_time(url: str, bodies: list[dict]) -> Measured:
    seen = Measured()
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        for number, body in enumerate(bodies):
            await ask(client, number, body, seen)
    return seen


async def all_at_once(url: str, bodies: list[dict], clients: int, seconds: float, pid: int) -> Measured:
    """Client c begins with question c; each goes round until the time is over."""
    seen, begin = Measured(), time.perf_counter()

    async def one(c: int) -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
            number = c
            while time.perf_counter() - begin < seconds:
                await ask(client, number % len(bodies), bodies[number % len(bodies)], seen)
                number += 1

    async def watch_memory() -> None:
        while True:
            seen.memory.append((time.perf_counter() - begin, resident_bytes(pid)))
            await asyncio.sleep(min(1.0, seconds / 20))

    watcher = asyncio.create_task(watch_memory())
    await asyncio.gather(*(one(c) for c in range(clients)))
    watcher.cancel()
    return seen


def resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]  # Linux
    return int(pages) * 4096


# ------------------------------------------------------------------------------------------------------ equal answers
def near_tie(engine: Engine, alone: Completion, text: str) -> bool:
    """Whether `text` parts from the answer at a token where the second best is as good and leads to `text`."""
    for i, item in enumerate(alone.logprobs):
        (_, best), (token, second) = item.top
        other = engine.tokenizer.decode([*alone.token_ids[:i], token], skip_special_tokens=True)
        leads = text == other if token in engine.end_tokens else text.startswith(other.rstrip("\ufffd"))
        if best - second <= NEAR and leads:
            return True
    return False


def compare(engine: Engine, alone: list[Completion], texts: dict[tuple[int, str], int]) -> dict:
    different = {key: n for key, n in texts.items() if key[1] != alone[key[0]].text}
    ties = sum(n for (number, text), n in different.items() if near_tie(engine, alone[number], text))
    return {"equal": sum(texts.values()) - sum(different.values()), "near_ties": ties,
            "different": sum(different.values()) - ties}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the run
def prepare(args, folder: str) -> tuple[Path, Engine, list[dict]]:
    """-> (weights, engine for the answers alone, the requests)."""
    path = Path(args.weight or Path(folder) / "random_weights.pth")
    if not args.weight:
        torch.manual_seed(0)
        config = LMConfig.from_preset(args.preset, initializer_range=0.1)
        save_weights(path, MiniMindForCausalLM(config), load_tokenizer(), {"stage": "none, random weights"})
    flags = Namespace(preset=None, tokenizer=None, rope_scaling=None, device="cpu", dtype="auto")
    engine, _ = open_model.open_engine(flags, path)
    rows = QUESTIONS.read_text(encoding="utf-8").splitlines()
    step = max(len(rows) // args.questions, 1)
    asked = [json.loads(row)["question"] for row in rows[::step]][: args.questions]
    bodies = [
        {"model": "minimind", "messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True,
         "max_tokens": SHORT + (LONG - SHORT) * i // len(asked), "stream_options": {"include_usage": True}}
        for i, question in enumerate(asked)
    ]  # fmt: skip
    return path, engine, bodies


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": round(1000 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 2) for p in (50, 95)}


def run(args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path, engine, bodies = prepare(args, folder)
        alone = []
        for body in bodies:
            params = SamplingParams(temperature=0, max_tokens=body["max_tokens"], logprobs=2)
            alone += engine.generate([body["messages"]], params)
        # --queue: every client may wait, so that none is refused. --port 0: any free one, printed when it listens.
        command = [sys.executable, "scripts/serve_openai_api.py", "--weight", str(path), "--device", "cpu",
                   "--port", "0", "--slots", str(args.slots), "--queue", str(args.clients)]  # fmt: skip
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            print(server.stderr.readline().strip(), flush=True)
            found = re.match(r"(http://\S+) serves", server.stderr.readline())
            if not found:
                raise RunFailed(f"`{' '.join(command)}` did not start")
            begin = time.perf_counter()
            single = asyncio.run(one_at_a_time(found[1], bodies))
            middle = time.perf_counter()
            many = asyncio.run(all_at_once(found[1], bodies, args.clients, args.seconds, server.pid))
            end = time.perf_counter()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            server.stderr.close()
    return report(args, single, many, middle - begin, end - middle) | {
        "one_at_a_time": compare(engine, alone, single.texts), "answers": compare(engine, alone, many.texts),
        "exit_code": server.returncode,
    }  # fmt: skip


def report(args, single: Measured, many: Measured, single_seconds: float, seconds: float) -> dict:
    # A leak shows as growth between the second quarter, when everything is warm, and the last.
    halfway = [size for when, size in many.memory if args.seconds / 4 <= when <= args.seconds / 2]
    last = [size for when, size in many.memory if when >= args.seconds * 3 / 4]
    rates = (single.tokens / single_seconds, many.tokens / seconds)
    for error in dict.fromkeys(many.errors + single.errors):
        print(f"error: {error}", flush=True)
    return {
        "weights": args.weight or f"random, {args.preset}",
        "clients": args.clients, "slots": args.slots, "seconds": round(seconds, 1),
        "requests": many.answers, "errors": len(many.errors) + len(single.errors),
        "first_token_ms": quantiles(many.first), "next_token_ms": quantiles(many.gaps),
        "first_token_ms_alone": quantiles(single.first), "next_token_ms_alone": quantiles(single.gaps),
        "tokens_per_second": round(rates[1], 1), "tokens_per_second_one_at_a_time": round(rates[0], 1),
        "throughput_ratio": round(rates[1] / rates[0], 2),
        "resident_megabytes": {"second_quarter": max(halfway) >> 20, "last_quarter": max(last) >> 20},
    }  # fmt: skip
