"""A copy of a model that computes the same and waits less: weights laid out once for the CPU's matrix kernels.

Legend: M rows of an input (tokens of all sequences together), K its width, N width of the output.

Generating a token reads every weight once, so its time is the time of reading them. The plain product x W' of a few
rows reads W far below the memory's rate; oneDNN's kernels reach it once W is stored in their block order, which is
what torch.compile does to frozen weights. Here the same two operators are called directly: no compilation to wait
for, and rows do not influence each other: from 4 rows on (measured on AVX-512, tests check it) a row's result is the
same to the last bit in any batch, so an answer does not depend on its neighbours.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe import Experts

MIN_ROWS = 4  # below, the kernel is slower (1 row: 8.8 ms, 4 rows: 7.3 ms for a 26M model) and sums in another order


def prepared(model: nn.Module) -> nn.Module:
    """The model as the engine runs it: on a CPU in fp32 a copy with packed matrices, otherwise the model itself.

    Parameters that are no matrices of a linear map (norms, embedding) are shared with the original, not copied. The
    packed matrices are copies: later changes of the original's weights do not reach them.
    """
    if not can_pack(model):
        return model
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, shared).eval()  # modules are copied, parameters (found in the memo) are not
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
            elif type(child) is Experts:
                setattr(parent, name, PackedExperts(child))
    return twin


def can_pack(model: nn.Module) -> bool:
    """True if all parameters are fp32 on the CPU and this torch has oneDNN's operators (they are not public)."""
    operators = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return plain and operators and torch.backends.mkldnn.is_available()


def pack(weight: Tensor) -> Tensor:
    """weight (N, K) -> the same numbers in block order, opaque."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), packed weight (N, K) -> x W' + bias (..., N)."""
    flat = x.reshape(-1, x.shape[-1])
    M = flat.shape[0]
    if M < MIN_ROWS:
        flat = torch.cat([flat] * -(-MIN_ROWS // M))  # the cheapest way to get there; the surplus is thrown away
    out = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return out[:M].view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """nn.Linear for inference."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = pack(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed, self.bias)


class PackedExperts(nn.Module):
    """model.moe.Experts for inference: the experts that got tokens, one after the other."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.gate_up = [pack(w) for w in experts.gate_up_proj]
        self.down = [pack(w) for w in experts.down_proj]

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """x (N, D) -> (N, D); token, weight (N K,) and counts (E,) as Experts.forward has them."""
        out = torch.zeros_like(x)
        begin = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                rows, w = token[begin : begin + count], weight[begin : begin + count, None]
                gate, up = packed_linear(x[rows], self.gate_up[expert]).chunk(2, dim=-1)
                out.index_add_(0, rows, packed_linear(F.silu(gate) * up * w, self.down[expert]))
                begin += count
        return out
