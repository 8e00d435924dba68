"""What the model expects at every place of a text, and what would have followed another token.

Row t of everything here is about the token after token t: the rivals of token t stand in row t - 1.

Legend: T tokens, n best ones, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, user_errors
from inference.engine import Engine
from inference.sampling import SamplingParams, filtered
from inference.stream_text import Completion, Piece
from inspection.tokens import own_model, read
from inspection.trace import Catcher, Trace, here


@dataclass
class NextTokens:
    """What is expected after each token of a text; log-probabilities and entropies in nats.

    best            (T, n) token ids, the most probable first
    probability     (T, n) theirs, as the model has them
    drawn           (T, n) theirs under the temperature and the filters of the sampling
    entropy         (T,) of the model's own distribution: 0 where it is certain, log V where it knows nothing
    came            (T,) log-probability of the token that does come next; NaN in the last row, where none does
    came_rank       (T,) how many tokens are more probable than that one; -1 in the last row
    """

    best: np.ndarray
    probability: np.ndarray
    drawn: np.ndarray
    entropy: np.ndarray
    came: np.ndarray
    came_rank: np.ndarray


def next_tokens(traced: Trace, n: int = 10, params: SamplingParams | None = None) -> NextTokens:
    """The n best tokens at every place. params: of the sampling (temperature, top_p, top_k, min_p); None: as it is."""
    if n < 1:
        raise UserError(f"at least 1 token is shown at a place, not {n}")
    log_p = traced.logits.log_softmax(dim=-1)  # (T, V)
    best = log_p.topk(min(n, log_p.shape[-1]), dim=-1)
    drawn = distribution(traced.logits, params or SamplingParams())
    came, rank = what_came(log_p, traced.ids)
    return NextTokens(
        best=best.indices.numpy(),
        probability=best.values.exp().numpy(),
        drawn=drawn.gather(-1, best.indices).numpy(),
        entropy=torch.special.entr(log_p.exp()).sum(dim=-1).numpy(),  # entr(p) = -p log p, 0 at 0
        came=came.numpy(),
        came_rank=rank.numpy(),
    )


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """(T, V) logits -> the probabilities that tokens are drawn with, by the sampler's own functions.

    Temperature 0 takes the best token always: its probability is 1.
    """
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return filtered(logits, [params] * len(logits)).softmax(dim=-1)


def what_came(log_p: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probability and rank (T,) of each token that follows in `ids`, given the log-probabilities (T, V)."""
    targets = torch.tensor(ids[1:], dtype=torch.long).unsqueeze(-1)  # (T - 1, 1): row t is asked for token t + 1
    came = torch.full((len(ids),), float("nan"))
    rank = torch.full((len(ids),), -1)
    chosen = log_p[:-1].gather(-1, targets)
    came[:-1], rank[:-1] = chosen.squeeze(-1), (log_p[:-1] > chosen).sum(dim=-1)
    return came, rank


# ----------------------------------------------------------------------------------------------------------- what if
def what_if(engine: Engine, ids: list[int], place: int, token: int, params: SamplingParams) -> Completion:
    """What the model would go on with if `token` stood at `place` of `ids`, in place of what stands there.

    place: from 1, the first token has no rivals, to len(ids), the token that would come next. Raises UserError.
    """
    if not 1 <= place <= len(ids):
        raise UserError(f"place {place} has no rivals; places run from 1 to {len(ids)}")
    with user_errors():
        return engine.generate([[*ids[:place], token]], params)[0]


@dataclass
class NewToken:
    """One token as it is generated, and where the position that predicted it looked.

    piece       the engine's: token id, the text that has become certain, log-probability and the best ones (where
                params.logprobs asks for them), why it ended
    attention   (L, H, S): S tokens stood before it
    """

    piece: Piece
    attention: np.ndarray


def watch(engine: Engine, text, params: SamplingParams) -> Iterator[NewToken]:
    """Generates one answer to `text` (see tokens.read) and looks on. Whoever stops iterating stops it.

    The rows are those of the attention maps of the whole text: what a token looks at is settled when it is read.
    """
    ids = read(engine, text)
    if params.n != 1:
        raise UserError(f"one answer at a time can be watched, not {params.n}")
    own_model(engine)
    with user_errors(), Catcher(engine.model) as caught:  # what runs: on a CPU a copy of it with packed weights
        for piece in engine.stream(ids, params):
            rows = [weights[:, -1] for weights in caught.attention]  # (H, S) of each layer: those of the last token
            caught.begin_pass()
            yield NewToken(piece, here(torch.stack(rows)).numpy())
