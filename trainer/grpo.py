"""Reinforcement's loop (GRPO): sample answers, check them, make what was better than its group likelier.

A step takes `batch_size` x `accumulation_steps` x processes answers, `group` of them to each question. The answers are
sampled by a function the stage hands in; here they are judged, compared within their group, and learned from
`inner_steps` times. Which question, and with which random numbers, depends on an answer's place in the run alone: not
on the process that gives it, nor on what was asked beside it. So a run that is killed and resumed is the run that was
not, and the groups may be dealt out over processes in any way.
"""

import time
from collections import Counter
from dataclasses import dataclass

import torch

from common.errors import UserError
from data.rows import IGNORED
from trainer.announce import announce, finish_here
from trainer.checkpoint import check_recipe
from trainer.engine import Engine, make_engine
from trainer.loop import add_gradients, check_alike, end_run, move_weights, open_log
from trainer.losses import group_advantages, grpo_loss, inputs, token_log_probs, with_balance
from trainer.optimizers import learning_rate_factor
from trainer.plan import Plan, SaveTimes, StopSignals
from trainer.preference import paired_bootstrap
from trainer.prefetch import amounts, ready_for, to_device
from trainer.rewards import final_answer, is_right, reward
from trainer.tracking import new_run_id

LENGTHS = 64  # rows are a multiple of it long: few shapes for --compile, and for a GPU's kernels
CURVES = (("reward", "reward of sampled answers"), ("exact_match", "exact match, held out"))


@dataclass
class Answer:
    """One sampled answer. tokens include the one that ended it; an answer cut off by the limit is worth nothing."""

    index: int  # its place in the run
    prompt: list[int]
    tokens: list[int]
    reward: float
    well_formed: bool
    right: bool
    truncated: bool
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


def train(start, questions, held_out, reference, rollout, world) -> dict:
    """Trains start.model by GRPO, as start.args say, and returns the result that is printed as JSON.

    questions: trainer.problems.Questions; held_out: a list of Question, maybe empty. reference: the frozen model, on
    world.device; None with --kl 0. rollout(model, prompts, seeds, temperature) -> for each prompt (token ids) an object
    with token_ids, text (all that was generated before the token that ended it, special tokens too) and finish_reason
    ("stop" where the answer came to its end), sampled from softmax(logits / temperature) by a generator of that seed;
    temperature 0: the best token. Raises RunFailed (NaN, full disk); exits 130 or 143 when told to stop.
    """
    args, state = start.args, start.state
    plan = Plan(questions, args, world, state)
    whole_groups(plan, args.group)
    recipe = start.recipe((questions, held_out), plan.rows_per_step)
    check_alike(world, recipe, state)
    if state is not None:
        check_recipe(state["record"]["recipe"], recipe, start.files.state)
    elif args.resume and (result := start.files.finished_result(recipe)):
        return finish_here(result)
    if world.first:
        announce(start, plan, in_words(questions, held_out, args), world, state)
    if args.dry_run:
        return finish_here({"stage": args.stage, "dry_run": True, "steps": plan.steps})

    engine = make_engine(start.model, args, world)
    step, counters = 0, {"tokens": 0, "slots": 0, "learned": 0, "seconds": 0.0, "run_id": new_run_id(), "before": None}
    if state is not None:
        engine.load_state(state["engine"] | {"model": state["model"]}, start.files.shards)
        step, counters = state["step"], state["counters"]
        start.state = state = None
    record = start.record | {"recipe": recipe}
    log = open_log(start, world, plan, step, recipe, counters["run_id"])
    stop, saves = StopSignals(), SaveTimes(args)
    begin, loss = time.perf_counter() - counters["seconds"], counters.get("loss")
    if counters["before"] is None:
        counters["before"], validation = evaluate(engine, rollout, held_out)
        log.validation(0, **validation)
    stopping, overdue = world.sum(stop.signal, saves.overdue())
    while step < plan.steps and not stopping:
        factor = learning_rate_factor(step, plan.steps, plan.warmup, args.schedule)
        numbers, totals = take_grpo_step(engine, rollout, questions, reference, plan, factor, step)
        step += 1
        loss = numbers.get("loss", loss)
        for name, amount in totals.items():
            counters[name] += amount
        log.step(step, totals["tokens"], lr=args.learning_rate * factor, **numbers)
        stopping, overdue = world.sum(stop.signal, saves.overdue())
        if args.eval_interval and step % args.eval_interval == 0 and step < plan.steps:
            log.validation(step, **evaluate(engine, rollout, held_out)[1])
        if saves.due(step, overdue) or step == plan.steps:  # the last one before what else may fail
            counters |= {"seconds": time.perf_counter() - begin, "loss": loss}
            log.flush()
            start.files.save(engine, start.tokenizer, record, step, counters)

    finished = step == plan.steps
    gain = {}
    if finished:
        after, validation = evaluate(engine, rollout, held_out)
        log.validation(step, **validation)
        gain = what_was_gained(counters["before"], after)
    counters["seconds"] = time.perf_counter() - begin
    result = {
        "stage": args.stage, "steps": step, "tokens": counters["tokens"], "loss": loss, "val_loss": None,
        "val_bits_per_byte": None, **gain, "real_token_share": counters["tokens"] / max(counters["slots"], 1),
        "learned_token_share": counters["learned"] / max(counters["slots"], 1),
    }  # fmt: skip
    return end_run(start, engine, log, stop, record, step, counters, finished, result, curve=(CURVES, "share"))


def whole_groups(plan: Plan, group: int) -> None:
    """Sees to it that a group's answers all belong to one step."""
    if plan.rows_per_step % group:
        raise UserError(
            f"a step of {plan.rows_per_step} answers (--batch_size x --accumulation_steps x processes) is no whole "
            f"number of groups of {group}; change one of them, or --group"
        )
    plan.total_rows += -plan.total_rows % group  # where --epochs ends amid a group


def step_indices(plan: Plan, step: int) -> list[int]:
    """Places in the run of the answers that this process gives in a step."""
    return [i for micro in range(plan.accumulation_steps) for i in plan.rows(step, micro) if i >= 0]


def take_grpo_step(engine: Engine, rollout, questions, reference, plan: Plan, factor: float, step: int):
    """Answers, judged and learned from inner_steps times -> (numbers for the log, amounts of tokens of all processes:
    real ones, slots of the rows, learned ones)."""
    args, world = engine.args, engine.world
    answers = sample(engine, rollout, questions, step_indices(plan, step), args)
    numbers = Counter(compare(answers, args.group, world))
    micro_batches = deal(answers, plan.batch_size, plan.accumulation_steps, world.device)
    slots = sum(batch["labels"].numel() for batch in micro_batches)
    weight, tokens, slots = world.sum(*amounts(micro_batches), slots)
    add_log_probs(engine, micro_batches, reference, args)
    loss_fn = policy_loss(args)
    for _ in range(args.inner_steps):
        sums = add_gradients(engine, micro_batches, loss_fn, weight, tokens)
        learned, _ = move_weights(engine, sums, weight, factor, step)
        numbers.update({name: value / args.inner_steps for name, value in learned.items()})
    return numbers, {"tokens": int(tokens), "slots": int(slots), "learned": int(weight)}


# ------------------------------------------------------------------------------------------------- what was sampled
def sample(engine: Engine, rollout, questions, indices: list[int], args) -> list[Answer]:
    """This process's answers of a step, judged."""
    asked = [questions[i] for i in indices]
    seeds = [args.seed * 2**40 + i for i in indices]
    completions = roll_out(engine, rollout, [q.prompt for q in asked], seeds, args.temperature)
    answers = []
    for index, question, completion in zip(indices, asked, completions, strict=True):
        text, tokens, cut_off = complete_text(completion), completion.token_ids, completion.finish_reason != "stop"
        worth = reward(text, question.answer, args.format_reward)
        right, well_formed = is_right(text, question.answer), final_answer(text) is not None
        answers.append(Answer(index, question.prompt, tokens, worth, well_formed, right, cut_off))
    return answers


def roll_out(engine: Engine, rollout, prompts, seeds, temperature: float) -> list:
    """rollout with the model as it is now, in eval mode and the run's precision."""
    engine.module.eval()
    with engine.autocast():
        completions = rollout(engine.module, prompts, seeds, temperature)
    engine.module.train()
    return completions


def complete_text(completion) -> str:
    """What an answer says; "" for one that was cut off, which then is neither well-formed nor right."""
    return completion.text if completion.finish_reason == "stop" else ""


def compare(answers: list[Answer], group: int, world) -> dict[str, float]:
    """Sets each answer's advantage over its group, whoever sampled the rest of it -> what the step's answers were like.

    Means over the answers of all processes; learning_groups: share of the groups whose rewards differ.
    """
    own = [(a.index, a.reward, a.well_formed, a.right, a.truncated, len(a.tokens)) for a in answers]
    everyone = sorted(row for part in world.gather(own) for row in part)
    table = torch.tensor([row[1:] for row in everyone], dtype=torch.float64)  # (Q * G, 5)
    rewards = table[:, 0].view(-1, group)  # (Q, G)
    advantages = group_advantages(rewards).flatten().tolist()
    of_index = {row[0]: advantage for row, advantage in zip(everyone, advantages, strict=True)}
    for answer in answers:
        answer.advantage = of_index[answer.index]
    names = ("reward", "well_formed", "right", "truncated", "length")
    means = dict(zip(names, table.mean(dim=0).tolist(), strict=True))
    return means | {"learning_groups": (rewards != rewards[:, :1]).any(dim=1).double().mean().item()}


# ---------------------------------------------------------------------------------------------------- what is learned
def deal(answers: list[Answer], batch_size: int, micro_batches: int, device) -> list[dict[str, torch.Tensor]]:
    """A process's answers as micro-batches on its device, which stay there for all inner steps; answers of like length
    stand together, which saves padding."""
    in_order = sorted(answers, key=len)
    parts = [in_order[i * batch_size : (i + 1) * batch_size] for i in range(micro_batches)]
    return [to_device(ready_for(device, as_tensors(part), most_documents=1), device) for part in parts]


def as_tensors(answers: list[Answer]) -> dict[str, torch.Tensor]:
    """Rows of prompt and answer, padded on the right to one of few lengths; no answer at all: one empty row.

    input_ids, labels, segment_ids (B, T) as in data/rows.py, advantage (B,), count: tokens of the answers.
    """
    longest = max(map(len, answers), default=2)
    B, T = max(len(answers), 1), -(-longest // LENGTHS) * LENGTHS
    ids, segments = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)
    labels, advantage = torch.full((B, T), IGNORED), torch.zeros(B)
    for row, answer in enumerate(answers):
        end = len(answer)
        ids[row, :end] = torch.tensor(answer.prompt + answer.tokens)
        segments[row, :end] = 1
        labels[row, len(answer.prompt) : end] = ids[row, len(answer.prompt) : end]
        advantage[row] = answer.advantage
    return {
        "input_ids": ids, "labels": labels, "segment_ids": segments, "advantage": advantage,
        "count": (labels != IGNORED).sum(), "real_tokens": (segments > 0).sum(),
    }  # fmt: skip


@torch.no_grad()
def add_log_probs(engine: Engine, micro_batches, reference, args) -> None:
    """Adds to each micro-batch what does not change while it is learned from, (B, T - 1) each: "old", its tokens'
    log-probabilities under the policy that sampled them, and "reference", those under the frozen model.

    With one inner step the policy of the loss still is the one that sampled, and nothing needs to be computed twice.
    """
    models = {"old": engine.module if args.inner_steps > 1 else None, "reference": reference}
    for batch in micro_batches:
        for name, model in models.items():
            if model is not None:
                with engine.autocast():
                    batch[name] = log_probs(model, batch, args.temperature)[1]


def log_probs(model, batch, temperature: float):
    """-> (output of the forward pass, token_log_probs (B, T - 1)) at the temperature of the sampling.

    The ratios and the KL are of the distributions that were sampled from; at temperature T those are
    softmax(logits / T), since nothing else (top_k, top_p, penalties) bends them here.
    """
    out = model(**inputs(batch))
    return out, token_log_probs(out.logits, batch["labels"], temperature)


def policy_loss(args):
    """The loss function: sums over the answers' tokens."""

    def loss_fn(model, batch):
        out, policy = log_probs(model, batch, args.temperature)
        old, reference = batch.get("old", policy.detach()), batch.get("reference")
        mask = batch["labels"][:, 1:] != IGNORED
        loss, count, numbers = grpo_loss(policy, old, reference, batch["advantage"], mask, args.clip, args.kl)
        total, more = with_balance(loss, out, batch)
        return total, count, numbers | more

    return loss_fn


# ------------------------------------------------------------------------------------------------------- validation
def evaluate(engine: Engine, rollout, held_out) -> tuple[list[bool], dict]:
    """Greedy answers to the held-out questions: (right or not, one by one; shares of right and of well-formed)."""
    if not held_out:
        return [], {"exact_match": None, "well_formed": None}
    world = engine.world
    own = held_out[world.rank :: world.size]
    completions = roll_out(engine, rollout, [q.prompt for q in own], [0] * len(own), 0.0)
    texts = [complete_text(completion) for completion in completions]
    found = [(is_right(t, q.answer), final_answer(t) is not None) for t, q in zip(texts, own, strict=True)]
    parts = world.gather(found)
    right, well_formed = zip(*(parts[i % world.size][i // world.size] for i in range(len(held_out))), strict=True)
    n = len(held_out)
    return list(right), {"exact_match": sum(right) / n, "well_formed": sum(well_formed) / n}


def what_was_gained(before: list[bool], after: list[bool]) -> dict:
    """Exact match on the held-out questions before and after; the gain's 95% interval is a paired bootstrap's."""
    if not after:
        return {"exact_match_before": None, "exact_match_after": None, "exact_match_gain_interval": None}
    shares = [torch.tensor(right, dtype=torch.float64) for right in (before, after)]
    return {
        "heldout_questions": len(after), "exact_match_before": shares[0].mean().item(),
        "exact_match_after": shares[1].mean().item(),
        "exact_match_gain_interval": paired_bootstrap(*(share.numpy() for share in shares)),
    }  # fmt: skip


def in_words(questions, held_out, args) -> list[tuple[str, str]]:
    """What is asked, for the run's first lines."""
    asked = f"{len(questions.questions):,} questions, each answered {args.group} times an epoch"
    sampling = f"temperature {args.temperature:g}, at most {args.max_new_tokens} new tokens"
    checked = f"{len(held_out):,} questions" if held_out else "none: no validation figure (see --val_split)"
    return [("train", f"{asked}, {sampling}"), ("held out", checked)]
