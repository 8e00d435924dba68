"""Runs a stage of the project inside a test, on a model small enough for seconds."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing import context
from pathlib import Path

import torch

from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import save_weights
from trainer.loop import language_model, train

ROOT = Path(__file__).resolve().parent.parent
TINY = """
--preset tiny --dim 32 --n_layers 2 --n_heads 2 --n_kv_heads 1 --hidden_dim 64
--seq_len 64 --batch_size 2 --accumulation_steps 2 --log_interval 1 --device cpu
""".split()  # noqa: SIM905
STAGES = {
    "pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py", "lora": "4-lora_sft.py", "dpo": "5-dpo_train.py",
    "full_dist": "train_distill.py", "reason": "train_distill_reason.py", "grpo": "train_grpo.py",
}  # fmt: skip


def load(name: str):
    """The module of a script whose name cannot be imported, such as 1-pretrain.py."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_").removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_loss(stage, wrap):
    """The stage's script with wrap(the default loss) in the place of the default loss."""
    stage.train = partial(train, loss_fn=wrap(language_model))
    return stage


def write_texts(path, n=60):
    texts = [f"第{i}篇。" + "春天来了，花儿开了。" * (i % 13 + 1) + f" The end of no. {i}." for i in range(n)]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


def write_prompts(path):
    path.write_text("春天\n\n第3篇\n", encoding="utf-8")
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
    done = subprocess.run(command(script, *args), capture_output=True, text=True, env=env, cwd=ROOT, **kwargs)
    assert not warned(done.stderr), done.stderr
    return done


def warned(text: str) -> bool:
    """Whether a library warns in what a program printed; the project's own lines begin with `warning: `."""
    return any(re.search("warn|deprecat", line, re.I) for line in text.splitlines() if not line.startswith("warning: "))


def catch_gradients(engine) -> dict:
    """Filled with a step's gradients by name, as they are before they are clipped; the weights stay as they are."""
    caught = {}

    def norm():
        caught.update({n: p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None})
        return torch.zeros(())

    engine.gradient_norm, engine.step = norm, lambda factor, norm: norm
    return caught


def last_json(stdout: str) -> dict:
    return json.loads(stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------- short runs of each stage
SHORT = "--seq_len 64 --batch_size 2 --accumulation_steps 2 --log_interval 1 --device cpu".split()  # noqa: SIM905
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 64}


def chat_weights(folder, seed=0, name="full_sft_32.pth", **fields) -> Path:
    """Random weights of a small chat model, sharpened so that its choices differ."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(LMConfig(**(SMALL | {"aux_loss_alpha": 0.01} | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / name, model, load_tokenizer(), {"stage": "full_sft"})
    return folder / name


def write_pairs(path, n=40):
    rows = []
    for i in range(n):
        prompt = [{"role": "user", "content": f"{i}加{i % 7}？" + "请回答。" * (i % 4)}]
        answers = (f"等于{i + i % 7}。", f"不是{i + i % 7}。")
        chosen, rejected = ([*prompt, {"role": "assistant", "content": a}] for a in answers)
        rows.append({"chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def write_traces(path, n=40):
    rows = []
    for i in range(n):
        answer = f"<think>\n{i}再加{i}，数一数。\n</think>\n<answer>\n{2 * i}\n</answer>"
        rows.append([{"role": "user", "content": f"{i}+{i}=？"}, {"role": "assistant", "content": answer}])
    path.write_text("".join(json.dumps({"conversations": r}, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def larger_of_two() -> list[tuple[str, str]]:
    """Questions and answers, all pairs of digits."""
    return [(f"{a}和{b}，大的是？", str(max(a, b))) for a in range(1, 10) for b in range(1, 10)]


def reasoning_weights(folder) -> Path:
    """A model trained for seconds: its answers to larger_of_two() have the form, and some of them the right digit."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for question, answer in larger_of_two():
        content = f"<think>\n{answer}\n</think>\n<answer>\n{answer}\n</answer>"
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
        lines.append(json.dumps({"conversations": chat}, ensure_ascii=False) + "\n")
    (folder / "larger.jsonl").write_text("".join(lines), "utf-8")
    flags = ["--from_weight", "none", "--data_path", folder / "larger.jsonl", "--out_dir", folder, "--val_split", 0,
             "--seq_len", 64, "--batch_size", 4, "--accumulation_steps", 1, "--max_steps", 110, "--learning_rate", 0.01,
             "--optimizer", "adamw", "--device", "cpu", "--log_interval", 100]  # fmt: skip
    for name, value in (SMALL | {"n_layers": 1}).items():
        flags += [f"--{name}", value]
    return Path(load(STAGES["reason"]).main(list(map(str, flags)))["weights"])


def write_questions(path) -> Path:
    rows = [{"question": question, "answer": answer} for question, answer in larger_of_two()]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def grpo_flags(folder, steps=12) -> list[str]:
    """Flags of a short run of train_grpo.py from reasoning_weights(folder): two questions a step."""
    base = folder / "reason_32.pth"
    base = base if base.exists() else reasoning_weights(folder)
    flags = ["--from_weight", base, "--data_path", write_questions(folder / "questions.jsonl"), "--max_steps", steps,
             "--seq_len", 64, "--max_new_tokens", 16, "--group", 8, "--batch_size", 8, "--accumulation_steps", 2,
             "--save_interval", 2, "--eval_interval", 5, "--val_split", 0.2, "--log_interval", 1, "--device", "cpu",
             "--learning_rate", 1e-3]  # fmt: skip
    return list(map(str, flags))


def run_flags(stage: str, folder, steps=12) -> list[str]:
    """Flags of a short run of a stage with dropout, its data and starting weights written to `folder`."""
    if stage == "grpo":
        return grpo_flags(folder, steps)
    folder.mkdir(parents=True, exist_ok=True)
    write = {"pretrain": write_texts, "dpo": write_pairs, "reason": write_traces}.get(stage, write_chats)
    flags = ["--data_path", write(folder / f"{stage}.jsonl"), "--max_steps", steps, "--save_interval", 2,
             "--eval_interval", 5, "--val_split", 0.2, "--dropout", 0.1]  # fmt: skip
    if stage in ("pretrain", "full_sft"):
        return list(map(str, [*TINY, *flags, "--from_weight", "none"]))
    base = folder / "full_sft_32.pth"
    base = base if base.exists() else chat_weights(folder)
    flags += ["--teacher" if stage == "full_dist" else "--from_weight", base]
    flags += ["--save_weight", "x", "--lora_dropout", 0.1] if stage == "lora" else []
    return list(map(str, [*SHORT, *flags]))


def weights_of(stage: str) -> str:
    """Where in --out_dir a run of run_flags leaves its weights."""
    return "lora/x_32.pth" if stage == "lora" else f"{stage}_32.pth"


def history(weights) -> list[dict]:
    """The lines of the log beside these weights, without how long each step took."""
    lines = weights.with_suffix(".jsonl").read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


# ------------------------------------------------------------------------------------- runs that are killed and go on
def popen(script: str, flags, log) -> subprocess.Popen:
    """The command as a user types it; what it prints goes to the file `log`."""
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(command(script, *flags), stdout=file, stderr=file, cwd=ROOT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


class Forked(getattr(context, "ForkProcess", context.Process)):
    """The stage's main() in a copy of this process, with Popen's methods: killed like any other, started at once.

    Where a system cannot fork, in a new process.
    """

    def __init__(self, script: str, flags, log):
        super().__init__()
        self.script, self.flags, self.log = script, list(map(str, flags)), log
        self.start()

    def run(self):
        sys.stdout = sys.stderr = open(self.log, "w", encoding="utf-8")
        load(self.script).main(self.flags)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int:
        self.join()
        return self.exitcode


def same_after_a_kill(stage: str, folder, moment, start=popen) -> str:
    """A stage run to its end (once a folder), and once more, killed after moment(process, out) and resumed: all equal.

    -> what the resumed run printed.
    """
    whole, broken = folder / "whole", Path(tempfile.mkdtemp(prefix="broken", dir=folder))
    flags, script, weights, log = run_flags(stage, folder), STAGES[stage], weights_of(stage), folder / "log.txt"
    if not (whole / weights).exists():
        assert start(script, [*flags, "--out_dir", whole], log).wait() == 0, log.read_text(encoding="utf-8")
    process = start(script, [*flags, "--out_dir", broken], log)
    moment(process, broken)
    process.kill()
    process.wait()
    again = start(script, [*flags, "--out_dir", broken, "--resume"], log).wait()
    printed = log.read_text(encoding="utf-8")
    assert again == 0, printed
    one, two = (torch.load(d / weights, weights_only=True) for d in (whole, broken))
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert history(whole / weights) == history(broken / weights)
    drop = ("seconds", "tokens_per_second", "peak_memory_bytes", "weights")
    results = [{k: v for k, v in w["record"]["result"].items() if k not in drop} for w in (one, two)]
    assert results[0] == results[1]
    return printed


def after_a_save(process, out) -> None:
    while process.poll() is None and not list(out.rglob("*_resume.pth")):
        time.sleep(0.01)
    time.sleep(0.05)
