"""Several adapters at once: each row of a batch is answered by its own adapter, or by the model without any.

Legend: B rows of a forward pass (sequences), T tokens of each, R the ranks of all adapters together; N tokens of the
batch laid end to end.

An adapter adds s B A x to W x (model/lora.py). Merged into W it costs nothing, but then every row gets it. Here the
matrices A of all adapters stand below one another as one matrix (R, in), their B side by side as one (out, R):

    h = A x               (B, T, R): what each adapter makes of each row
    h = h where the column is of the row's own adapter, else 0
    y = W x + B h

So any number of adapters takes two more products a layer, and reads every A and B once, as W is read once. (To pick
each row's own A and B instead would copy them once a row.) Nothing grows with the number of requests. A row without an
adapter gets zeros added, which changes no bit of it. Ranks may differ. S-LoRA (arXiv 2311.03285) does this for
thousands of adapters, with kernels that skip the columns not needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import upload
from inference.cpu_kernels import PackedExperts, can_be_packed, pack, prepacked
from model.lora import LoraConfig, LoraExperts, LoraLayer, adapted_layers, without_lora


# ---------------------------------------------------------------------------------------------- which row gets which
class Adapters:
    """The adapters of a model by name, and which of them the rows of the next forward pass get."""

    def __init__(self, configs: dict[str, LoraConfig] | None = None, default: str | None = None, device=None):
        """default: the adapter of a row that names none; None: it has none."""
        self.names, self.default, self.device = list(configs or {}), default, device
        ranks = torch.tensor([config.rank for config in (configs or {}).values()], dtype=torch.long)
        owner = torch.arange(len(ranks)).repeat_interleave(ranks)  # (R,): the number of each column's adapter
        # A line for each adapter, True where the column is its own, and a last one, all False, for rows without any.
        self.lines = (owner == torch.arange(len(ranks) + 1).unsqueeze(-1)).to(device)
        # Read by every adapted layer: (B, 1, R), the line of each row; None: no row has an adapter.
        self.own = self._own([None])

    def check(self, name: str | None) -> None:
        """ValueError where there is no such adapter."""
        if name is not None and name not in self.names:
            raise ValueError(f"there is no adapter {name!r}; there is {', '.join(self.names) or 'none'}")

    def columns(self, name: str) -> Tensor:
        """(R,): True where the column is of this adapter."""
        return self.lines[self.names.index(name)]

    @contextmanager
    def rows(self, names: list[str | None]) -> Iterator[None]:
        """In the block a forward pass of B rows gets these adapters, one a row; a single name is for any B."""
        before, self.own = self.own, self._own(names)
        try:
            yield
        finally:
            self.own = before

    def _own(self, names: list[str | None]) -> Tensor | None:
        names = [self.default if name is None else name for name in names]
        if not any(names):
            return None
        lines = [-1 if name is None else self.names.index(name) for name in names]
        return self.lines[upload(lines, self.device)].unsqueeze(1)


def with_adapters(model: nn.Module) -> tuple[nn.Module, Adapters]:
    """The model as the engine runs it: prepacked, and if it has adapters, a copy in which each row gets its own.

    Rows that name none get the active one, so the copy computes what the model does. Like the packed matrices, the
    adapters in it are as they are now. Raises ValueError for an adapter with numbers that are not finite.
    """
    configs, layers = getattr(model, "lora_configs", {}), adapted_layers(model)
    if not configs:
        return prepacked(model), Adapters()
    active = {layer.active for layer in layers.values()} - {None}
    adapters = Adapters(configs, next(iter(active), None), next(model.parameters()).device)
    twin = without_lora(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        kind = AdaptedExperts if isinstance(layer, LoraExperts) else AdaptedLinear
        setattr(twin.get_submodule(parent), child, kind(twin.get_submodule(name), layer, adapters))
    return pack(twin) if can_be_packed(model) else twin, adapters


# ------------------------------------------------------------------------------------------------------- the modules
class Update(nn.Module):
    """What the adapters add to the product with one matrix."""

    def __init__(self, A: Tensor, B: Tensor):
        """A (R, in), B (out, R)."""
        super().__init__()
        # No nn.Linear, which would be packed on a CPU: for so few columns the packed product is slower. The price: the
        # last bits of a row with an adapter may depend on how many rows there are.
        self.A, self.B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        """x (..., in), own (..., R) -> (..., out)."""
        return F.linear(torch.where(own, F.linear(x, self.A), 0), self.B)


@torch.no_grad()
def side_by_side(layer: LoraLayer, key: str, adapters: Adapters) -> tuple[Tensor, Tensor]:
    """A (..., R, in) and B (..., out, R) of all adapters of one weight, stacked as the weight is.

    An adapter that leaves this weight alone has zeros there. The scaling is in B.
    """
    *stack, n_out, n_in = getattr(layer, key).shape
    R, weight = adapters.lines.shape[1], getattr(layer, key)
    A, B = weight.new_zeros(*stack, R, n_in), weight.new_zeros(*stack, n_out, R)
    for name, parts in layer.adapters.items():
        columns, part = adapters.columns(name), parts[key]
        A[..., columns, :], B[..., columns] = part.A, part.scaling * part.B
        # Another row's h is 0, but 0 times infinity is not: one adapter must not spoil the other rows' answers.
        if not (A[..., columns, :].isfinite().all() and B[..., columns].isfinite().all()):
            raise ValueError(f"the adapter {name!r} has numbers that are not finite in {weight.dtype}")
    return A, B


class AdaptedLinear(nn.Module):
    """A linear layer, packed or not, and what the adapters add."""

    def __init__(self, plain: nn.Module, layer: LoraLayer, adapters: Adapters):
        """plain: the layer without adapters; layer: the same with them."""
        super().__init__()
        self.plain, self.adapters = plain, adapters
        self.update = Update(*side_by_side(layer, "weight", adapters))

    def forward(self, x: Tensor) -> Tensor:
        out, own = self.plain(x), self.adapters.own
        if own is None:
            return out
        by_row = x.reshape(len(own), -1, x.shape[-1])  # blocks with experts lay the rows end to end: (B T, in)
        return out + self.update(by_row, own).view(out.shape)


class AdaptedExperts(nn.Module):
    """Routed experts, packed or not, and what the adapters add to each."""

    def __init__(self, plain: nn.Module, layer: LoraLayer, adapters: Adapters):
        super().__init__()
        self.plain, self.adapters = plain, adapters
        gate_up, down = (side_by_side(layer, key, adapters) for key in ("gate_up_proj", "down_proj"))
        self.gate_up = nn.ModuleList(Update(A, B) for A, B in zip(*gate_up, strict=True))  # one an expert
        self.down = nn.ModuleList(Update(A, B) for A, B in zip(*down, strict=True))

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """The arguments of Experts.forward; the loop is that of Experts.plain_loop."""
        own = self.adapters.own
        if own is None:
            return self.plain(x, token, weight, counts)
        own = own.expand(-1, len(x) // len(own), -1).flatten(0, 1)  # (N, R): the row's line for each of its tokens
        gate_up, down = products(self.plain)
        counts, out = counts.tolist(), torch.zeros_like(x)
        for e, (rows, w) in enumerate(zip(token.split(counts), weight.split(counts), strict=True)):
            if len(rows):
                gate, up = (gate_up[e](x[rows]) + self.gate_up[e](x[rows], own[rows])).chunk(2, dim=-1)
                inner = F.silu(gate) * up
                y = (down[e](inner) + self.down[e](inner, own[rows])) * w.unsqueeze(-1)
                out.index_add_(0, rows, y.to(out.dtype))
        return out


def products(experts: nn.Module) -> list[list]:
    """For each expert the product with its matrix: those of gate and up, those of down."""
    if isinstance(experts, PackedExperts):
        return [experts.gate_up, experts.down]
    return [[partial(F.linear, weight=w) for w in stack] for stack in (experts.gate_up_proj, experts.down_proj)]
