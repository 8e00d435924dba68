"""The only training loop of the project (reinforcement has its own, in rl.py).

A step is `accumulation_steps` micro-batches on each process. Their losses are sums, divided once by the weight of the
whole step, so the gradient does not depend on how the step's rows were dealt out.
"""

import math
import sys
import time
from collections import Counter, defaultdict

import torch

from common.errors import RunFailed, UserError
from trainer import log as logs
from trainer.announce import announce, finish_here, in_words, learned_parameters, resume_command
from trainer.checkpoint import check_recipe
from trainer.engine import Engine, make_engine
from trainer.losses import learned_bytes
from trainer.optimizers import learning_rate_factor
from trainer.plan import Plan, SaveTimes, StopSignals
from trainer.prefetch import Feed, amounts, ready_for, to_device
from trainer.tracking import new_run_id, trackers

NOT_FINITE = ("the weights are as they were, and what was saved is whole. Lower --learning_rate, lengthen --warmup, or "
              "use --dtype float32")  # fmt: skip


def train(start, rows, loss_fn, world, report=None) -> dict:
    """Trains start.model on rows with loss_fn, as start.args say, and returns the result that is printed as JSON.

    rows: (training rows, validation rows or None), see data/rows.py. loss_fn(model, batch) -> (loss sum, weight it
    is to be divided by, {name: sum of another number}); "ce" among the names is the cross-entropy of the text where
    the loss is something else. report(engine) -> further figures of the trained model for the result. Raises RunFailed
    (NaN, full disk); exits 130 or 143 when told to stop.
    """
    args, train_rows, val_rows = start.args, *rows
    state = start.state
    plan = Plan(train_rows, args, world, state)
    recipe = start.recipe(rows, plan.rows_per_step)
    check_alike(world, recipe, state)
    if state is not None:
        check_recipe(state["record"]["recipe"], recipe, start.files.state)
    elif args.resume and (result := start.files.finished_result(recipe)):
        return finish_here(result)
    if world.first:
        announce(start, plan, in_words(rows), world, state)
    if args.dry_run:
        return finish_here({"stage": args.stage, "dry_run": True, "steps": plan.steps})

    engine = make_engine(start.model, args, world)
    step, counters = 0, {"tokens": 0, "seconds": 0.0, "run_id": new_run_id()}
    if state is not None:
        engine.load_state(state["engine"] | {"model": state["model"]}, start.files.shards)
        step, counters = state["step"], state["counters"]
        start.state = state = None  # the copies in it would stay in memory for the whole run
    record, shares = start.record | {"recipe": recipe}, train_rows.shares()
    log = open_log(start, world, plan, step, recipe, counters["run_id"])
    stop, saves = StopSignals(), SaveTimes(args)
    begin, loss = time.perf_counter() - counters["seconds"], counters.get("loss")
    feed = Feed(train_rows, plan, world.device)
    batches = feed.micro_batches(step)
    weight, tokens, stopping = world.sum(*amounts(batches), stop.signal)
    while step < plan.steps and not stopping:
        factor = learning_rate_factor(step, plan.steps, plan.warmup, args.schedule)
        sums = add_gradients(engine, batches, loss_fn, weight, tokens)
        batches = feed.micro_batches(step + 1)  # assembled in the meantime
        news = (*amounts(batches), stop.signal, saves.overdue())  # told here, as the processes meet once a step
        numbers, news = move_weights(engine, sums, weight, factor, step, news)
        step += 1
        counters["tokens"] += int(tokens)
        loss = numbers.get("loss", loss)
        log.step(step, int(tokens), lr=args.learning_rate * factor, **numbers)
        weight, tokens, stopping, overdue = news
        if args.eval_interval and step % args.eval_interval == 0 and step < plan.steps:
            log.validation(step, **evaluate(engine, val_rows, loss_fn, args.batch_size, start.bytes_of_token))
        if saves.due(step, overdue) or step == plan.steps:  # the last one before what else may fail
            counters |= {"seconds": time.perf_counter() - begin, "loss": loss}
            log.flush()
            start.files.save(engine, start.tokenizer, record, step, counters)
    feed.close()

    finished = step == plan.steps
    validation = {"val_loss": None, "val_bits_per_byte": None}
    if finished:
        validation = evaluate(engine, val_rows, loss_fn, args.batch_size, start.bytes_of_token)
        log.validation(step, **validation)
        validation |= report(engine) if report else {}
    counters["seconds"] = time.perf_counter() - begin
    result = {
        "stage": args.stage, "steps": step, "tokens": counters["tokens"], "loss": loss, **validation,
        **shares,
    }  # fmt: skip
    return end_run(start, engine, log, stop, record, step, counters, finished, result)


def end_run(start, engine, log, stop, record: dict, step: int, counters: dict, finished: bool, result: dict, curve=()):
    """Writes the weights or, where the run was told to stop, its state, and returns the result that is printed.

    curve: Log.draw_curve's arguments. Exits 130 or 143 where the run was told to stop.
    """
    world = engine.world
    result |= {
        "seconds": counters["seconds"], "tokens_per_second": counters["tokens"] / max(counters["seconds"], 1e-9),
        "peak_memory_bytes": max(world.gather(logs.peak_memory(world.device))), "weights": str(start.files.weights),
    }  # fmt: skip
    log.flush()
    if finished:
        start.files.finish(engine, start.tokenizer, record | {"result": result})
    else:
        result["stopped"] = True
        start.files.save(engine, start.tokenizer, record, step, counters)
    log.draw_curve(*curve)
    log.close()  # last: a service may wait for its network, and all is saved by now
    stop.restore()
    if world.first and not finished:
        print(f"stopped at step {step}; to go on: {resume_command()}")
    finish_here(result)
    if not finished:
        sys.exit(128 + max(world.gather(stop.signal)))
    return result


def open_log(start, world, plan, step: int, recipe: dict, run_id: str) -> logs.Log:
    """The run's log, with the services the flags name attached."""
    total = start.model.config.parameter_count()
    flops = logs.flops_per_token(start.model.config, start.args.seq_len, min(1.0, learned_parameters(start) / total))
    services = world.on_first(lambda: trackers(start.args, start.files, recipe, run_id, step)) or ()
    return logs.Log(start.files, world, plan.steps, flops, start.args.log_interval, step, services)


def take_step(engine: Engine, micro_batches, loss_fn, factor: float, step: int) -> tuple[dict, int]:
    """One step of the optimizer over this process's micro-batches -> (numbers for the log, real tokens of all)."""
    weight, tokens = engine.world.sum(*amounts(micro_batches))
    sums = add_gradients(engine, micro_batches, loss_fn, weight, tokens)
    numbers, _ = move_weights(engine, sums, weight, factor, step)
    return numbers, int(tokens)


def add_gradients(engine: Engine, micro_batches, loss_fn, weight: float, tokens: float) -> dict[str, torch.Tensor]:
    """Forward and backward of this process's micro-batches -> sums of their numbers, left on the device.

    weight, tokens: of the whole step, over all processes. "counted": the weight that loss_fn found. Nothing in here
    waits for a GPU, so the next work is queued before the last is done.
    """
    sums: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micro_batches if weight else ()):
        with engine.micro_batch(last=i == len(micro_batches) - 1):
            # What a mean over this micro-batch's real tokens is multiplied by to become, after the division by the
            # step's weight, its part of the mean over the step's real tokens.
            aux_scale = int(batch["real_tokens"]) * weight / max(tokens, 1)
            batch = to_device(batch, engine.world.device) | {"aux_scale": aux_scale}
            with engine.autocast():
                loss, count, extra = loss_fn(engine.model, batch)
            engine.backward(loss / weight)
        for name, value in {"counted": count, "loss": loss.detach(), **extra}.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def move_weights(engine: Engine, sums: dict, weight: float, factor: float, step: int, news=()):
    """The optimizer's step, unless loss or gradient is not finite -> (numbers for the log, news).

    sums: what add_gradients returned. news: numbers of this process; returned as their sums over all processes, which
    meet here and nowhere else in a step. RunFailed before a gradient that is not finite reaches the weights, but for
    float16's, which is a sign to the scaler and passed over.
    """
    world = engine.world
    if weight == 0:
        if world.first:
            print(f"warning: step {step + 1} has nothing to learn and is passed over", file=sys.stderr)
        return {}, world.sum(*news)
    norm = engine.gradient_norm()
    mine = norm if world.first else norm * 0  # the same on all processes
    counted, *totals = world.sum(*sums.values(), mine, *news)
    if counted != weight:
        raise RuntimeError(f"the loss counted {counted:.0f} targets, the rows {weight:.0f}")
    names = [name for name in sums if name != "counted"]
    numbers = {name: total / weight for name, total in zip(names, totals, strict=False)}
    norm, *news = totals[len(names) :]
    if not math.isfinite(numbers["loss"]):
        raise RunFailed(f"the loss is {numbers['loss']} at step {step + 1}; {NOT_FINITE}")
    if math.isfinite(norm):
        norm = engine.step(factor, norm)
    else:
        engine.pass_over()
    if not math.isfinite(norm) and not engine.forgives():
        raise RunFailed(f"the gradient's norm is {norm} at step {step + 1}; {NOT_FINITE}")
    return numbers | {"grad_norm": norm} | engine.numbers(), news


@torch.no_grad()
def evaluate(engine: Engine, rows, loss_fn, batch_size: int, bytes_of_token) -> dict:
    """Loss over the validation rows of all processes, bits per byte of their text, and the loss function's own
    numbers; None where there are no rows."""
    if rows is None:
        return {"val_loss": None, "val_bits_per_byte": None}
    world = engine.world
    engine.module.eval()
    table = bytes_of_token.to(world.device) if bytes_of_token is not None else None
    parts = defaultdict(list)  # of each number; tensors that nobody has waited for
    for indices in world.shares(len(rows), batch_size):
        batch = to_device(ready_for(world.device, rows.batch(indices), rows.most_documents), world.device)
        with engine.autocast():
            loss, weight, numbers = loss_fn(engine.module, batch)
        for name, value in {"weight": weight, "loss": loss, **numbers}.items():
            parts[name].append(value)
        if table is not None:
            parts["bytes"].append(learned_bytes(batch["labels"], table))
    engine.module.train()
    sums = Counter({name: torch.stack(values).cpu().double().sum().item() for name, values in parts.items()})
    total = Counter()
    for part in world.gather(sums):
        total.update(part)
    weight, n_bytes = total.pop("weight", 0), total.pop("bytes", 0)
    if not weight:
        return {"val_loss": None, "val_bits_per_byte": None}
    nats = total.get("ce", total["loss"])
    return {
        "val_loss": total.pop("loss") / weight,
        "val_bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None,
        **{f"val_{name}": value / weight for name, value in total.items()},
    }


def check_alike(world, recipe: dict, state: dict | None) -> None:
    """Raises UserError where the processes would not begin one run: each machine has its own command line and disk."""
    starts = world.gather(recipe | {"saved step": None if state is None else state["step"]})
    differ = sorted(key for key in starts[0] if any(start[key] != starts[0][key] for start in starts))
    if differ:
        raise UserError(
            f"the processes differ in {', '.join(differ)}; give every machine the same command and data, and an "
            "--out_dir on a disk that all of them share"
        )
