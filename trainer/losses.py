"""Losses as pure functions of tensors. Each returns a sum and the count to divide it by, never a mean.

A step's loss is a mean over all its tokens. The mean of micro-batches' means is another number where they differ in
size: of 1 token with loss 4 and 3 tokens with loss 0 the mean is 1, the mean of the means is 2. Sums can be added, over
micro-batches and processes, and divided once. The stages' default loss, `language_model`, stands in trainer/loop.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def lm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, in nats: (sum over learned targets, their number).

    logits (B, T, V); labels (B, T) at their own token's position, -100 where nothing is learned: position t of the
    logits predicts label t + 1.
    """
    targets = labels[:, 1:].flatten()
    predictions = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predictions, targets, ignore_index=-100, reduction="sum"), (targets != -100).sum()


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where the mask is true. Not values[mask].sum(): the size of values[mask] depends on the mask,
    so the CPU would wait for the GPU to learn it."""
    return torch.where(mask, values, 0.0).sum()


def weighted_sum(nats: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    """Sum of cross-entropies in which a target of id i counts token_weight[i] times.

    nats (B, T - 1) of each target; labels (B, T); token_weight (V,).
    """
    return (nats * token_weight[labels[:, 1:].clamp(min=0)]).sum()  # nats are 0 where nothing is learned


def learned_bytes(labels: Tensor, bytes_of_token: Tensor) -> Tensor:
    """UTF-8 bytes of the learned targets; labels (B, T), bytes_of_token (V,)."""
    targets = labels[:, 1:]
    return torch.where(targets == -100, 0, bytes_of_token[targets.clamp(min=0)]).sum()


# ----------------------------------------------------------------------------------------------------- preferences
def segment_log_probs(nats: Tensor, labels: Tensor, segment_ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Log-probability, in nats, of each packed document's learned tokens, and their number: (B, n) each.

    nats (B, T - 1) each target's cross-entropy, labels (B, T), segment_ids (B, T) with 0 for padding and documents
    numbered 1 to n.
    """
    # A target belongs to the document of its own token. A document's first token is never a target (its label is -100),
    # so no sum mixes two documents. Column 0 collects the padding and is dropped at the end.
    document = segment_ids[:, 1:]
    sums = nats.new_zeros(len(nats), n + 1).scatter_add(1, document, -nats)
    counts = nats.new_zeros(len(nats), n + 1).scatter_add(1, document, (labels[:, 1:] != -100).to(nats.dtype))
    return sums[:, 1:], counts[:, 1:]


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0, kind="sigmoid"):
    """Loss of each pair, (n,), from the log-probabilities (nats) of its two answers under policy and reference, (n,).

    h = log(policy / reference) of the chosen answer minus that of the rejected one. beta h is the difference of their
    implicit rewards: above 0 where the policy prefers the chosen answer more than the reference does.
    sigmoid  -log sigmoid(beta h) (Rafailov et al. 2023, arXiv 2305.18290). label_smoothing: the share of pairs whose
             answers are assumed to be swapped.
    ipo      (h - 1 / (2 beta))^2, for log-probabilities per token: h is drawn to a fixed margin and does not grow
             without end (Azar et al. 2023, arXiv 2310.12036).
    """
    h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    if kind == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    raise ValueError(f"kind must be sigmoid or ipo, not {kind!r}")


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), log-probabilities per token and no reference, (n,).

    Meng et al. 2024, arXiv 2405.14734.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-chosen (SFT) - beta log sigmoid(log odds ratio), from log-probabilities per token, (n,) each -> (n,).

    Hong et al. 2024, arXiv 2403.07691; odds(p) = p / (1 - p).
    """

    def log_of_rest(log_p: Tensor) -> Tensor:  # log(1 - p), finite and without a gradient where p rounds to 1
        return torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))

    log_odds_ratio = (chosen - rejected) - (log_of_rest(chosen) - log_of_rest(rejected))
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


# --------------------------------------------------------------------------------------------------- reinforcement
def token_log_probs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-probability, in nats, of each learned target in softmax(logits / temperature): (B, T - 1), 0 elsewhere.

    logits (B, T, V); labels (B, T) at their own token's position, -100 where nothing is learned.
    """
    B, T = labels.shape
    scaled = logits[:, :-1].flatten(0, 1).float() / temperature
    return -F.cross_entropy(scaled, labels[:, 1:].flatten(), ignore_index=-100, reduction="none").view(B, T - 1)


def group_advantages(rewards: Tensor) -> Tensor:
    """How much better each answer is than the mean of its group, in standard deviations: (Q, G) -> (Q, G).

    A row for each question, a column for each answer. In a group of equal rewards all advantages are 0, so nothing is
    learned from it. The deviation is the unbiased one, with 1e-4 added against division by zero, as in trl.
    """
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)


def grpo_loss(log_probs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, mask: Tensor,
              clip: float, kl: float) -> tuple[Tensor, Tensor, dict]:  # fmt: skip
    """Group-relative policy optimisation: (sum over the mask, its size, {name: sum of another number}).

    log_probs, old, reference (B, T): each token's log-probability (nats) under the policy, the policy that sampled it,
    and the frozen model it must stay near (None: no such model, no KL term). advantages (B,), one an answer.
    mask (B, T), true on the tokens of the answers. With ratio = policy / old, a token counts

        -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) + kl (d - log d - 1),   d = reference / policy

    (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300; the clip is PPO's, arXiv 1707.06347; the second term is
    Schulman's k3, an estimate of KL(policy || reference) that is never negative). Every token of a step weighs the
    same, not every answer (Yu et al. 2025, DAPO, arXiv 2503.14476): a mean over each answer first would punish long
    wrong answers less than short ones.
    """
    advantage = advantages[:, None]  # (B, 1): the same for all tokens of an answer
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    per_token = -torch.minimum(ratio * advantage, clipped * advantage)
    # Where the clipped term is the smaller one the gradient is 0: the token has moved as far as it may in this step.
    away = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantage != 0)
    numbers = {"clip_share": (away & mask).sum()}
    if reference is not None:
        log_d = reference - log_probs
        k3 = log_d.exp() - log_d - 1
        per_token = per_token + kl * k3
        numbers["kl"] = masked_sum(k3.detach(), mask)
    return masked_sum(per_token, mask), mask.sum(), numbers


# ---------------------------------------------------------------------------------------------------- distillation
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature=1.0, kind="forward", skew=0.1):
    """`divergence` where mask is true: (sum over the mask, its size). logits (..., V); mask (...)."""
    return divergence(student_logits[mask], teacher_logits[mask], temperature, kind, skew), mask.sum()


def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature=1.0, kind="forward", skew=0.1) -> Tensor:
    """T^2 times the divergence of teacher and student at temperature T, in nats, summed; logits (n, V).

    With p = softmax(teacher / T) and q of the student:
    forward  KL(p || q): the student covers all the teacher might say (Hinton et al. 2015, arXiv 1503.02531)
    reverse  KL(q || p): it keeps to what the teacher finds likely (Gu et al. 2023, MiniLLM, arXiv 2306.08543)
    skewed   KL(p || skew p + (1 - skew) q): forward, bounded where q is nearly 0 (Ko et al. 2024, arXiv 2402.03898)
    T^2 keeps the gradient's size when T changes.
    """
    # In float32 and as logarithms: probabilities near 0 would be rounded to 0 otherwise.
    log_p = (teacher_logits.float() / temperature).log_softmax(dim=-1)  # (n, V)
    log_q = (student_logits.float() / temperature).log_softmax(dim=-1)
    if kind == "reverse":
        log_p, log_q = log_q, log_p
    elif kind == "skewed":
        log_q = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
    elif kind != "forward":
        raise ValueError(f"kind must be forward, reverse or skewed, not {kind!r}")
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def distillation_sums(student_logits, hidden, head, labels, temperature=1.0, kind="forward", skew=0.1, chunk=1024,
                      n=None):  # fmt: skip
    """Over the learned targets: (cross-entropy sum, kd_loss sum, their number), the teacher's logits in pieces.

    student_logits (B, T, V); hidden (B, T, D') the teacher's, whose logits are head(hidden); labels (B, T). `chunk`
    targets at a time are compared, and what a chunk needs for its gradient is computed again in the backward pass: of
    the teacher, and of what stands between logits and loss, only (chunk, V) numbers are ever in memory. n: how many
    targets there are, if known: then the CPU need not wait for the GPU to count them.
    """
    learned = labels[:, 1:] != -100  # (B, T - 1); position t of the logits predicts label t + 1
    count = learned.sum()
    where = torch.nonzero_static(learned, size=int(count) if n is None else n).unbind(1)  # row and column of each
    targets = labels[:, 1:][where]  # (n,)

    def compare(student: Tensor, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # the teacher does not learn
            teacher = head(hidden)  # (chunk, V)
        ce = F.cross_entropy(student.float(), target, reduction="sum")
        return ce, divergence(student, teacher, temperature, kind, skew)

    sums = [(0.0 * student_logits[:0]).float().sum()] * 2  # zero, and joined to the graph where there is no target
    parts = (x.split(chunk) for x in (student_logits[:, :-1][where], hidden[:, :-1][where], targets))
    for part in zip(*parts, strict=True):
        found = checkpoint(compare, *part, use_reentrant=False, preserve_rng_state=False)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    return *sums, count
