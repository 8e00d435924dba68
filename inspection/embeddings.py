"""The embedding as a space: which tokens lie near one another, and a flat map of some of them.

Legend: n tokens, D width of the model, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import UserError


@dataclass
class Neighbour:
    token: int
    cosine: float  # 1: the same direction, 0: nothing in common, -1: opposite


@torch.no_grad()
def neighbours(model, token: int, n: int = 10) -> list[Neighbour]:
    """The n tokens whose embeddings point most nearly the way of this one's, itself left out."""
    table = embedding(model, [token])
    cosine = F.cosine_similarity(table[token].unsqueeze(0), table, dim=-1)  # (V,)
    cosine[token] = -float("inf")
    best = cosine.topk(min(n, len(table) - 1))
    return [Neighbour(i, x) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@dataclass
class Map:
    """A flat picture of n tokens.

    points      (n, 2) coordinates
    explained   share of the tokens' variance that the two axes hold: what the picture does not show is the rest
    """

    tokens: list[int]
    points: np.ndarray
    explained: float


@torch.no_grad()
def embedding_map(model, tokens: list[int]) -> Map:
    """Principal components (Pearson 1901): the plane through the tokens' mean on which they are spread most."""
    table = embedding(model, tokens)
    if len(tokens) < 3:
        raise UserError(f"a map needs at least 3 tokens, not {len(tokens)}")
    vectors = table[tokens] - table[tokens].mean(dim=0)  # (n, D)
    left, size, axes = torch.linalg.svd(vectors, full_matrices=False)
    # An axis may point either way; the larger coordinate of it is made positive, so that the map is always the same.
    sign = axes[:2].gather(-1, axes[:2].abs().argmax(dim=-1, keepdim=True)).sign().flatten()
    points = left[:, :2] * size[:2] * sign
    explained = size[:2].square().sum() / size.square().sum().clamp(min=1e-30)
    return Map(list(tokens), points.numpy(), explained.item())


def embedding(model, tokens: list[int]) -> torch.Tensor:
    """The table (V, D), after a look at whether it has these tokens."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    for token in tokens:
        if not 0 <= token < len(table):
            raise UserError(f"token id {token} does not exist; ids run from 0 to {len(table) - 1}")
    return table
