"""What measurements of stages share: running one as a user would, asking its model, its loss on held-out rows."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from common.errors import UserError
from data.rows import packed_splits, token_bytes
from data.token_cache import tokenised
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import Completion, text_with_markers
from model.weights import load_model
from model.weights_file import newest_weights
from trainer.losses import learned_bytes, lm_loss

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "dataset" / "sample"


def stage(script: str, *flags) -> dict:
    """Runs a stage in a process of its own, shows what it prints, and returns the JSON object of its last line."""
    command = [sys.executable, script, *map(str, flags)]
    print("$ python", *command[1:], flush=True)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    last = ""
    for line in process.stdout:
        print(" ", line, end="", flush=True)
        last = line
    if process.wait():
        raise UserError(f"{script} ended with exit code {process.returncode}")
    return json.loads(last)


def chat_weights(path: str | None) -> Path:
    """The path, or the newest full_sft_* in out/."""
    found = Path(path) if path else newest_weights(ROOT / "out", want="full_sft")
    if found is None:
        raise UserError("no full_sft_* in out; run `make demo`, or name the weights")
    return found


def held_out(weights, file, folder, kind="chat", share=0.01, seq_len=256) -> dict[str, float]:
    """{"loss", "bits_per_byte"} of a model on the documents of a file that --val_split `share` holds out."""
    model, tokenizer, _ = load_model(weights)
    rows = packed_splits([tokenised(file, kind, tokenizer, Path(folder) / "cache")], kind, seq_len, 0, share)[1]
    return loss_on(model, rows, token_bytes(tokenizer))


def loss_on(model, rows, bytes_of_token: torch.Tensor) -> dict[str, float]:
    """{"loss", "bits_per_byte"} of a model on rows."""
    nats, targets, n_bytes = 0.0, 0, 0
    with torch.inference_mode():
        for i in range(len(rows)):
            batch = rows.batch([i])
            loss, count = lm_loss(model(batch["input_ids"], segment_ids=batch["segment_ids"]).logits, batch["labels"])
            nats, targets = nats + loss.item(), targets + int(count)
            n_bytes += int(learned_bytes(batch["labels"], bytes_of_token))
    return {"loss": nats / targets, "bits_per_byte": nats / math.log(2) / n_bytes}


def ask(weights, questions: list[str], max_tokens=128, markers=False) -> list[Completion]:
    """Greedy answers to questions, each a conversation of its own. markers: the text has special tokens, too."""
    model, tokenizer, _ = load_model(weights)
    prompts = [[{"role": "user", "content": question}] for question in questions]
    answers = Engine(model, tokenizer).generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
    for answer in answers if markers else ():
        answer.text = text_with_markers(tokenizer, answer)
    return answers


def read_lines(text: str) -> list[dict]:
    """JSON lines."""
    return [json.loads(line) for line in text.splitlines()]
