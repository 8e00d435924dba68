"""Decode steps as CUDA graphs, for the server's --compile."""

import torch
from torch import Tensor

from model.compat import CACHE


class CompiledStep:
    """A decode step as one graph.

    On CUDA a step of a small model is hundreds of kernels of a few microseconds, and starting them takes longer than
    running them. torch.compile records them once (mode "reduce-overhead": CUDA graphs) and replays them. A graph
    belongs to fixed shapes and fixed memory. So the shapes are always the same, and each time the cache doubles its
    capacity a new graph is compiled, which takes about half a minute.
    """

    def __init__(self, model, cache, options: dict):
        self.model, self.cache = model, cache
        self.step = torch.compile(self._logits, dynamic=False, **options)
        self._capacity = 0

    def _logits(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        output = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{CACHE: self.cache},
        )  # fmt: skip
        return output.logits[:, -1].float()

    def __call__(self, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """tokens, positions (slots, 1), -1 where a slot is unused -> fp32 logits (slots, V)."""
        self.cache.reserve(span)  # may move the cache to new tensors, which the graph has to be told below
        mask = self.cache.look_at_all(positions, self.cache.keys[0].dtype)
        if self._capacity != self.cache.capacity:
            self._capacity = self.cache.capacity
            for store in (*self.cache.keys, *self.cache.values):
                torch._dynamo.mark_static_address(store)  # written in place: without this CUDA graphs are not used
        torch.compiler.cudagraph_mark_step_begin()  # the last step's logits may be overwritten
        return self.step(tokens, positions.clamp(min=0), mask)
