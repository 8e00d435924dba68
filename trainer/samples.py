"""What the model writes while it learns, kept beside its log: to --sample_prompts at each validation, and in
reinforcement learning the answers that were rewarded. Nothing of it changes the run."""

import json
import os
from pathlib import Path

import torch

from common.errors import UserError
from common.files import named
from model.tokenizer import encode_text

PROMPT_SHARE = 0.5  # of the model's context that a prompt may fill: the template and the answer need room


def read_prompts(path, tokenizer, config) -> tuple[str, ...]:
    """The prompts of a text file, one a line; UserError where it has none or one is too long. None: no file, none."""
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--sample_prompts: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--sample_prompts: {path} is not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if len(encode_text(tokenizer, line)) > PROMPT_SHARE * config.max_seq_len:
            raise UserError(f"--sample_prompts: {path}:{number} is longer than half of the model's context")
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--sample_prompts: {path} is empty; write one prompt a line")
    return prompts


class Samples:
    """Writes {"step", "prompt", "text"} rows to <name>_samples.jsonl, by the first process.

    write(model, tokenizer, prompts) -> texts, by the model in eval mode; the stage hands it in, since how a model
    answers is inference's work.
    """

    def __init__(self, run, world, write, start_step: int, total_steps: int):
        self.run, self.world, self.write = run, world, write
        if world.first:
            self._cut(start_step, total_steps)

    def _cut(self, start_step: int, total_steps: int) -> None:
        """Drops what will be written again: as in the log, the rows behind the saved step, and those of the last
        validation. A run that starts anew drops all, whether or not it writes samples itself."""
        path = self.run.files.samples
        if not path.exists():
            return
        with named(path), open(path, "rb+") as file:
            end = 0
            for line in file.readlines() if start_step else ():
                step = step_of(line)
                if step is None or step > start_step or step == total_steps:
                    break
                end += len(line)
            file.truncate(end)
        if not end:
            path.unlink()

    def take(self, engine, step: int) -> None:
        """Writes what the model says now. All processes must call it: under ZeRO each holds a part of the weights."""
        if not self.run.prompts:
            return
        model = engine.whole_model()
        if not self.world.first:
            return
        training, device = model.training, model.device
        # Nothing is drawn for greedy texts. Should that change, the run's own random numbers still stay what they were.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.eval()
            with self.world.autocast():
                texts = self.write(model, self.run.tokenizer, list(self.run.prompts))
            model.train(training)
        self.add(step, [{"prompt": p, "text": t} for p, t in zip(self.run.prompts, texts, strict=True)])

    def add(self, step: int, rows: list[dict]) -> None:
        """Writes rows {"prompt", "text", ...} of a step, by the first process."""
        if not self.world.first:
            return
        path = self.run.files.samples
        with named(path), open(path, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())  # no power cut may leave a saved state that is ahead of its samples


def step_of(line: bytes) -> int | None:
    """The step of a row; None for a line that a crash cut short, or that is none of ours."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
