"""A live server for tests: a small model that has learned three conversations by heart, uvicorn on a free port."""

import contextlib
import threading
import time
import urllib.request

import torch
import torch.nn.functional as F

from inference.engine import Engine
from inference.scheduler import Scheduler
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render
from serving.app import create_app
from serving.process import Server, listen

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a + b",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CALLS = [{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "add", "arguments": {"a": 3, "b": 4}}]
HELLO = "你好！我是一个小模型 😀, what can I do?"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


LEARNED = [  # (messages with the answer, tools)
    ([*user("你好"), {"role": "assistant", "content": HELLO}], None),
    ([*user("1+2, 3+4"), {"role": "assistant", "content": "I add.", "tool_calls": CALLS}], [ADD]),
    ([*user("1+2"), {"role": "assistant", "reasoning_content": "One and two.", "content": "It is 3."}], None),
]


def learned_model(steps: int = 150):
    """About five CPU-seconds of training; tests that use it check that the answers are the learned ones."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = MiniMindForCausalLM(LMConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_seq_len=1024))
    rows = []
    for messages, tools in LEARNED:
        ids, mask = render(tokenizer, messages, tools)
        labels = [token if m else -100 for token, m in zip(ids, mask, strict=True)]
        rows.append((torch.tensor([ids]), torch.tensor(labels[1:])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = sum(F.cross_entropy(model(ids).logits[0, :-1], labels) for ids, labels in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    return model.eval(), tokenizer


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


class Live:
    """A server that runs: its address and what stands behind it."""

    def __init__(self, scheduler: Scheduler, port: int):
        self.scheduler, self.engine, self.port = scheduler, scheduler.engine, port
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.root}/metrics") as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def idle(self) -> bool:
        stats = self.scheduler.stats()
        return stats["running"] == stats["waiting"] == stats["rows"] == 0


@contextlib.contextmanager
def serve(engine: Engine, slots=4, queue=64, patience=20.0, **options):
    """A Live for the duration of the block."""
    with Scheduler(engine, slots, queue) as scheduler, listen("127.0.0.1", 0) as listener:
        server = Server(create_app(scheduler, ["tiny", "minimind"], **options), scheduler, patience)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield Live(scheduler, listener.getsockname()[1])
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
