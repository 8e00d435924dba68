"""The routed experts one after the other, with the backward pass written out: what a CPU and older GPUs run fast."""

import torch
import torch.nn.functional as F


class ExpertLoop(torch.autograd.Function):
    """Gathers an expert's tokens, computes them and adds the result to theirs before the next expert begins.

    What one expert works on fits the processor's cache, and no (M, D) tensor exists. With the backward pass written
    out, each expert's gradient goes to its place in the stack; automatic differentiation would add up E stacks.
    """

    @staticmethod
    def forward(ctx, x, token, weight, counts: list[int], gate_up, down):
        hidden = x.new_empty(len(token), gate_up.shape[1])  # (M, 2I), all that is kept for the backward pass
        out = torch.zeros_like(x)
        groups = zip(token.split(counts), weight.split(counts), hidden.split(counts), gate_up, down, strict=True)
        for t, w, h, gate_up_e, down_e in groups:
            if len(t):
                torch.mm(x.index_select(0, t), gate_up_e.t(), out=h)
                gate, up = h.chunk(2, dim=-1)
                inner = F.silu(gate).mul_(up).mul_(w.unsqueeze(-1))  # (n, I)
                out.index_add_(0, t, inner @ down_e.t())
        ctx.save_for_backward(x, token, weight, hidden, gate_up, down)
        ctx.counts = counts
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        x, token, weight, hidden, gate_up, down = ctx.saved_tensors
        learns = any(ctx.needs_input_grad[4:])  # frozen experts need no gradient of their own
        d_x, d_weight = torch.zeros_like(x), torch.empty_like(weight)
        d_gate_up, d_down = (torch.empty_like(gate_up), torch.empty_like(down)) if learns else (None, None)
        groups = zip(*(tensor.split(ctx.counts) for tensor in (token, weight, hidden, d_weight)), strict=True)
        for e, (t, w, h, d_w) in enumerate(groups):
            w, d_y = w.unsqueeze(-1), d_out.index_select(0, t)  # (n, 1), (n, D)
            gate, up = h.chunk(2, dim=-1)
            silu = F.silu(gate)
            inner = silu * up
            d_inner = d_y @ down[e]  # (n, I), of the weighted inner values
            torch.sum(d_inner * inner, dim=-1, out=d_w)
            d_inner.mul_(w)
            if learns:
                torch.mm(d_y.t(), inner.mul_(w), out=d_down[e])
            d_h = torch.empty_like(h)  # (n, 2I)
            d_gate, d_up = d_h.chunk(2, dim=-1)
            torch.mul(d_inner, silu, out=d_up)
            torch.ops.aten.silu_backward(d_inner.mul_(up), gate, grad_input=d_gate)  # times silu'(gate), in one pass
            if learns:
                torch.mm(d_h.t(), x.index_select(0, t), out=d_gate_up[e])
            d_x.index_add_(0, t, d_h @ gate_up[e])
        return d_x, None, d_weight, None, d_gate_up, d_down
