"""One forward pass over a text, and all that happened in it.

The model is not changed: torch's forward hooks catch what its modules take and give, and are removed afterwards, also
when something fails. They catch what their own thread computes only, so one model may serve several readers.

Legend: T tokens, L layers, H query heads, G key/value heads, h width of a head, D width of the model, E experts,
V vocabulary.
"""

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention import packed_mask, repeat_heads, rotate
from model.moe import MoEFeedForward


@dataclass
class Trace:
    """What a forward pass over `ids` computed, on the CPU in float32.

    logits      (T, V): row t says what the model expects after token t
    residuals   (L + 1, T, D): the residual stream, as the embedding gives it and after each layer
    attended    (L, T, D): what the attention block of each layer added to it
    fed         (L, T, D): what the feed-forward block (or the experts) of each layer added to it
    attention   (L, H, T, T): row t says where token t looked, and sums to 1
    router      (L, T, E): the router's softmax over the experts; None for a dense model
    """

    ids: list[int]
    logits: Tensor
    residuals: Tensor
    attended: Tensor
    fed: Tensor
    attention: Tensor
    router: Tensor | None


@torch.no_grad()
def trace(model, ids: list[int], segment_ids: list[int] | None = None) -> Trace:
    """Looks into a model of ours while it reads `ids` (T,), in one pass.

    segment_ids (T,): the document each token belongs to (1..), as in packed rows: a token then looks at its own
    document alone, and positions begin anew with each. The model is left in the mode (training or not) it was in.
    """
    device, training = model.device, model.training
    segments = None if segment_ids is None else torch.tensor([segment_ids], device=device)
    model.eval()
    try:
        with Catcher(model, segments) as caught:
            out = model(input_ids=torch.tensor([ids], device=device), segment_ids=segments, use_cache=False)
    finally:
        model.train(training)
    return Trace(
        ids=list(ids),
        logits=here(out.logits[0]),
        residuals=here(torch.cat(caught.residuals)),
        attended=here(torch.cat(caught.attended)),
        fed=here(torch.cat(caught.fed)),
        attention=here(torch.stack(caught.attention)),
        router=here(torch.stack(caught.router)) if caught.router else None,
    )


def here(x: Tensor) -> Tensor:
    return x.float().cpu()


# --------------------------------------------------------------------------------------------------------- the hooks
@dataclass
class Heads:
    """Queries and keys of one layer, between their projections and the scores."""

    q: Tensor | None = None  # (1, T, H, h)
    k: Tensor | None = None  # (1, T, G, h)
    keys: Tensor | None = None  # (1, G, S, h), rotated, of all passes so far


@dataclass
class Catcher:
    """A context in which every forward pass of `model` (one row) by this thread leaves what it computed.

    Lists have an entry a layer. A pass may go on where the last one ended, as with a cache: its queries then look at
    the keys of the earlier passes too. `begin_pass` empties the lists, not the keys.
    """

    model: torch.nn.Module
    segment_ids: Tensor | None = None
    residuals: list[Tensor] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)
    fed: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    router: list[Tensor] = field(default_factory=list)

    def __enter__(self):
        self.thread, self.handles = threading.get_ident(), []
        try:
            self._add_hooks()
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(self, *error):
        self._remove_hooks()

    def begin_pass(self) -> None:
        for caught in (self.residuals, self.attended, self.fed, self.attention, self.router):
            caught.clear()

    def _add_hooks(self) -> None:
        decoder = self.model.model
        for layer in decoder.layers:
            self._before(layer, lambda args: self.residuals.append(args[0]))
            self._after(layer.mlp, lambda args, out: self.fed.append(out[0] if isinstance(out, tuple) else out))
            self._watch_attention(layer.self_attn)
            if isinstance(layer.mlp, MoEFeedForward):
                # The router's scores as moe.py makes them of what its projection gives.
                self._after(layer.mlp.gate, lambda args, out: self.router.append(out.softmax(-1, dtype=torch.float32)))
        self._before(decoder.norm, lambda args: self.residuals.append(args[0]))  # what the last layer left

    def _watch_attention(self, block) -> None:
        heads, width = Heads(), block.head_dim
        # Llama's queries are the projection's, Qwen3's go through a norm first.
        normed = block.config.qk_norm

        def caught_q(args, out):
            heads.q = out if normed else out.unflatten(-1, (-1, width))

        def caught_k(args, out):
            heads.k = out if normed else out.unflatten(-1, (-1, width))

        def done(args, out):
            self.attended.append(out)
            self.attention.append(self._weights(heads, cos=args[1], sin=args[2]))

        self._after(block.q_norm if normed else block.q_proj, caught_q)
        self._after(block.k_norm if normed else block.k_proj, caught_k)
        self._after(block, done)

    def _weights(self, heads: Heads, cos: Tensor, sin: Tensor) -> Tensor:
        """softmax(q k' / sqrt(h)), which the fast kernels of the model never write out: (H, T, S)."""
        q, k = (rotate(x.transpose(1, 2), cos, sin) for x in (heads.q, heads.k))  # (1, H, T, h), (1, G, T, h)
        heads.keys = k if heads.keys is None else torch.cat((heads.keys, k), dim=2)  # (1, G, S, h)
        H, T, S = q.shape[1], q.shape[2], heads.keys.shape[2]
        scores = q.float() @ repeat_heads(heads.keys, H).float().transpose(-1, -2) / q.shape[-1] ** 0.5  # (1, H, T, S)
        if self.segment_ids is not None:
            sees = packed_mask(self.segment_ids)
        else:
            # Query t of this pass is token S - T + t of the text.
            sees = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return scores.masked_fill(~sees, float("-inf")).softmax(dim=-1)[0]

    # ---------------------------------------------------------------------------------------- torch's hooks, in short
    def _before(self, module, catch) -> None:
        def hook(module, args):
            if threading.get_ident() == self.thread:
                catch(args)

        self.handles.append(module.register_forward_pre_hook(hook))

    def _after(self, module, catch) -> None:
        def hook(module, args, out):
            if threading.get_ident() == self.thread:
                catch(args, out)

        self.handles.append(module.register_forward_hook(hook))

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
