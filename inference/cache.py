"""The key/value cache: memory given out once, each row at its own length, rows that come and go.

Legend: R rows of the cache, B rows of one forward pass, T tokens of it, C capacity in tokens, S tokens that queries
may look back on, G key/value heads, h width of a head.

A decoder needs the keys and values of all earlier tokens at every step. Recomputing them makes n tokens cost n^2
forward passes of one token; keeping them makes it n. transformers' own cache concatenates a new, longer tensor at
every step; this one writes into memory it already has. Attention sees the same interface, `update(k, v, layer)`, so
the model does not know which cache it is given.
"""

import torch
from torch import Tensor


class StaticCache:
    """Keys and values of R rows, up to C tokens each; C grows by doubling when `reserve` asks for more.

    Token j of a row stands at place j, whatever the other rows hold, so rows of unequal lengths lie side by side
    without padding between their tokens. Before each forward pass `look` says which rows it is about and which
    position each token has; the mask it returns hides all places a token must not see.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, max(capacity, 1)
        self.keys: list[Tensor] = []  # for each layer (R, C, G, h), made at the first update, when shapes are known
        self.values: list[Tensor] = []
        self._rows: slice | Tensor = slice(0)
        self._span = 0
        self._write: Tensor | None = None
        self._real: Tensor | None = None

    def reserve(self, tokens: int) -> None:
        """Makes room for rows of so many tokens; what they hold stays."""
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens, 2 * self.capacity)
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                store[i] = old.new_zeros(self.rows, self.capacity, *old.shape[2:])
                store[i][:, : old.shape[1]] = old

    def look(self, rows: slice | Tensor, positions: Tensor, span: int, dtype=torch.float32) -> Tensor:
        """Sets which rows (B of them) the next forward pass reads and writes; returns its attention mask.

        positions (B, T): place of each token in its row, -1 for padding, which is neither written nor seen.
        span: one more than the largest position. The mask (B, 1, T, S) is added to the attention scores: 0 for places
        up to the token's own, -inf for later ones, which hold nothing yet or what an earlier user left.
        """
        self.reserve(span)
        self._rows, self._span = rows, span
        row = torch.arange(self.rows, device=positions.device)[rows].unsqueeze(-1)  # (B, 1)
        place = (row * self.capacity + positions).flatten()
        self._real = None
        if positions.shape[1] > 1:  # a single token is never padding; asking would make each new token wait for the GPU
            self._real = (positions.flatten() >= 0).nonzero().flatten()
            place = place[self._real]
        self._write = place
        return self._mask(positions, dtype)

    def look_at_all(self, positions: Tensor, dtype=torch.float32) -> Tensor:
        """`look` for one token (positions (R - 1, 1)) in every row but the last, which shapes never depend on.

        A row at -1 has no token; what its pass leaves goes to the last row, which nobody may use. The mask is (R - 1,
        1, 1, C): all of the capacity is looked at, most of it hidden.
        """
        spare, row = self.rows - 1, torch.arange(self.rows - 1, device=positions.device)
        place = torch.where(positions.flatten() < 0, spare * self.capacity, row * self.capacity + positions.flatten())
        self._rows, self._span, self._write, self._real = slice(0, spare), self.capacity, place, None
        return self._mask(positions, dtype)

    def _mask(self, positions: Tensor, dtype) -> Tensor:
        hidden = torch.arange(self._span, device=positions.device) > positions.clamp(min=0).unsqueeze(-1)  # (B, T, S)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        return mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)

    def update(self, k: Tensor, v: Tensor, layer: int, *unused, **unused_too) -> tuple[Tensor, Tensor]:
        """k, v (B, G, T, h) of the new tokens -> keys and values (B, G, S, h) of all tokens so far.

        transformers' own classes pass more, by place or by name, for caches of other kinds.
        """
        while len(self.keys) <= layer:
            for store, x in ((self.keys, k), (self.values, v)):  # each of its own type: autocast may leave two
                store.append(x.new_zeros(self.rows, self.capacity, x.shape[1], x.shape[3]))
        return self._put(self.keys[layer], k), self._put(self.values[layer], v)

    def _put(self, store: Tensor, x: Tensor) -> Tensor:
        new = x.transpose(1, 2).reshape(-1, store.shape[2] * store.shape[3])  # (B*T, G*h)
        if self._real is not None:
            new = new[self._real]
        store.view(self.rows * self.capacity, -1).index_copy_(0, self._write, new)
        return store[self._rows, : self._span].transpose(1, 2)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Gives row `target` the first `length` tokens of row `source`."""
        if source != target:
            for store in (*self.keys, *self.values):
                store[target, :length] = store[source, :length]

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks this where it is given no position_ids; the engine always gives them."""
        return self._span
