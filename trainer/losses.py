"""What is minimised, as pure functions of numbers. Each returns a sum and what to divide it by, never a mean.

A mean over one micro-batch cannot be averaged with others of another size; sums can be added, over micro-batches and
processes, and divided once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lm_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token, in nats: (sum over learned targets, their number).

    logits (B, T, V); labels (B, T) at their own token's position, -100 where nothing is learned: position t of the
    logits predicts label t + 1.
    """
    targets = labels[:, 1:].flatten()
    predictions = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predictions, targets, ignore_index=-100, reduction="sum"), (targets != -100).sum()


def language_model(model, batch: dict) -> tuple[Tensor, Tensor, dict]:
    """The loss of pretraining and of every kind of SFT: cross-entropy, and the experts' balance loss if any.

    batch["aux_scale"] (a number the loop sets) makes the balance loss a mean over the step's real tokens, in the unit
    of the sum: see trainer/loop.py.
    """
    out = model(input_ids=batch["input_ids"], segment_ids=batch["segment_ids"])
    loss, count = lm_loss(out.logits, batch["labels"])
    if out.aux_loss is None:
        return loss, count, {}
    balance = out.aux_loss * batch["aux_scale"]
    return loss + balance, count, {"loss": loss.detach(), "balance": balance.detach()}


def learned_bytes(labels: Tensor, bytes_of_token: Tensor) -> Tensor:
    """UTF-8 bytes of the learned targets; labels (B, T), bytes_of_token (V,)."""
    targets = labels[:, 1:]
    return torch.where(targets == -100, 0, bytes_of_token[targets.clamp(min=0)]).sum()
