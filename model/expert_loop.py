"""Two fast ways to compute what `Experts.plain_loop` in moe.py computes: read that one first.

    "loop"        one expert after the other, with the backward pass written by hand: CPUs and older GPUs
    "grouped_mm"  two kernels of torch, each for all experts at once: GPUs of compute capability 9 and up, in bfloat16

Legend: N tokens, K experts a token is sent to, M = N K pairs of a token and one of its experts, sorted by expert; of
one expert's pairs there are n. D width of the model, E experts, I width of an expert.

All functions here take the same arguments: x (N, D); token (M,) each pair's row in x; weight (M,) its routing weight;
counts (E,) pairs of each expert; gate_up (E, 2I, D) and down (E, D, I) the experts' matrices. They return (N, D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import compute_dtype


def compute_experts(x: Tensor, token: Tensor, weight: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """For each token the weighted sum of its experts' outputs, computed in the way that is faster on this device."""
    # Autocast converts the inputs of the operations on its list only. Neither way below is on it, so convert here.
    dtype = compute_dtype(x)
    x, weight, gate_up, down = x.to(dtype), weight.to(dtype), gate_up.to(dtype), down.to(dtype)
    if experts_kind(x.device, x.dtype, gate_up.shape) == "grouped_mm":
        return experts_together(x, token, weight, counts, gate_up, down)
    return experts_in_turn(x, token, weight, counts, gate_up, down)


def experts_kind(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """ "grouped_mm" on a GPU that has the kernel (bf16, compute capability 9 and up), else "loop".

    On older GPUs torch's grouped_mm is itself a loop, which waits for the group sizes in each of a layer's six products
    (two forward, four backward); our loop waits once. shape: of gate_up, (E, 2I, D).
    """
    if device.type == "cuda" and hasattr(F, "grouped_mm") and dtype == torch.bfloat16:
        aligned = shape[1] % 16 == 0 and shape[2] % 8 == 0  # strides must be multiples of 16 bytes
        if aligned and torch.cuda.get_device_capability(device) >= (9, 0):
            return "grouped_mm"
    return "loop"


# ------------------------------------------------------------------------------------------- all experts at once
def experts_together(x, token, weight, counts, gate_up, down) -> Tensor:
    """One product for all gates and ups, one for all downs. No loop, but tensors of M rows are kept for backward."""
    gate, up = grouped_linear(x[token], gate_up, counts).chunk(2, dim=-1)  # (M, I) each
    # down is linear, so down(w a) = w down(a). If the D outputs were weighted, they would have to be kept for the
    # gradient of w; weighting the I inner numbers avoids that.
    routed = grouped_linear(F.silu(gate) * up * weight.unsqueeze(-1), down, counts)  # (M, D)
    return torch.zeros_like(x).index_add(0, token, routed)  # a token's K outputs are added up


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (M, in) sorted by group, weight (E, out, in), counts (E,) rows of each group -> (M, out)."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


# ------------------------------------------------------------------------------- one expert after the other
@torch.compiler.disable  # group sizes differ at every step: there is nothing to compile once
def experts_in_turn(x, token, weight, counts, gate_up, down) -> Tensor:
    # On a GPU tolist waits for the counts: the only time a layer waits.
    return ExpertLoop.apply(x, token, weight, counts.tolist(), gate_up, down)


class ExpertLoop(torch.autograd.Function):
    """The plain loop with its backward pass written out. For one expert with n rows X (n, D) and weights w (n, 1):

        forward     [G U] = X Wgu'          Wgu (2I, D) is gate above up, Wd (D, I) is down; ' transposes
                    A = silu(G) * U
                    Y = (w A) Wd'           = w (A Wd'), and w A is smaller than Y

        backward    P = dY Wd               the gradient of w A
        from dY     dw = sum over I of P * A
                    dA = w P                dWd = dY' (w A)
                    dU = dA * silu(G)       dG = dA * U * silu'(G)
                    dX = [dG dU] Wgu        dWgu = [dG dU]' X

    Automatic differentiation gives the same formulas. Two things make this faster. Only [G U] is kept for the backward
    pass: X is gathered from x again and A is computed again, which is cheap. And dWgu, dWd of each expert are written
    straight into their slice of the stack's gradient, while automatic differentiation of `gate_up[e]` would make a
    whole stack of zeros around each expert's gradient and add up E such stacks.

    Each expert is finished before the next begins, so its numbers stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx, x, token, weight, counts: list[int], gate_up, down):
        hidden = x.new_empty(len(token), gate_up.shape[1])  # (M, 2I): [G U] of all experts, kept for backward
        out = torch.zeros_like(x)
        groups = zip(token.split(counts), weight.split(counts), hidden.split(counts), gate_up, down, strict=True)
        for rows, w, gu, W_gate_up, W_down in groups:  # rows (n,): which tokens are this expert's
            if len(rows):
                torch.mm(x.index_select(0, rows), W_gate_up.t(), out=gu)
                gate, up = gu.chunk(2, dim=-1)  # (n, I) each
                inner = F.silu(gate).mul_(up).mul_(w.unsqueeze(-1))  # w A, in the memory that silu took
                out.index_add_(0, rows, inner @ W_down.t())
        ctx.save_for_backward(x, token, weight, hidden, gate_up, down)
        ctx.counts = counts
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # a gradient of this gradient would be wrong: torch refuses it
    def backward(ctx, d_out):
        x, token, weight, hidden, gate_up, down = ctx.saved_tensors
        learns = any(ctx.needs_input_grad[4:])  # experts that LoRA or distillation freezes need no gradient
        d_x, d_weight = torch.zeros_like(x), torch.empty_like(weight)
        # Empty, not zero: every expert writes its whole slice; without tokens it writes the zeros of an empty product.
        d_gate_up, d_down = (torch.empty_like(gate_up), torch.empty_like(down)) if learns else (None, None)
        groups = zip(*(tensor.split(ctx.counts) for tensor in (token, weight, hidden, d_weight)), strict=True)
        for e, (rows, w, gu, d_w) in enumerate(groups):
            # The names follow the formulas above: d_y is dY, silu is silu(G), inner is A.
            w, d_y = w.unsqueeze(-1), d_out.index_select(0, rows)  # (n, 1), (n, D)
            gate, up = gu.chunk(2, dim=-1)
            silu = F.silu(gate)
            inner = silu * up  # A (n, I)
            d_inner = d_y @ down[e]  # P (n, I)
            torch.sum(d_inner * inner, dim=-1, out=d_w)  # d_w is a view: this fills a part of d_weight
            d_inner.mul_(w)  # in place: P becomes dA = w P, and P is not needed again
            if learns:
                torch.mm(d_y.t(), inner.mul_(w), out=d_down[e])
            d_gu = torch.empty_like(gu)  # [dG dU] (n, 2I)
            d_gate, d_up = d_gu.chunk(2, dim=-1)
            torch.mul(d_inner, silu, out=d_up)
            # dG = dA * U * silu'(G); torch's kernel does not store silu'(G). It comes last because it overwrites dA.
            torch.ops.aten.silu_backward(d_inner.mul_(up), gate, grad_input=d_gate)
            if learns:
                torch.mm(d_gu.t(), x.index_select(0, rows), out=d_gate_up[e])
            d_x.index_add_(0, rows, d_gu @ gate_up[e])  # a token's K gradients are added up
        return d_x, None, d_weight, None, d_gate_up, d_down
