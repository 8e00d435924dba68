"""Mixture of experts: a router sends each token to a few feed-forward blocks, computed in groups.

Legend: N tokens of the batch laid end to end, D width of the model, E routed experts, K experts a token is sent to,
I width of an expert.

Sources: top-k routing, Shazeer et al. 2017 (arXiv 1701.06538); shared experts and the balance loss per sequence,
DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V2 (arXiv 2405.04434).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import compute_dtype
from model.expert_loop import ExpertLoop
from model.LMConfig import LMConfig


class FeedForward(nn.Module):
    """SwiGLU block, Shazeer 2020 (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)
        self.down_proj.writes_residual = True  # drawn smaller, see _init_weights in model.py

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The E routed feed-forward blocks as two stacks of matrices, gate and up in one: (E, 2I, D) and (E, D, I)."""

    def __init__(self, n_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """x (N, D) -> (N, D), for each token the weighted sum of its experts' outputs.

        The M = N K pairs of a token and one of its experts come sorted by expert: token (M,) indices into x, weight
        (M,) routing weights, counts (E,) pairs of each expert.
        """
        gate_up, down = self.gate_up_proj, self.down_proj
        dtype = compute_dtype(x)  # neither way below is on autocast's list
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        weight = weight.to(x.dtype)
        if experts_kind(x.device, x.dtype, gate_up.shape) == "grouped_mm":
            return experts_together(x, token, weight, counts, gate_up, down)
        return experts_in_turn(x, token, weight, counts, gate_up, down)


class MoEFeedForward(nn.Module):
    """Routed experts for each token plus the shared experts that all tokens pass through."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        hidden = config.moe_hidden_dim
        self.gate = nn.Linear(config.dim, config.n_routed_experts, bias=False)
        self.experts = Experts(config.n_routed_experts, config.dim, hidden)
        # n shared blocks side by side are one block n times as wide.
        shared = config.n_shared_experts
        self.shared_experts = FeedForward(config.dim, shared * hidden) if shared else None

    def forward(self, x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> output (B, T, D) and, in training, the balance loss.

        documents (B, T): which document of the batch each token belongs to, negative for padding; None: no padding,
        one document a row.
        """
        B, T, D = x.shape
        flat = x.reshape(-1, D)  # (N, D)
        scores = self._scores(flat)  # (N, E)
        weight, chosen = route(scores, self.config.num_experts_per_tok, self.config.norm_topk_prob)  # (N, K) each

        pairs = chosen.flatten()  # (N*K,) expert of each (token, expert) pair
        counts = pairs.new_zeros(self.config.n_routed_experts).scatter_add_(0, pairs, torch.ones_like(pairs))  # (E,)
        order = pairs.argsort(stable=True)  # the pairs expert by expert
        token = order // chosen.shape[1]
        out = self.experts(flat, token, weight.flatten()[order], counts)  # (N, D)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)

        loss = None
        if self.training and self.config.aux_loss_alpha > 0:
            if documents is None:
                documents = torch.arange(B, device=x.device).unsqueeze(-1).expand(B, T)
            if not self.config.seq_aux:
                documents = documents.clamp(max=0)  # the whole batch is one document
            loss = self.config.aux_loss_alpha * balance_loss(scores, chosen, documents.flatten())
        return out.view(B, T, D), loss

    def _scores(self, flat: Tensor) -> Tensor:
        """flat (N, D) -> each expert's share of the softmax (N, E), in float32: experts that are nearly equal change
        places by less than half precision can tell (Switch Transformer, arXiv 2101.03961, section 2.4)."""
        training_in_half = torch.is_autocast_enabled(flat.device.type)  # the weights are float32
        with torch.autocast(flat.device.type, enabled=False):
            return self.gate(flat.float() if training_in_half else flat).softmax(dim=-1, dtype=torch.float32)


def route(scores: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """scores (N, E), rows summing to 1 -> weights (N, K) and experts (N, K) of each token's top-k.

    A single normalised weight is 1 whatever the score, which would leave the router without a gradient. Dividing by
    the detached score keeps the value 1 and lets the gradient of the score's logarithm through.
    """
    weight, chosen = scores.topk(k, dim=-1, sorted=False)
    if normalise and k == 1:
        weight = weight / weight.detach()
    elif normalise:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    return weight, chosen


def balance_loss(scores: Tensor, chosen: Tensor, documents: Tensor) -> Tensor:
    """Mean over real tokens of their document's imbalance, sum_e f_e P_e, which is 1 where all experts get the same.

    scores (N, E), chosen (N, K), documents (N,) with negative numbers for padding. f_e is the expert's share of the
    document's assignments times E, P_e its mean score in the document. A document counts by its length, so the mean
    over a step does not depend on how its rows were cut into micro-batches.
    """
    N, E = scores.shape
    real = documents >= 0
    group = torch.where(real, documents, 0)
    n_groups = N if documents.numel() else 1  # an upper bound that needs no look at the values, hence no GPU wait
    assigned = torch.zeros(N, E, device=scores.device).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=torch.float32)
    )
    assigned = assigned * real.unsqueeze(-1)
    length = torch.zeros(n_groups, device=scores.device).index_add_(0, group, real.float())
    counts = torch.zeros(n_groups, E, device=scores.device).index_add_(0, group, assigned)
    f = counts * E / (length.clamp(min=1) * chosen.shape[1]).unsqueeze(-1)  # (documents, E)
    # length * sum_e f_e P_e summed over documents = sum over tokens and experts of f_e s_te
    return (f[group] * scores * real.unsqueeze(-1)).sum() / length.sum().clamp(min=1)


# ------------------------------------------------------------------------------- two ways to compute the experts
def experts_kind(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """ "grouped_mm" on a GPU that has the kernel (bf16, compute capability 9 and up), else "loop".

    On older GPUs torch's grouped_mm is a loop too, and one that waits for the group sizes at each of its six products a
    layer; ours waits once.

    shape: of the stack of gate and up matrices, (E, 2I, D).
    """
    if device.type == "cuda" and hasattr(F, "grouped_mm") and dtype == torch.bfloat16:
        aligned = shape[1] % 16 == 0 and shape[2] % 8 == 0  # strides must be multiples of 16 bytes
        if aligned and torch.cuda.get_device_capability(device) >= (9, 0):
            return "grouped_mm"
    return "loop"


def experts_together(x, token, weight, counts, gate_up, down) -> Tensor:
    """Arguments of `Experts.forward` and its matrices -> (N, D): two kernels, each for all experts at once."""
    gate, up = grouped_linear(x[token], gate_up, counts).chunk(2, dim=-1)  # (M, I) each
    # Weighting the inner values is weighting the outputs, and spares keeping the outputs for the weights' gradient.
    routed = grouped_linear(F.silu(gate) * up * weight.unsqueeze(-1), down, counts)  # (M, D)
    return torch.zeros_like(x).index_add(0, token, routed)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (M, in) sorted by group, weight (E, out, in), counts (E,) rows of each group -> (M, out)."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


@torch.compiler.disable  # group sizes differ at every step: there is nothing to compile once
def experts_in_turn(x, token, weight, counts, gate_up, down) -> Tensor:
    """The same, one expert after the other."""
    return ExpertLoop.apply(x, token, weight, counts.tolist(), gate_up, down)
