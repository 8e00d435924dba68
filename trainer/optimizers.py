"""Optimizers and schedules. A schedule is a function of the step alone, so a saved state need not hold it."""

import math
from collections import defaultdict

import torch
from torch import Tensor


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Share of the peak rate at a step, 0 <= step < total.

    Linear warmup to 1 over `warmup` steps. Then "cosine": half a cosine from 1 to 0.1; "wsd" (warmup, stable, decay;
    Hu et al. 2024, arXiv 2404.06395): 1, and a straight line towards 0 over the last fifth.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    decay = max(1, total // 5)
    return min(1.0, (total - step) / decay)


def make_optimizers(model, kind: str, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Optimizers that together train each trainable parameter exactly once.

    adamw: weight decay on matrices, none on norms. muon: Muon for the matrices inside the layers, AdamW for
    embedding, head, router and norms. Both run at `learning_rate`: Muon's steps are scaled to AdamW's size.
    """
    optimizers, inner = [], []
    if kind == "muon":
        matrices = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim >= 2]
        # Muon suits matrices that map activations to activations. Embedding, head and router have rows of their own
        # meaning (a word, an expert), so AdamW moves them number by number.
        inner = [p for n, p in matrices if not any(x in n for x in ("embed_tokens", "lm_head", "mlp.gate.weight"))]
        optimizers.append(Muon(inner, lr=learning_rate, weight_decay=weight_decay))
    if groups := parameter_groups(model, weight_decay, without=inner):
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = learning_rate  # "lr" changes at each step: peak_lr times learning_rate_factor
    return optimizers


def parameter_groups(model, weight_decay: float, without=()) -> list[dict]:
    """AdamW's groups of the trainable parameters: matrices decay, vectors (norms) do not."""
    left_out = set(map(id, without))
    learned = [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum: the update moves all directions of a matrix by the same amount (Jordan et al. 2024).

    Steps are scaled by 0.2 sqrt(larger side), which gives them AdamW's usual size, so one learning rate serves both
    (Liu et al. 2025, "Muon is scalable", arXiv 2502.16982). A 3-D parameter is a stack of matrices, one for each
    expert. torch.optim.Muon takes no stacks and computes in bfloat16, which on a CPU is far slower than float32.
    """

    def __init__(self, params, lr: float, weight_decay=0.1, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            of_shape = defaultdict(list)  # shape -> the parameters of that shape, which are moved together
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    of_shape[p.shape].append(p)
            for shape, parameters in of_shape.items():
                self._step_together(shape, parameters, **group)

    def _step_together(self, shape, parameters, lr, weight_decay, momentum, **_) -> None:
        """Moves parameters of one shape as one stack. On a GPU launching some fifty small operations for each matrix
        would take longer than computing them. torch._foreach_* do one operation on a list of tensors."""
        buffers, gradients = [self.state[p]["momentum"] for p in parameters], [p.grad for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)  # buffer = momentum buffer + (1 - momentum) gradient
        torch._foreach_lerp_(gradients, buffers, momentum)  # Nesterov momentum, written over the gradients
        updates = orthogonalise(torch.stack(gradients)).to(parameters[0].dtype)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)  # decoupled from the gradient, as in AdamW
        torch._foreach_add_(parameters, list(updates), alpha=-lr * 0.2 * math.sqrt(max(shape[-2:])))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal matrix nearest to each (..., rows, columns), roughly: singular values end in about 0.7 to 1.2.

    Newton-Schulz iteration with a quintic whose coefficients are Jordan et al.'s. Done in bfloat16 where a GPU
    multiplies it fast, in float32 elsewhere.
    """
    # Each step maps every singular value s to a s + b s^3 + c s^5, which drives values in (0, 1] towards 1.
    a, b, c = 3.4445, -4.7750, 2.0315
    fast_bf16 = matrix.is_cuda and torch.cuda.get_device_capability(matrix.device) >= (8, 0)
    x = matrix.to(torch.bfloat16 if fast_bf16 else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])  # (matrices, rows, columns) with rows <= columns, so that x x' is small
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    x = x.view(shape)
    return x.mT if tall else x
