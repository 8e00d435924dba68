"""What the layers do: what each would say if it were the last, how large the residual stream is, where heads look.

Legend: L layers, T tokens, n best ones, H heads, D width of the model.
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.errors import UserError
from inspection.next_token import what_came
from inspection.trace import Trace
from model.moe import route


@dataclass
class Lens:
    """What the model would expect after each token if it ended with this layer; row 0 is the embedding alone.

    best            (L + 1, T, n) token ids, the most probable first
    probability     (L + 1, T, n)
    came            (L + 1, T) log-probability (nats) of the token that does come next; NaN at the last place
    """

    best: np.ndarray
    probability: np.ndarray
    came: np.ndarray


@torch.no_grad()
def logit_lens(model, traced: Trace, n: int = 5) -> Lens:
    """The final norm and the head on the residual stream after each layer (nostalgebraist 2020, "interpreting GPT:
    the logit lens"). The last row is the model's own answer."""
    if n < 1:
        raise UserError(f"at least 1 token is shown at a place, not {n}")
    rows = []
    for residual in traced.residuals:  # one layer after the other: (T, V) numbers are many
        hidden = model.model.norm(residual.to(model.device, model.dtype))
        log_p = model.lm_head(hidden).float().cpu().log_softmax(dim=-1)
        best = log_p.topk(min(n, log_p.shape[-1]), dim=-1)
        rows.append((best.indices, best.values.exp(), what_came(log_p, traced.ids)[0]))
    return Lens(*(torch.stack(part).numpy() for part in zip(*rows)))


@dataclass
class Norms:
    """Lengths (Euclidean norms) of the vectors at each layer and token.

    residual    (L + 1, T) of the residual stream: the embedding, then after each layer
    attended    (L, T) of what the layer's attention added
    fed         (L, T) of what its feed-forward block added
    """

    residual: np.ndarray
    attended: np.ndarray
    fed: np.ndarray


def norms(traced: Trace) -> Norms:
    return Norms(*(x.norm(dim=-1).numpy() for x in (traced.residuals, traced.attended, traced.fed)))


@dataclass
class Experts:
    """Where the routers sent the tokens.

    chosen  (L, T, K) experts of each token, the weightiest first
    weight  (L, T, K) their weights in the sum
    load    (L, E) share of a layer's T K choices that fell on each expert: 1 / E where all get the same
    """

    chosen: np.ndarray
    weight: np.ndarray
    load: np.ndarray


def experts(model, traced: Trace) -> Experts:
    """UserError for a dense model."""
    if traced.router is None:
        raise UserError("this model has no experts: it is dense")
    config, (L, T, E) = model.config, traced.router.shape
    weight, chosen = route(traced.router.flatten(0, 1), config.num_experts_per_tok, config.norm_topk_prob)
    weight, order = weight.sort(dim=-1, descending=True)
    chosen = chosen.gather(-1, order).view(L, T, -1)
    load = torch.stack([layer.flatten().bincount(minlength=E) for layer in chosen]) / chosen[0].numel()
    return Experts(chosen.numpy(), weight.view(L, T, -1).numpy(), load.numpy())
