"""A copy of a model that computes the same faster: its weights are laid out once for the CPU's matrix kernels.

Legend: M rows of an input (tokens of all sequences together), K its width, N width of the output.

Generating a token reads every weight once, so it takes as long as reading them. The plain product x W' of a few rows
reads W far more slowly than the memory could deliver it. oneDNN's kernels reach the memory's rate, once W is stored in
their block order. torch.compile does that to frozen weights; here the same two operators are called directly, and there
is no compilation to wait for. A row's result does not depend on the other rows: from 4 rows on it is the same to the
last bit in any batch (measured on AVX-512, a test checks it). So an answer does not depend on what else is generated.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import compute_dtype
from model.moe import Experts, FeedForward

MIN_ROWS = 4  # below, the kernel is slower (1 row: 8.8 ms, 4 rows: 7.3 ms for a 26M model) and sums in another order


def prepacked(model: nn.Module) -> nn.Module:
    """The model as the engine runs it: on a CPU in fp32, outside autocast, a copy with packed matrices; elsewhere the
    model itself.

    The copy shares the parameters that are no matrix of a linear layer (norms, embedding). Its packed matrices are its
    own: when the original's weights change later, they do not.
    """
    if not can_be_packed(model):
        return model
    # deepcopy looks objects up in this memo first: modules are copied, parameters are found there and shared
    shared = {id(p): p for p in model.parameters()}
    return pack(copy.deepcopy(model, shared).eval())


def can_be_packed(model: nn.Module) -> bool:
    plain = all(p.device.type == "cpu" and p.dtype == compute_dtype(p) == torch.float32 for p in model.parameters())
    return plain and has_packed()


def pack(model: nn.Module) -> nn.Module:
    """Replaces the modules of a model by packed ones, in place; returns it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            replacement = REPLACEMENTS.get(type(child))
            # A block whose layers are not plain ones stays, and its layers are packed one by one.
            if type(child) is FeedForward and any(type(layer) is not nn.Linear for layer in child.children()):
                continue
            if replacement is not None:
                setattr(parent, name, replacement(child))
    return model


# ------------------------------------------------------------------------------------------------ products x W'
def has_packed() -> bool:
    """Whether this torch has oneDNN's operators; they are not public, so they may go."""
    operators = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return operators and torch.backends.mkldnn.is_available()


class PackedProduct:
    """x (..., K) -> x W' (..., N) for a weight (N, K) kept in oneDNN's block order."""

    def __init__(self, weight: Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        M = flat.shape[0]
        if M < MIN_ROWS:
            flat = torch.cat([flat] * -(-MIN_ROWS // M))  # the cheapest way to get there; the surplus is thrown away
        out = torch.ops.mkldnn._linear_pointwise(flat, self.weight, None, "none", [], "")
        return out[:M].view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------------- modules
class PackedLinear(nn.Module):
    """nn.Linear for inference."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.product, self.bias = PackedProduct(linear.weight), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if self.bias is None else self.product(x) + self.bias


class PackedFeedForward(nn.Module):
    """model.moe.FeedForward for inference: gate and up in one product."""

    def __init__(self, block: FeedForward):
        super().__init__()
        self.gate_up = PackedProduct(torch.cat((block.gate_proj.weight, block.up_proj.weight)))
        self.down = PackedProduct(block.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PackedExperts(nn.Module):
    """model.moe.Experts for inference: the experts that got tokens, one after the other."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.gate_up = [PackedProduct(w) for w in experts.gate_up_proj]
        self.down = [PackedProduct(w) for w in experts.down_proj]

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """x (N, D) -> (N, D); token, weight (N K,) and counts (E,) as Experts.forward has them."""
        out = torch.zeros_like(x)
        begin = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                rows, w = token[begin : begin + count], weight[begin : begin + count, None]
                gate, up = self.gate_up[expert](x[rows]).chunk(2, dim=-1)
                out.index_add_(0, rows, self.down[expert](F.silu(gate) * up * w))
                begin += count
        return out


REPLACEMENTS = {nn.Linear: PackedLinear, FeedForward: PackedFeedForward, Experts: PackedExperts}
