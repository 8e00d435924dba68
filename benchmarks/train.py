"""Each stage beside what a user of transformers, trl and peft would run, on the same rows of the same file.

Theirs: transformers' model of the same mathematics (export/counterpart.py) in transformers' Trainer (pretrain), trl's
SFTTrainer and DPOTrainer, peft's LoRA, each with its own collator, which pads a batch to its longest row, and documents
cut at the same length. Ours: the stage as its command builds it, rows packed. Their trainer drives: after each of its
steps one of ours is taken, and a matrix product, so that all are measured in turns in one process. Counted are real
tokens (no padding) a CPU second; one thread. The few batches that are timed say little about padding: how much of it
there is follows from the lengths of all documents, in a random order. Then each side takes two steps in a process of
its own for its peak memory, the libraries it loads included.
"""

import argparse
import importlib.util
import json
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from transformers import TrainerCallback

from benchmarks.reference import counterpart, matmul_flops
from benchmarks.report import spread
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_document, load_tokenizer
from model.weights import save_weights
from trainer.engine import make_engine
from trainer.log import flops_per_token
from trainer.loop import language_model, take_step

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py", "lora": "4-lora_sft.py", "dpo": "5-dpo_train.py"}
MEASURED = 2000  # documents whose lengths say how much theirs pad
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
          "logging_strategy": "no", "optim": "adamw_torch_fused", "learning_rate": 1e-4}  # fmt: skip


def add_flags(parser) -> None:
    parser.add_argument("--presets", nargs="+", default=["tiny", "minimind2-small"], metavar="NAME")
    parser.add_argument("--stages", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS), metavar="STAGE")
    parser.add_argument("--text", required=True, metavar="FILE.jsonl", help="rows of {'text'} for pretraining")
    parser.add_argument("--chats", required=True, metavar="FILE.jsonl", help="rows of {'conversations'}")
    parser.add_argument("--pairs", required=True, metavar="FILE.jsonl", help="rows of {'chosen', 'rejected'}")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each side (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows a step (%(default)s)")
    parser.add_argument("--seq_len", type=int, default=512, help="(%(default)s)")


class Ours:
    """A stage as its command builds it, taken a step at a time."""

    def __init__(self, stage: str, *flags):
        spec = importlib.util.spec_from_file_location(stage, ROOT / SCRIPTS[stage])
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        script.train = lambda run, rows, world, loss_fn=language_model, *_, **__: (run, rows[0], loss_fn, world)
        run, self.rows, self.loss_fn, world = script.main([str(flag) for flag in flags])
        self.engine, self.step = make_engine(run.model, run.args, world), 0

    def take(self) -> tuple[float, int]:
        """-> (CPU seconds, real tokens) of one step."""
        size = self.engine.args.batch_size
        begin = time.process_time()
        batch = self.rows.batch(range(self.step * size, (self.step + 1) * size))
        _, tokens = take_step(self.engine, [batch], self.loss_fn, 1.0, self.step)
        self.step += 1
        return time.process_time() - begin, tokens


class Seen(TrainerCallback):
    """Slots, padding included, of each batch their collator made."""

    def __init__(self):
        self.seen = []


class Alternating(Seen):
    """Times each step of transformers' trainers, and after it one of ours and a matrix product."""

    def __init__(self, ours: Ours):
        super().__init__()
        self.step_of_ours, self.theirs, self.ours, self.products, self.begin = ours.take, [], [], [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.theirs.append(time.process_time() - self.begin)
        self.ours.append(self.step_of_ours())
        self.products.append(matmul_flops())


def their_trainer(stage: str, model, tokenizer, file: str, args, folder, callback: Seen):
    """The libraries' trainer with its own collator, which tells callback.seen of each batch."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    size = {"per_device_train_batch_size": args.batch_size, "max_steps": args.steps + 1}
    with open(file, encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, (args.steps + 1) * args.batch_size)]
    if stage == "pretrain":
        collator = counted(DataCollatorForLanguageModeling(tokenizer, mlm=False), callback)
        ids = [encode_document(tokenizer, record["text"])[: args.seq_len] for record in records]
        return Trainer(
            model, TrainingArguments(folder, **COMMON, **size), train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=collator, callbacks=[callback],
        )  # fmt: skip
    import trl

    if stage == "dpo":
        data = {"prompt": [r["chosen"][:-1] for r in records], "chosen": [r["chosen"][-1:] for r in records],
                "rejected": [r["rejected"][-1:] for r in records]}  # fmt: skip
        # A batch of ours is rows that hold several pairs each, theirs is pairs: the ratio is of tokens, not of steps.
        config = trl.DPOConfig(folder, max_length=args.seq_len, precompute_ref_log_probs=True, **COMMON, **size)
        trainer = trl.DPOTrainer(model, args=config, processing_class=tokenizer,
                                 train_dataset=Dataset.from_dict(data), callbacks=[callback])  # fmt: skip
    else:
        from peft import LoraConfig

        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if stage == "lora" else None
        data = Dataset.from_dict({"messages": [record["conversations"] for record in records]})
        trainer = trl.SFTTrainer(
            model, trl.SFTConfig(folder, max_length=args.seq_len, **COMMON, **size), train_dataset=data,
            processing_class=tokenizer, peft_config=lora, callbacks=[callback],
        )  # fmt: skip
    trainer.data_collator = counted(trainer.data_collator, callback)
    return trainer


def counted(collator, callback):
    def collate(rows):
        batch = collator(rows)
        callback.seen.append(batch["attention_mask"].numel())
        return batch

    return collate


def their_real_token_share(stage: str, tokenizer, args) -> float:
    """Of their batches over the file's first MEASURED documents, cut as theirs are, in a random order."""
    lengths = []  # of each document's sequences: a pair has two
    with open(data_of(stage, args), encoding="utf-8") as lines:
        for record in map(json.loads, islice(lines, MEASURED)):
            if stage == "pretrain":
                rows = [encode_document(tokenizer, record["text"])]
            else:
                chats = [record["chosen"], record["rejected"]] if stage == "dpo" else [record["conversations"]]
                rows = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
            lengths.append([min(len(row), args.seq_len) for row in rows])
    random.Random(0).shuffle(lengths)
    real = slots = 0
    for first in range(0, len(lengths) - args.batch_size + 1, args.batch_size):
        batch = [n for document in lengths[first : first + args.batch_size] for n in document]
        real, slots = real + sum(batch), slots + max(batch) * len(batch)
    return real / slots


def our_stage(preset: str, stage: str, args, folder: Path) -> Ours:
    shape = ["--preset", preset]
    if stage != "pretrain":
        shape = ["--from_weight", folder / "chat.pth"]
        save_weights(shape[1], MiniMindForCausalLM(LMConfig.from_preset(preset)), load_tokenizer(), {})
    flags = ["--data_path", data_of(stage, args), "--seq_len", args.seq_len, "--batch_size", args.batch_size,
             "--optimizer", "adamw", "--val_split", 0, "--out_dir", folder, "--overwrite"]  # fmt: skip
    return Ours(stage, *shape, *flags)


def data_of(stage: str, args) -> str:
    return {"pretrain": args.text, "dpo": args.pairs}.get(stage, args.chats)


def compare(preset: str, stage: str, args, folder: Path) -> dict:
    """Speeds of one row of the table: medians over the steps after the first, which warms up both."""
    torch.manual_seed(0)
    config = LMConfig.from_preset(preset)
    ours = our_stage(preset, stage, args, folder)
    callback = Alternating(ours)
    file, theirs, tokenizer = data_of(stage, args), counterpart(config), load_tokenizer()
    trainer = their_trainer(stage, theirs, tokenizer, file, args, folder / "theirs", callback)
    callback.seen.clear()  # without the batches of the reference's pass
    trainer.train()
    share = their_real_token_share(stage, tokenizer, args)
    real = [share * slots / seconds for slots, seconds in list(zip(callback.seen, callback.theirs))[1:]]
    own = [tokens / seconds for seconds, tokens in callback.ours[1:]]
    learned = sum(p.numel() for p in ours.engine.module.parameters() if p.requires_grad) / config.parameter_count()
    flops = flops_per_token(config, args.seq_len, min(1.0, learned))
    return {
        "ours": spread(own), "theirs": spread(real), "ratio": spread([a / b for a, b in zip(own, real, strict=True)]),
        "our_real_token_share": ours.rows.real_token_share(),
        "their_real_token_share": share,
        "share_of_matrix_product": median(flops * a / b for a, b in zip(own, callback.products[1:], strict=True)),
    }  # fmt: skip


def peak_bytes(side: str, preset: str, stage: str, args) -> int:
    """Most memory this process has held after two steps of one side (Linux); each is measured in a process of its own.

    Not from getrusage, whose figure a child inherits from the process that started it.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if side == "ours":
            ours = our_stage(preset, stage, args, Path(name))
            for _ in range(2):
                ours.take()
        else:
            model, two = counterpart(LMConfig.from_preset(preset)), argparse.Namespace(**vars(args) | {"steps": 1})
            their_trainer(stage, model, load_tokenizer(), data_of(stage, args), two, name, Seen()).train()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def alone(function, *arguments):
    """function(*arguments) in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(args) -> dict:
    torch.set_num_threads(1)
    result = {}
    for preset in args.presets:
        for stage in args.stages:
            with tempfile.TemporaryDirectory() as folder:
                row = result[f"{preset} {stage}"] = compare(preset, stage, args, Path(folder))
            for side in ("ours", "theirs"):
                row[f"{side}_peak_bytes"] = alone(peak_bytes, side, preset, stage, args)
            ours, theirs, ratio = row["ours"]["median"], row["theirs"]["median"], row["ratio"]
            shares = row["our_real_token_share"], row["their_real_token_share"]
            memory = row["ours_peak_bytes"] / 1e9, row["theirs_peak_bytes"] / 1e9
            print(f"{preset:<16} {stage:<9} ours {ours:>8,.0f} tok/s, theirs {theirs:>8,.0f}, "
                  f"ratio {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}), "
                  f"real tokens {shares[0]:.0%} / {shares[1]:.0%}, {row['share_of_matrix_product']:.0%} of a "
                  f"matrix product, {memory[0]:.2f} / {memory[1]:.2f} GB", flush=True)  # fmt: skip
    return result
