"""What a run prints before it starts, and the command that resumes it."""

import json
import os
import shlex
import sys

import torch

from common.flags import BOOLEANS
from model.expert_loop import experts_kind
from model.weights_file import describe
from trainer.duration import time_line
from trainer.engine import by_deepspeed_launcher, engine_in_words
from trainer.memory import memory_line
from trainer.plan import Plan


def announce(run, plan: Plan, rows: list[tuple[str, str]], world) -> None:
    """Prints the settings of the run, before its first step. rows: (name, text) of the lines about the data."""
    args, config = run.args, run.model.config
    total, active = config.parameter_count(), config.active_parameter_count()
    learned = learned_parameters(run)
    print(
        f"{args.stage}: {describe(config)}; {total:,} parameters"
        + (f", {active:,} active" if active != total else "")
        + (f", {learned:,} trained" if learned != total else "")
    )
    print(f"  weights   {run.came_from}")
    print(f"  data      {', '.join(map(str, run.data_files))}")
    for what, text in rows:
        print(f"  {what:<9} {text}")
    print(f"  steps     {plan.steps:,} of {plan.global_batch_size} rows "
          f"({plan.global_batch_size * args.seq_len:,} tokens): "
          f"{plan.batch_size} x {plan.accumulation_steps} x {world.size} process(es)")  # fmt: skip
    print(f"  optimizer {args.optimizer}, rate {args.learning_rate:g}, {args.schedule}, warmup {plan.warmup} steps, "
          f"decay {args.weight_decay:g}, clip {args.grad_clip:g}, seed {args.seed}")  # fmt: skip
    print(f"  machine   {world.device}, {str(world.dtype).removeprefix('torch.')}, {torch.get_num_threads()} thread(s)")
    print(f"  engine    {engine_in_words(args, world)}")
    if config.use_moe:
        shape = (config.n_routed_experts, 2 * config.moe_hidden_dim, config.dim)
        print(f"  experts   {experts_kind(world.device, world.dtype, shape)}")
    print(f"  memory    {memory_line(config, args, world, plan.batch_size, learned, run.other_parameters)}")
    steps = plan.steps - (run.state["step"] if run.state is not None else 0)
    tokens = steps * plan.global_batch_size * args.seq_len
    print(f"  time      {time_line(config, args, world, tokens, min(1.0, learned / total), run.other_parameters)}")
    print(f"  output    {run.files.weights}")
    if run.state is not None:
        print(f"  resumed   at step {run.state['step']}")
    elif args.resume:
        print("  resumed   nothing: there is no saved state yet, starting at step 0")
    print(f"  to resume {resume_command()}", flush=True)


def in_words(rows) -> list[tuple[str, str]]:
    """The rows (training, validation or None) in words, for `announce`."""
    texts = [
        f"{len(part):,} rows of {part.seq_len} tokens, {part.real_token_share():.1%} of them real{part.what_was_cut()}"
        if part is not None
        else "none: no validation figure (see --val_split)"
        for part in rows
    ]
    return list(zip(("train", "held out"), texts, strict=True))


def learned_parameters(run) -> int:
    return sum(p.numel() for p in run.model.parameters() if p.requires_grad)


def resume_command() -> str:
    """The command that started this process, with --resume. With several machines only the launcher's name is shown,
    since each machine has a command of its own."""
    words = without_flags(sys.argv, ("--resume", "--overwrite", "--local_rank"))
    # The launcher is known by the environment variables that it sets.
    launcher, size = "python", os.environ.get("WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc_per_node {size}" if size == os.environ["LOCAL_WORLD_SIZE"] else "torchrun ..."
    elif by_deepspeed_launcher():
        launcher = f"deepspeed --num_gpus {size}" if size == os.environ["LOCAL_SIZE"] else "deepspeed ..."
    return f"{launcher} {shlex.join(words)} --resume"


def without_flags(words: list[str], flags) -> list[str]:
    """The words of a command without these flags, which may be written --flag, --flag 0 or --flag=0."""
    kept, value_may_follow = [], False
    for word in words:
        name, _, value = word.partition("=")
        # A word such as "1" after a removed flag is the flag's value, and is removed too.
        if name not in flags and not (value_may_follow and word.lower() in BOOLEANS):
            kept.append(word)
        value_may_follow = name in flags and not value
    return kept


def finish_here(result: dict) -> dict:
    """Prints the result, the last line of the program, on the first process; returns it."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result), flush=True)
    return result
