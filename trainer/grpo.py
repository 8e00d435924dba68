"""Reinforcement learning (GRPO): sample answers, check them, raise the probability of those better than their group.

A step takes `batch_size` x `accumulation_steps` x processes answers, `group` of them to each question. The stage's
rollout samples them; here they are judged, compared in their group, and learned from `inner_steps` times. An answer's
question and random seed depend only on its index in the run, not on the process that samples it or on the rest of the
batch. So a run that is killed and resumed equals one that was not, and answers may be split over processes in any way.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from common.errors import UserError
from data.rows import IGNORED
from trainer.engine import TrainingEngine
from trainer.loop import NO_VALIDATION, Session, add_gradients, inputs, move_weights, result_without_training
from trainer.losses import group_advantages, grpo_loss, token_log_probs
from trainer.plan import Plan
from trainer.preference import paired_bootstrap
from trainer.prefetch import amounts, ready_for, to_device
from trainer.rewards import answer_block, exact_match, reward
from trainer.run_note import with_its_end_noted

LENGTHS = 64  # row lengths are multiples of it: few different shapes for --compile and for a GPU's kernels
CURVES = (("reward", "reward of sampled answers"), ("exact_match", "exact match, held out"))


@dataclass
class SampledAnswer:
    """One sampled answer. tokens include the end token; an answer cut off by the length limit has reward 0."""

    index: int  # counted over the whole run
    prompt: list[int]
    tokens: list[int]
    reward: float
    well_formed: bool
    right: bool
    truncated: bool
    advantage: float = 0.0
    text: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


@with_its_end_noted
def train(run, problems, held_out, reference, rollout, world, write=None) -> dict:
    """Trains run.model by GRPO and returns the result that is printed as JSON.

    problems: trainer.problems.Problems; held_out: a list of Problem, maybe empty. reference: the frozen model, on
    world.device; None with --kl 0.
    rollout(model, prompts, seeds, temperature) -> for each prompt (token ids) an object with token_ids, text (all that
    was generated before the end token, special tokens too) and finish_reason ("stop" where there was an end token).
    Tokens are sampled from softmax(logits / temperature) with a generator of that seed; temperature 0: the best token.
    write: see samples.Samples. Raises RunFailed (NaN, full disk); exits 130 or 143 when stopped.
    """
    args = run.args
    plan = Plan(run, problems, world, args.group)
    if plan.global_batch_size % args.group:
        raise UserError(
            f"a step of {plan.global_batch_size} answers (--batch_size x --accumulation_steps x processes) is no whole "
            f"number of groups of {args.group}; change one of them, or --group"
        )
    recipe = run.recipe(problems, plan.global_batch_size)
    if result := result_without_training(run, plan, recipe, in_words(problems, held_out, args), world):
        return result

    def validate(engine) -> dict:
        return evaluate(engine, rollout, held_out)[1]

    session = Session(run, plan, recipe, world, validate, write, slots=0, learned=0, before=None)
    engine, counters = session.engine, session.counters
    # Which questions were right before training is needed at the end, for the gain: it is part of the saved state.
    if counters["before"] is None:
        counters["before"], validation = evaluate(engine, rollout, held_out)
        session.samples.take(engine, 0)
        session.log.validation(0, **validation)
    for step in session.steps():
        answers, numbers, amounts = take_grpo_step(
            engine, rollout, problems, reference, plan, session.rate_factor, step
        )
        if is_shown(step + 1, plan.steps, args.eval_interval):
            session.samples.add(step + 1, example_rows(answers, problems, world))
        session.end_step(numbers, amounts, *world.sum(*session.news()))

    gain = {}
    if session.finished:
        after, validation = evaluate(engine, rollout, held_out)
        session.samples.take(engine, session.step)
        session.log.validation(session.step, **validation)
        gain = what_was_gained(counters["before"], after)
    shares = {f"{name}_token_share": counters[counter] / max(counters["slots"], 1)
              for name, counter in (("real", "tokens"), ("learned", "learned"))}  # fmt: skip
    return session.close(NO_VALIDATION | gain | shares, curve=(CURVES, "share"))


def step_indices(plan: Plan, step: int) -> list[int]:
    """Indices of the answers that this process samples in a step."""
    return [i for micro in range(plan.accumulation_steps) for i in plan.rows(step, micro) if i >= 0]


def take_grpo_step(engine: TrainingEngine, rollout, problems, reference, plan: Plan, factor: float, step: int):
    """Samples answers, judges them, and learns from them inner_steps times.

    -> (this process's answers; numbers for the log; over all processes, how many real tokens, row slots and learned
    tokens there were).
    """
    args, world = engine.args, engine.world
    answers = sample(engine, rollout, problems, step_indices(plan, step), args)
    numbers = Counter(compare(answers, args.group, world))
    micro_batches = deal(answers, plan.batch_size, plan.accumulation_steps, world.device)
    slots = sum(batch["labels"].numel() for batch in micro_batches)  # tokens and padding
    count, tokens, slots = world.sum(*amounts(micro_batches), slots)
    add_log_probs(engine, micro_batches, reference, args)
    loss_fn = policy_loss(args)
    # At the first update the policy is the one that sampled, and all ratios are 1. From the second on it has moved, and
    # the clip bounds how far it may move on the same answers. The printed numbers are means over the updates.
    for _ in range(args.inner_steps):
        sums = add_gradients(engine, micro_batches, loss_fn, count, tokens)
        learned, _ = move_weights(engine, sums, count, factor, step)
        numbers.update({name: value / args.inner_steps for name, value in learned.items()})
    return answers, numbers, {"tokens": int(tokens), "slots": int(slots), "learned": int(count)}


# ------------------------------------------------------------------------------------------------- what was sampled
def sample(engine: TrainingEngine, rollout, problems, indices: list[int], args) -> list[SampledAnswer]:
    """Samples and judges this process's answers of a step."""
    asked = [problems[i] for i in indices]
    # A seed for each index: the same answer whichever process samples it, and in whatever batch.
    seeds = [args.seed * 2**40 + i for i in indices]
    completions = roll_out(engine, rollout, [q.prompt for q in asked], seeds, args.temperature)
    answers = []
    for index, problem, completion in zip(indices, asked, completions, strict=True):
        text, tokens, cut_off = complete_text(completion), completion.token_ids, completion.finish_reason != "stop"
        worth = reward(text, problem.answer, args.format_reward)
        right, well_formed = exact_match(text, problem.answer), answer_block(text) is not None
        answers.append(SampledAnswer(index, problem.prompt, tokens, worth, well_formed, right, cut_off,
                                     text=completion.text))  # fmt: skip
    return answers


def is_shown(step: int, steps: int, every: int) -> bool:
    """Whether a step's answers are written for a reader: the first's, and those of steps that validate. Not the last's:
    what a saved run has written of its last step is written again when it is resumed, and these were not."""
    return step < steps and (step == 1 or bool(every) and step % every == 0)


def example_rows(answers: list[SampledAnswer], problems, world) -> list[dict]:
    """A step's first question with all answers of its group. All processes must call it: the group may be spread."""
    everyone = sorted(row for part in world.gather([(a.index, a.text, a.reward) for a in answers]) for row in part)
    asked = problems[everyone[0][0]]
    return [{"prompt": asked.question, "text": text, "reward": round(worth, 4), "answer": asked.answer}
            for _, text, worth in everyone[: problems.group]]  # fmt: skip


def roll_out(engine: TrainingEngine, rollout, prompts, seeds, temperature: float) -> list:
    """rollout with the model as it is now, in eval mode and the run's precision."""
    engine.module.eval()
    with engine.world.autocast():
        completions = rollout(engine.module, prompts, seeds, temperature)
    engine.module.train()
    return completions


def complete_text(completion) -> str:
    """The text of an answer; "" for one that was cut off, which is then neither well-formed nor right."""
    return completion.text if completion.finish_reason == "stop" else ""


def compare(answers: list[SampledAnswer], group: int, world) -> dict[str, float]:
    """Sets each answer's advantage over its group -> {name: mean over the answers of all processes}.

    learning_groups: share of the groups whose rewards differ; from the others nothing is learned.
    """
    # The answers of a group may be on several processes, so each process gets all rewards.
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
def deal(answers: list[SampledAnswer], batch_size: int, micro_batches: int, device) -> list[dict[str, torch.Tensor]]:
    """A process's answers as micro-batches on its device, where they stay for all inner steps. Answers are sorted by
    length, so that a micro-batch needs little padding."""
    in_order = sorted(answers, key=len)
    # Every process needs the same number of micro-batches, even empty ones: with a different number the exchange of
    # gradients would hang.
    parts = [in_order[i * batch_size : (i + 1) * batch_size] for i in range(micro_batches)]
    return [to_device(ready_for(device, as_tensors(part), most_documents=1), device) for part in parts]


def as_tensors(answers: list[SampledAnswer]) -> dict[str, torch.Tensor]:
    """Rows of prompt and answer, padded on the right to a multiple of LENGTHS; without any answer one empty row.

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
        # The prompt is given, only the answer's tokens are learned.
        labels[row, len(answer.prompt) : end] = ids[row, len(answer.prompt) : end]
        advantage[row] = answer.advantage
    return {
        "input_ids": ids, "labels": labels, "segment_ids": segments, "advantage": advantage,
        "count": (labels != IGNORED).sum(), "real_tokens": (segments > 0).sum(),
    }  # fmt: skip


@torch.no_grad()
def add_log_probs(engine: TrainingEngine, micro_batches, reference, args) -> None:
    """Adds to each micro-batch its tokens' log-probabilities, (B, T - 1): "old", under the policy that sampled them,
    and "reference", under the frozen model. Both stay the same during the inner steps.

    With one inner step "old" is left out: the loss computes the same numbers.
    """
    models = {"old": engine.module if args.inner_steps > 1 else None, "reference": reference}
    for batch in micro_batches:
        for name, model in models.items():
            if model is not None:
                with engine.world.autocast():
                    batch[name] = log_probs(model, batch, args.temperature)[1]


def log_probs(model, batch, temperature: float):
    """-> (output of the forward pass, token_log_probs (B, T - 1)) at the temperature of the sampling.

    Ratios and KL must be of the distribution that was sampled from. At temperature T that is softmax(logits / T), as
    no top_k, top_p or penalty is used here.
    """
    out = model(**inputs(batch))
    return out, token_log_probs(out.logits, batch["labels"], temperature)


def policy_loss(args):
    """The loss function for trainer.loop.add_gradients: sums over the answers' tokens."""

    def loss_fn(model, batch):
        out, policy = log_probs(model, batch, args.temperature)
        # With one inner step there is no "old": the policy is the one that sampled. policy / policy.detach() is 1 and
        # has the gradient of log p, the plain policy gradient.
        old, reference = batch.get("old", policy.detach()), batch.get("reference")
        mask = batch["labels"][:, 1:] != IGNORED
        loss, count, numbers = grpo_loss(policy, old, reference, batch["advantage"], mask, args.clip, args.kl)
        return loss, count, numbers, out.aux_loss

    return loss_fn


# ------------------------------------------------------------------------------------------------------- validation
def evaluate(engine: TrainingEngine, rollout, held_out) -> tuple[list[bool], dict]:
    """Greedy answers to the held-out questions -> (for each whether it is right, {name: share})."""
    if not held_out:
        return [], {"exact_match": None, "well_formed": None}
    world = engine.world
    own = held_out[world.rank :: world.size]
    completions = roll_out(engine, rollout, [q.prompt for q in own], [0] * len(own), 0.0)
    texts = [complete_text(completion) for completion in completions]
    found = [(exact_match(t, q.answer), answer_block(t) is not None) for t, q in zip(texts, own, strict=True)]
    # Rank r answered questions r, r + size, ... Back in the order of the questions: what_was_gained compares each
    # question before and after.
    parts = world.gather(found)
    right, well_formed = zip(*(parts[i % world.size][i // world.size] for i in range(len(held_out))), strict=True)
    n = len(held_out)
    return list(right), {"exact_match": sum(right) / n, "well_formed": sum(well_formed) / n}


def what_was_gained(before: list[bool], after: list[bool]) -> dict:
    """Exact match on the held-out questions before and after training, and a 95% bootstrap interval of the gain."""
    if not after:
        return {"exact_match_before": None, "exact_match_after": None, "exact_match_gain_interval": None}
    shares = [torch.tensor(right, dtype=torch.float64) for right in (before, after)]
    return {
        "heldout_questions": len(after), "exact_match_before": shares[0].mean().item(),
        "exact_match_after": shares[1].mean().item(),
        "exact_match_gain_interval": paired_bootstrap(*(share.numpy() for share in shares)),
    }  # fmt: skip


def in_words(problems, held_out, args) -> list[tuple[str, str]]:
    """The questions in words, for the lines printed at the start."""
    asked = f"{len(problems.problems):,} questions, each answered {args.group} times an epoch"
    sampling = f"temperature {args.temperature:g}, at most {args.max_new_tokens} new tokens"
    checked = f"{len(held_out):,} questions" if held_out else "none: no validation figure (see --val_split)"
    return [("train", f"{asked}, {sampling}"), ("held out", checked)]
