"""A copy of a model that computes the same and waits less: weights laid out once for the CPU's matrix kernels.

Legend: M rows of an input (tokens of all sequences together), K its width, N width of the output.

Generating a token reads every weight once, so its time is the time of reading them. The plain product x W' of a few
rows reads W far below the memory's rate; oneDNN's kernels reach it once W is stored in their block order, which is
what torch.compile does to frozen weights. Here the same two operators are called directly: no compilation to wait
for. Their rows do not influence each other: from 4 rows on (measured on AVX-512, a test checks it) a row's result is
the same to the last bit in any batch, so an answer does not depend on its neighbours.

`quantize="int8"` stores weights as 8-bit integers (FBGEMM's kernels, dynamic quantization): a quarter of the bytes to
read, and products that are off by about one percent.
"""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import compute_dtype
from model.moe import Experts, FeedForward

MIN_ROWS = 4  # below, the kernel is slower (1 row: 8.8 ms, 4 rows: 7.3 ms for a 26M model) and sums in another order


def prepared(model: nn.Module, quantize: str | None = None) -> nn.Module:
    """The model as the engine runs it: on a CPU in fp32 (and outside autocast) a copy with packed matrices, else
    the model itself.

    Parameters that are no matrices of a linear map (norms, embedding) are shared with the original, not copied. The
    packed matrices are copies: later changes of the original's weights do not reach them.
    quantize: None, or "int8" for 8-bit weights; ValueError where that cannot be done.
    """
    plain = all(p.device.type == "cpu" and p.dtype == compute_dtype(p) == torch.float32 for p in model.parameters())
    if quantize is not None:
        if quantize != "int8":
            raise ValueError(f'quantize must be None or "int8", not {quantize!r}')
        if not plain or not has_int8():
            raise ValueError("int8 weights need a CPU, float32 and a torch built with FBGEMM")
    elif not plain or not has_packed():
        return model
    product = Int8Product if quantize else PackedProduct
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, shared).eval()  # modules are copied, parameters (found in the memo) are not
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            replacement = REPLACEMENTS.get(type(child))
            if replacement is not None:
                setattr(parent, name, replacement(child, product))
    return twin


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


def has_int8() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


class Int8Product:
    """x (..., K) -> x W' (..., N), both as 8-bit integers: W with a scale for each output, x with one for each row.

    FBGEMM takes one scale for all of x, from its least and greatest value: a row's result would depend on the others.
    So every row is brought to the range [-1, 1] first, and one more row holds both ends of it.
    """

    def __init__(self, weight: Tensor):
        weight = weight.detach()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12).double() / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # this way to name an int8 tensor will change after torch 2.13
            whole = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(whole, None)
        self.ends = torch.zeros(1, weight.shape[1])
        self.ends[0, :2] = torch.tensor([-1.0, 1.0])

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        size = flat.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)  # (M, 1)
        out = torch.ops.quantized.linear_dynamic(torch.cat((flat / size, self.ends)), self.weight)
        return (out[:-1] * size).view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------------- modules
class PackedLinear(nn.Module):
    """nn.Linear for inference."""

    def __init__(self, linear: nn.Linear, product):
        super().__init__()
        self.product, self.bias = product(linear.weight), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if self.bias is None else self.product(x) + self.bias


class PackedFeedForward(nn.Module):
    """model.moe.FeedForward for inference: gate and up in one product."""

    def __init__(self, block: FeedForward, product):
        super().__init__()
        self.gate_up = product(torch.cat((block.gate_proj.weight, block.up_proj.weight)))
        self.down = product(block.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PackedExperts(nn.Module):
    """model.moe.Experts for inference: the experts that got tokens, one after the other."""

    def __init__(self, experts: Experts, product):
        super().__init__()
        self.gate_up = [product(w) for w in experts.gate_up_proj]
        self.down = [product(w) for w in experts.down_proj]

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
