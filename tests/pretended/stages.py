"""Runs every stage on the pretended GPU and on the CPU, and says what each step did.

    python tests/pretended/stages.py 8.6 FOLDER [STAGE ...]

Prints one JSON object: {stage: {"error", "losses", "cpu_losses", "steps": [counts of each], "decode": [...]}}.
"""

import contextlib
import json
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from pretended.gpu import COUNTS, gpu  # isort: skip  before anything that imports torch

import torch
from stage import STAGES, load, run_flags, weights_of

import inference.batch
import trainer.grpo
import trainer.loop
from inference.stream_text import Completion

torch.set_num_threads(1)
STEPS = 3
MORE = {  # every branch that behaves otherwise on a GPU: flags beside those of a stage's short run
    "pretrain": [], "pretrain qk_norm": ["--qk_norm"], "pretrain moe": ["--use_moe", "--moe_hidden_dim", "64"],
    "pretrain checkpointing": ["--gradient_checkpointing"], "full_sft": [], "lora": ["--lora_dropout", "0"], "dpo": [],
    "dpo live": ["--reference", "live"], "full_dist": [], "reason": [], "grpo": ["--val_split", "0"],
    "grpo fixed": ["--val_split", "0"],
}  # fmt: skip


def main(capability: str, folder: str, *wanted: str) -> None:
    found, steps, decode = {}, [], []
    runs = [run for run in MORE if (not wanted or run in wanted) and not (run.endswith("moe") and capability == "7.5")]
    for run in runs:
        found[run] = {"cpu_losses": losses(run, folder, "cpu")}
    record_after(trainer.loop, "move_weights", steps)
    record_after(trainer.grpo, "move_weights", steps)
    record_after(inference.batch.Batch, "step", decode)
    with gpu(tuple(map(int, capability.split(".")))):
        for run in runs:
            steps.clear(), decode.clear(), COUNTS.reset()
            try:
                found[run] |= {"losses": losses(run, folder, "cuda:0"), "error": None}
            except BaseException:
                found[run] |= {"losses": [], "error": traceback.format_exc(limit=-6)}
            found[run] |= {"steps": list(steps), "decode": list(decode)}
    print(json.dumps(found))


def losses(run: str, folder: str, device: str) -> list[float]:
    """Of a short run of the stage on the device."""
    stage, out = run.split()[0], Path(folder) / device.replace(":", "") / run.replace(" ", "_")
    script = load(STAGES[stage])
    if run == "grpo fixed":
        script.sampler = lambda tokenizer, max_new_tokens: same_answers
    with contextlib.redirect_stdout(sys.stderr):
        flags = [*run_flags(stage, Path(folder), STEPS), "--device", device, "--out_dir", str(out), "--overwrite"]
        flags += ["--eval_interval", "0", "--save_interval", "100", *([] if stage == "grpo" else ["--dropout", "0"])]
        script.main(flags + MORE[run])
    log = next(out.rglob(Path(weights_of(stage)).stem.removesuffix("_32") + "*.jsonl"))
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def same_answers(model, prompts, seeds, temperature):
    """GRPO's rollout without the model: a half-precision model may choose another token, and then all differs."""
    generator = torch.Generator().manual_seed(seeds[0])
    tokens = [torch.randint(20, 6400, (5 + seed % 7,), generator=generator).tolist() for seed in seeds]
    texts = ["<think>\n1\n</think>\n<answer>\n" + str(seed % 9) + "\n</answer>" for seed in seeds]
    return [Completion(text, t, "stop", len(p), len(t)) for text, t, p in zip(texts, tokens, prompts, strict=True)]


def record_after(owner, name: str, records: list) -> None:
    """Each call of owner.name ends a stretch of counting."""
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        result = function(*args, **kwargs)
        records.append(COUNTS.snapshot())
        COUNTS.reset()
        return result

    setattr(owner, name, counted)


if __name__ == "__main__":
    main(*sys.argv[1:])
