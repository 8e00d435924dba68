"""Runs a stage of the project inside a test, on a model small enough for seconds."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = """
--preset tiny --dim 32 --n_layers 2 --n_heads 2 --n_kv_heads 1 --hidden_dim 64
--seq_len 64 --batch_size 2 --accumulation_steps 2 --log_interval 1 --device cpu
""".split()  # noqa: SIM905
STAGES = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py"}


def load(name: str):
    """The module of a script whose name cannot be imported, such as 1-pretrain.py."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_").removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_texts(path, n=60):
    texts = [f"第{i}篇。" + "春天来了，花儿开了。" * (i % 13 + 1) + f" The end of no. {i}." for i in range(n)]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


def write_chats(path, n=60):
    rows = []
    for i in range(n):
        chat = [{"role": "system", "content": "简短回答。"}] if i % 3 == 0 else []
        for j in range(i % 4 + 1):
            chat += [
                {"role": "user", "content": f"{i}加{j}？"},
                {"role": "assistant", "content": f"等于{i + j}。" * (1 + i % 5)},
            ]
        rows.append({"conversations": chat})
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def command(script: str, *args) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, args)]


def run(script: str, *args, **kwargs) -> subprocess.CompletedProcess:
    """The script in a process of its own, as a user starts it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run(command(script, *args), capture_output=True, text=True, env=env, cwd=ROOT, **kwargs)


def last_json(stdout: str) -> dict:
    return json.loads(stdout.strip().splitlines()[-1])
