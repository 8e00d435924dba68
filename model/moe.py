"""Mixture of experts: a router sends each token to a few of many feed-forward blocks.

    out = sum over the token's K best experts of (routing weight) expert(x)  +  shared experts(x)

So a model has the parameters of all experts, but each token is computed by K of them only. From the top: a block, the
router, the experts, their sum, and the loss that keeps the router from sending all tokens to the same few experts.

Legend: N tokens of the batch laid end to end, D width of the model, E routed experts, K experts a token is sent to,
M = N K pairs of a token and one of its experts, I width of an expert.

Sources: top-k routing, Shazeer et al. 2017 (arXiv 1701.06538); shared experts and the balance loss per sequence,
DeepSeekMoE (arXiv 2401.06066) and DeepSeek-V2 (arXiv 2405.04434).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.expert_loop import compute_experts
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


def route(scores: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """scores (N, E), rows summing to 1 -> weights (N, K) and experts (N, K) of each token's top-k.

    The choice itself has no gradient: the router learns through the weights alone. With k = 1, normalised, the weight
    would be score / score = 1 with a gradient of zero, and the router would never learn. Dividing by the detached score
    keeps the value 1 and gives the gradient of log(score): the score rises where more of this expert lowers the loss.
    """
    weight, chosen = scores.topk(k, dim=-1, sorted=False)
    if normalise and k == 1:
        weight = weight / weight.detach()
    elif normalise:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    return weight, chosen


class Experts(nn.Module):
    """The E routed feed-forward blocks as two stacks of matrices, gate and up in one: (E, 2I, D) and (E, D, I).

    Both methods take the pairs sorted by expert: token (M,) which row of x, weight (M,) the routing weight, counts (E,)
    how many pairs each expert has. They give the same (N, D): for each token the weighted sum of its experts' outputs.
    """

    def __init__(self, n_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, hidden_dim))

    def expert(self, e: int, x: Tensor) -> Tensor:
        """Expert e on its tokens, x (n, D) -> (n, D): the SwiGLU of FeedForward."""
        gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)  # (n, I) each
        return F.linear(F.silu(gate) * up, self.down_proj[e])

    def plain_loop(self, x: Tensor, token: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """One expert after the other. Used for experts with adapters (lora.py); tests hold `forward` equal to it."""
        counts, out = counts.tolist(), torch.zeros_like(x)
        for e, (rows, w) in enumerate(zip(token.split(counts), weight.split(counts), strict=True)):
            y = self.expert(e, x[rows]) * w.unsqueeze(-1)  # (n, D)
            out = out.index_add(0, rows, y.to(out.dtype))  # each row of y is added to that of its token
        return out

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """The same result as plain_loop, computed faster: see expert_loop.py."""
        return compute_experts(x, token, weight, counts, self.gate_up_proj, self.down_proj)


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
        flat = x.reshape(-1, D)  # (N, D): a feed-forward block treats each token alone, so rows do not matter
        scores = self._scores(flat)  # (N, E)
        weight, chosen = route(scores, self.config.num_experts_per_tok, self.config.norm_topk_prob)  # (N, K) each

        # The pairs are sorted by expert, so that an expert computes all its tokens in one matrix product.
        pairs = chosen.flatten()  # (M,) the expert of each pair; pair i belongs to token i // K
        # Not bincount: on a GPU it waits for the largest value, to know the size of its result.
        counts = pairs.new_zeros(self.config.n_routed_experts).scatter_add_(0, pairs, torch.ones_like(pairs))  # (E,)
        order = pairs.argsort(stable=True)  # expert by expert, and in the order of the tokens within each
        token = order // chosen.shape[1]
        out = self.experts(flat, token, weight.flatten()[order], counts)  # (N, D)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)

        loss = None
        if self.training and self.config.aux_loss_alpha > 0:
            if documents is None:
                documents = torch.arange(B, device=x.device).unsqueeze(-1).expand(B, T)
            if not self.config.seq_aux:
                documents = documents.clamp(max=0)  # the whole batch is one document; padding stays negative
            loss = self.config.aux_loss_alpha * balance_loss(scores, chosen, documents.flatten())
        return out.view(B, T, D), loss

    def _scores(self, flat: Tensor) -> Tensor:
        """flat (N, D) -> each expert's share of the softmax (N, E).

        In float32 under autocast too: between two nearly equal experts the rounding of half precision would decide
        (Switch Transformer, arXiv 2101.03961, section 2.4).
        """
        training_in_half = torch.is_autocast_enabled(flat.device.type)  # the weights are float32
        with torch.autocast(flat.device.type, enabled=False):
            return self.gate(flat.float() if training_in_half else flat).softmax(dim=-1, dtype=torch.float32)


def balance_loss(scores: Tensor, chosen: Tensor, documents: Tensor) -> Tensor:
    """How unevenly the tokens of a document are spread over the experts, as a mean over all real tokens.

    For one document of L tokens: f_e = E / (L K) times the number of its tokens sent to expert e, and P_e = the mean of
    its tokens' scores s_te for e. Its imbalance is sum_e f_e P_e: 1 where all experts get equally many tokens, up to E
    where one gets all. f_e is a count and has no gradient; the gradient lowers P_e for the experts with a large f_e.

    scores (N, E), chosen (N, K), documents (N,) with negative numbers for padding. A document is weighted by its
    length, so the mean over a step does not depend on how its rows are split into micro-batches.
    """
    N, E = scores.shape
    real = documents >= 0
    group = torch.where(real, documents, 0)  # an index must not be negative; padding is multiplied by 0 below
    # Document numbers are below N. Their exact number is on the GPU, and reading it would wait for the GPU.
    n_groups = N if documents.numel() else 1
    assigned = torch.zeros(N, E, device=scores.device).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=torch.float32)
    )  # 1 where the token is sent to the expert
    assigned = assigned * real.unsqueeze(-1)
    length = torch.zeros(n_groups, device=scores.device).index_add_(0, group, real.float())  # L of each document
    counts = torch.zeros(n_groups, E, device=scores.device).index_add_(0, group, assigned)
    f = counts * E / (length.clamp(min=1) * chosen.shape[1]).unsqueeze(-1)  # (documents, E)
    # Weighted by length, the sum over documents is sum L sum_e f_e P_e. L P_e is the sum of s_te over the document's
    # tokens, so the whole is the sum of f_e s_te over tokens and experts, with the f of the token's document.
    return (f[group] * scores * real.unsqueeze(-1)).sum() / length.sum().clamp(min=1)
