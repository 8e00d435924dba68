"""The training loop. Every stage calls train(); GRPO (grpo.py) has steps of its own and shares the Session.

A step is `accumulation_steps` micro-batches on each process. Their losses are sums, divided once by the count of the
whole step (its learned tokens, or its pairs), so the gradient does not depend on how the step's rows are split into
micro-batches and over processes.
"""

import math
import sys
import time
from collections import Counter, defaultdict

import torch

from common.errors import RunFailed, UserError
from data.rows import IGNORED, token_bytes
from trainer import log as logs
from trainer.announce import announce, finish_here, in_words, learned_parameters, resume_command
from trainer.checkpoint import check_recipe
from trainer.engine import TrainingEngine, make_engine
from trainer.losses import learned_bytes
from trainer.optimizers import learning_rate_factor
from trainer.plan import Plan, SaveTimes, StopSignals
from trainer.prefetch import Feed, amounts, ready_for, to_device
from trainer.run_note import begin_note, with_its_end_noted
from trainer.samples import Samples
from trainer.tracking import new_run_id, trackers

NOT_FINITE = ("the weights are as they were, and what was saved is whole. Lower --learning_rate, lengthen --warmup, or "
              "use --dtype float32")  # fmt: skip
NO_VALIDATION = {"val_loss": None, "val_bits_per_byte": None}


# ------------------------------------------------------------------------------------------------ the default loss
def inputs(batch: dict) -> dict:
    """The tensors of a batch that the model takes as arguments."""
    return {name: batch[name] for name in ("input_ids", "segment_ids", "document_ends") if name in batch}


def learned_targets(labels: torch.Tensor) -> torch.Tensor:
    """The number of learned targets in labels (B, T). A row's first token is none: no token before it predicts it."""
    return (labels[:, 1:] != IGNORED).sum()


def language_model(model, batch: dict):
    """The loss of pretraining and of SFT: the cross-entropy of each learned token, given the tokens before it."""
    out = model(**inputs(batch), labels=batch["labels"], reduction="none")  # out.loss: (B, T - 1), in nats
    return out.loss.sum(), learned_targets(batch["labels"]), {}, out.aux_loss


# --------------------------------------------------------------------------------------------------------- training
@with_its_end_noted
def train(run, rows, world, loss_fn=language_model, report=None, bits_per_byte=True, write=None) -> dict:
    """Trains run.model on rows with loss_fn and returns the result that is printed as JSON.

    rows: (training rows, validation rows or None), see data/rows.py.
    loss_fn(model, batch) -> (sum of losses, count to divide it by, {name: sum of another number}, the experts' balance
    loss or None). Two names are special: "loss" is printed in place of the sum that is minimised; "ce" is the
    cross-entropy of the text, from which bits per byte are computed where the loss is something else.
    report(engine) -> more figures of the trained model for the result.
    bits_per_byte: whether validation computes them. write: see samples.Samples.
    Raises RunFailed (NaN, full disk); exits 130 or 143 when stopped.
    """
    train_rows, val_rows = rows
    plan = Plan(run, train_rows, world)
    recipe = run.recipe(train_rows, plan.global_batch_size)
    if result := result_without_training(run, plan, recipe, in_words(rows), world):
        return result
    run = run.teaching(train_rows)
    bytes_of_token = token_bytes(run.tokenizer) if bits_per_byte else None

    def validate(engine) -> dict:
        return evaluate(engine, val_rows, loss_fn, run.batch_size, bytes_of_token)

    session = Session(run, plan, recipe, world, validate, write)  # of a resumed run it loads the state
    engine, feed = session.engine, Feed(train_rows, plan, world.device)
    batches = feed.micro_batches(session.step)
    # How much the step holds, over all processes, is needed before its first backward: each loss is divided by it.
    count, tokens = world.sum(*amounts(batches))
    for step in session.steps():
        sums = add_gradients(engine, batches, loss_fn, count, tokens)
        # add_gradients has only queued its work, a GPU is still computing: meanwhile the next batches are fetched.
        batches = feed.micro_batches(step + 1)
        # Processes exchange numbers once a step, inside move_weights. Sent along with the loss and the gradient's norm:
        # how much the next step holds, and whether a process got a signal to stop or is due to save.
        news = (*amounts(batches), *session.news())
        numbers, (next_count, next_tokens, *told) = move_weights(engine, sums, count, session.rate_factor, step, news)
        session.end_step(numbers, {"tokens": tokens}, *told)
        count, tokens = next_count, next_tokens
    feed.close()

    validation = NO_VALIDATION
    if session.finished:
        validation = session.validation()
        validation |= report(engine) if report else {}
    return session.close(validation | train_rows.shares())


def add_gradients(engine: TrainingEngine, micro_batches, loss_fn, count: float, tokens: float) -> dict:
    """Forward and backward of this process's micro-batches -> {name: sum over them}, tensors on the device.

    count, tokens: of the whole step, over all processes. Among the sums "counted" is the count that loss_fn found.
    Nothing here reads a number from the GPU, so the CPU runs ahead and the GPU always has work queued.
    """
    sums: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micro_batches if count else ()):
        with engine.micro_batch(last=i == len(micro_batches) - 1):
            with engine.world.autocast():
                loss, counted, numbers, balance = loss_fn(engine.model, to_device(batch, engine.world.device))
            found = {"counted": counted, "loss": loss.detach()}
            if balance is not None:
                # The balance loss is a mean over this micro-batch's real tokens. Times real_tokens / tokens it is its
                # part of the mean over the step. It is multiplied by the count because all is divided by that below.
                balance = balance * (int(batch["real_tokens"]) * count / max(tokens, 1))
                loss, found["balance"] = loss + balance, balance.detach()
            engine.backward(loss / count)
        for name, value in (found | numbers).items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def move_weights(engine: TrainingEngine, sums: dict, count: float, factor: float, step: int, news=()):
    """The optimizer's step, unless loss or gradient is not finite -> (numbers for the log, news).

    sums: what add_gradients returned. factor: share of the peak learning rate. news: numbers of this process, returned
    summed over all processes. This is the only place in a step where processes wait for each other.
    Raises RunFailed before a gradient that is not finite reaches the weights. With float16 the step is skipped instead:
    the overflow tells the scaler to scale the loss less.
    """
    world = engine.world
    if count == 0:
        if world.first:
            print(f"warning: step {step + 1} has nothing to learn and is passed over", file=sys.stderr)
        return {}, world.sum(*news)
    norm = engine.gradient_norm()
    norm = norm if world.first else norm * 0  # all processes have the same norm: in the sum it must count once
    # One exchange and one wait for the GPU, for all numbers together.
    *totals, norm = world.sum(*sums.values(), *news, norm)
    news = totals[len(sums) :]
    numbers = dict(zip(sums, totals, strict=False))
    # The gradient was divided by the rows' count: if the loss counts otherwise, it is wrong by that factor.
    if (counted := numbers.pop("counted")) != count:
        raise RuntimeError(f"the loss counted {counted:.0f} targets, the rows {count:.0f}")
    numbers = {name: total / count for name, total in numbers.items()}
    if not math.isfinite(numbers["loss"]):
        raise RunFailed(f"the loss is {numbers['loss']} at step {step + 1}; {NOT_FINITE}")
    if math.isfinite(norm):
        norm = engine.step(factor, norm)
    else:
        engine.pass_over()
    if not math.isfinite(norm) and not engine.forgives():
        raise RunFailed(f"the gradient's norm is {norm} at step {step + 1}; {NOT_FINITE}")
    return numbers | {"grad_norm": norm} | engine.numbers(), news


def take_step(engine: TrainingEngine, micro_batches, loss_fn, factor: float, step: int) -> tuple[dict, int]:
    """One whole step, for programs that measure one -> (numbers for the log, real tokens of all processes)."""
    count, tokens = engine.world.sum(*amounts(micro_batches))
    sums = add_gradients(engine, micro_batches, loss_fn, count, tokens)
    numbers, _ = move_weights(engine, sums, count, factor, step)
    return numbers, int(tokens)


@torch.no_grad()
def evaluate(engine: TrainingEngine, rows, loss_fn, batch_size: int, bytes_of_token) -> dict:
    """Loss over the validation rows of all processes, bits per byte of their text, and the loss function's own
    numbers; None where there are no rows. bytes_of_token: see data.rows.token_bytes; None: no bits per byte."""
    if rows is None:
        return dict(NO_VALIDATION)
    world = engine.world
    engine.module.eval()
    table = bytes_of_token.to(world.device) if bytes_of_token is not None else None
    parts = defaultdict(list)  # name -> a tensor for each batch; they stay on the device until the end
    for indices in world.shares(len(rows), batch_size):
        batch = to_device(ready_for(world.device, rows.batch(indices), rows.most_documents), world.device)
        with engine.world.autocast():
            loss, count, numbers, _ = loss_fn(engine.module, batch)
        for name, value in {"count": count, "loss": loss, **numbers}.items():
            parts[name].append(value)
        if table is not None:
            parts["bytes"].append(learned_bytes(batch["labels"], table))
    engine.module.train()
    # The only wait for the GPU: all batches have been queued by now.
    sums = Counter({name: torch.stack(values).cpu().double().sum().item() for name, values in parts.items()})
    total = Counter()
    for part in world.gather(sums):
        total.update(part)
    count, n_bytes = total.pop("count", 0), total.pop("bytes", 0)
    if not count:
        return dict(NO_VALIDATION)
    nats = total.get("ce", total["loss"])
    return {
        "val_loss": total.pop("loss") / count,
        "val_bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None,
        **{f"val_{name}": value / count for name, value in total.items()},
    }


# --------------------------------------------------------------------------------------------------- around the steps
def result_without_training(run, plan: Plan, recipe: dict, words, world) -> dict | None:
    """The result of a run that is finished already, or of --dry_run; None where there are steps to take.

    Prints what the run is about to do. words: its data in words, see announce.
    """
    check_alike(world, recipe, run.state)
    if run.state is not None:
        check_recipe(run.state["record"]["recipe"], recipe, run.files.state)
    elif run.args.resume and (result := run.files.finished_result(recipe)):
        return finish_here(result)
    if world.first:
        announce(run, plan, words, world)
    if run.args.dry_run:
        return finish_here({"stage": run.args.stage, "dry_run": True, "steps": plan.steps})
    return None


def check_alike(world, recipe: dict, state: dict | None) -> None:
    """Raises UserError where the processes have different recipes or saved steps: each machine has its own command
    line and may have its own disk, and processes that disagree would hang or average unrelated gradients."""
    starts = world.gather(recipe | {"saved step": None if state is None else state["step"]})
    differ = sorted(key for key in starts[0] if any(start[key] != starts[0][key] for start in starts))
    if differ:
        raise UserError(
            f"the processes differ in {', '.join(differ)}; give every machine the same command and data, and an "
            "--out_dir on a disk that all of them share"
        )


class Session:
    """Everything a run does besides learning: resume, log, validate, save, stop.

        for step in session.steps():
            ...                                            # learn, at session.rate_factor of the peak learning rate
            session.end_step(numbers, amounts, *world.sum(*session.news()))
        result = session.close(figures)

    validate(engine) -> numbers of a validation. write: see samples.Samples. counters: more amounts to sum over the
    steps, with their start values; they are part of the saved state.
    """

    def __init__(self, run, plan: Plan, recipe: dict, world, validate, write=None, **counters):
        self.run, self.plan, self.world, self.validate = run, plan, world, validate
        self.engine = make_engine(run.model, run.args, world)
        self.step, self.counters = 0, {"tokens": 0, "seconds": 0.0, "loss": None, "run_id": new_run_id()} | counters
        if (state := run.state) is not None:
            # pop: left in run.state, the saved tensors would take memory for the whole run.
            self.engine.load_state(state.pop("engine") | {"model": state.pop("model")}, run.files.shards)
            self.step, self.counters = state["step"], self.counters | state["counters"]
        self.record = run.record | {"recipe": recipe}
        self.log = self._open_log(recipe)
        self.samples = Samples(run, world, write, self.step, plan.steps)
        # From here on Ctrl-C ends the run after its step; before, it ends the program at once.
        self.stop, self.saves = StopSignals(), SaveTimes(run.args)
        self.begin = time.perf_counter() - self.counters["seconds"]
        begin_note(self)

    def _open_log(self, recipe: dict) -> logs.Log:
        """The run's log, which also sends its numbers to the services that the flags name."""
        run, config = self.run, self.run.model.config
        flops = logs.flops_per_token(
            config, run.args.seq_len, min(1.0, learned_parameters(run) / config.parameter_count())
        )
        run_id = self.counters["run_id"]
        # The first process alone sends. A wrong project name is the user's error, so it is raised on all processes.
        services = self.world.on_first(lambda: trackers(run.args, run.files, recipe, run_id, self.step)) or ()
        return logs.Log(run.files, self.world, self.plan.steps, flops, run.args.log_interval, self.step, services)

    @property
    def finished(self) -> bool:
        return self.step == self.plan.steps

    def steps(self):
        """The number of each step to take, counted from 0, until the plan's end or a signal to stop."""
        # Summed: a signal may have reached one process only, and all must leave the loop at the same step.
        (self.stopping,) = self.world.sum(self.stop.signal)
        while not self.finished and not self.stopping:
            self.rate_factor = learning_rate_factor(
                self.step, self.plan.steps, self.plan.warmup, self.run.args.schedule
            )
            yield self.step

    def news(self) -> tuple[int, bool]:
        """Numbers that all processes need the sums of, once a step: signal to stop (0: none), whether a save is due."""
        return self.stop.signal, self.saves.overdue()

    def end_step(self, numbers: dict, amounts: dict[str, float], stopping: float, overdue: float) -> None:
        """Logs a finished step, then validates and saves if it is time.

        numbers: for the log. amounts: what the step adds to the counters. stopping, overdue: the sums of `news` over
        all processes.
        """
        self.step += 1
        self.stopping = stopping
        self.counters["loss"] = numbers.get("loss", self.counters["loss"])
        for name, amount in amounts.items():
            self.counters[name] += int(amount)
        rate, seconds = self.run.args.learning_rate * self.rate_factor, round(time.perf_counter() - self.begin, 3)
        self.log.step(self.step, int(amounts["tokens"]), seconds=seconds, lr=rate, **numbers)
        every = self.run.args.eval_interval
        if every and self.step % every == 0 and not self.finished:
            self.validation()
        # The last step is saved here, before the last validation and everything else at the end that may fail.
        if self.saves.due(self.step, overdue) or self.finished:
            self._save()

    def validation(self) -> dict:
        """Validates, has the model write its samples, and logs the numbers."""
        numbers = self.validate(self.engine)
        self.samples.take(self.engine, self.step)
        self.log.validation(self.step, **numbers)
        return numbers

    def _save(self) -> None:
        self.counters["seconds"] = time.perf_counter() - self.begin
        self.log.flush()  # first: after a power cut the log must hold every step that the state holds
        self.run.files.save(self.engine, self.run.tokenizer, self.record, self.step, self.counters)

    def close(self, figures: dict, curve=()) -> dict:
        """Writes the weights or, where the run was told to stop, its state -> the result, which is printed.

        figures: what the stage adds to the result. curve: arguments of Log.draw_curve. Exits 130 or 143 where the run
        was stopped by a signal.
        """
        run, world, counters = self.run, self.world, self.counters
        counters["seconds"] = time.perf_counter() - self.begin
        result = {
            "stage": run.args.stage, "steps": self.step, "tokens": counters["tokens"], "loss": counters["loss"],
            **figures,
            "seconds": counters["seconds"], "tokens_per_second": counters["tokens"] / max(counters["seconds"], 1e-9),
            "peak_memory_bytes": max(world.gather(logs.peak_memory(world.device))), "weights": str(run.files.weights),
        }  # fmt: skip
        if self.finished:
            self.log.flush()
            run.files.finish(self.engine, run.tokenizer, self.record | {"result": result})
        else:
            result["stopped"] = True
            self._save()
        self.log.draw_curve(*curve)
        self.log.close()  # last: a service may wait long for its network, and everything is saved by now
        self.stop.restore()
        if world.first and not self.finished:
            print(f"stopped at step {self.step}; to go on: {resume_command()}")
        finish_here(result)
        if not self.finished:
            sys.exit(128 + max(world.gather(self.stop.signal)))
        return result
