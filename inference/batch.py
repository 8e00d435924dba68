"""The running batch and its key/value cache: sequences share forward passes, join while others run, leave when done.

Legend: R rows of the cache, B sequences in a forward pass, T tokens of it a sequence, C capacity in tokens, S tokens
that queries may look back on, G key/value heads, h width of a head, V vocabulary.

A decoder needs the keys and values of all earlier tokens at every step. Recomputing them makes n tokens cost n^2
forward passes of one token; keeping them makes it n. transformers' own cache concatenates a new, longer tensor at
every step; StaticCache writes into memory it already has. Attention sees the same interface, `update(k, v, layer)`,
so the model does not know which cache it is given.

A prompt is read in one pass (or a few, if long), then every step adds one token to every sequence ("decode"). A
decode step reads all weights whatever the number of sequences, so sixteen together take little longer than one.
Rows of the cache are kept dense: sequences that decode have rows 0 to B-1, so keys and values are read in place.
"""

import torch
from torch import Tensor

from common.device import upload
from inference.adapters import Adapters
from inference.compiled_step import CompiledStep
from inference.sampling import choose, token_logprobs
from inference.stream_text import Piece, Sequence
from model.compat import CACHE

CHUNK = 512  # tokens of one prompt in one pass: bounds the mask's memory and the wait of those who decode meanwhile
PREFILL_TOKENS = 1024  # tokens of one pass over several short prompts, padding included


class StaticCache:
    """Keys and values of R rows, up to C tokens each; C grows by doubling when `reserve` asks for more.

    Token j of a row stands at place j, whatever the other rows hold, so rows of unequal lengths lie side by side
    without padding between their tokens. Before each forward pass look() is told which rows take part and which
    position each token has. The mask it returns hides every place that a token must not see.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, max(capacity, 1)
        self.keys: list[Tensor] = []  # for each layer (R, C, G, h), made at the first update, when shapes are known
        self.values: list[Tensor] = []
        # Set by look() for the forward pass that follows it, and read by update() in every layer of that pass:
        self._rows: slice | Tensor = slice(0)  # the rows the pass is about
        self._span = 0  # how many places of them it looks at
        self._write: Tensor | None = None  # where its new tokens go, as indices into (R C,)
        self._not_padding: Tensor | None = None  # which of its B T tokens are written; None: all

    def reserve(self, tokens: int) -> None:
        """Makes room for rows of so many tokens and keeps what they hold."""
        if tokens <= self.capacity:
            return
        # At least doubled: n tokens then cost O(n) of copying in all. One token more each time would cost O(n^2).
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
        # Keys are written through a view (R C, G h), so the place of token j in row r is r C + j.
        row = torch.arange(self.rows, device=positions.device)[rows].unsqueeze(-1)  # (B, 1)
        place = (row * self.capacity + positions).flatten()
        self._not_padding = None
        if positions.shape[1] > 1:  # a single token is never padding; asking would make each new token wait for the GPU
            self._not_padding = (positions.flatten() >= 0).nonzero().flatten()
            place = place[self._not_padding]
        self._write = place
        return self._mask(positions, dtype)

    def look_at_all(self, positions: Tensor, dtype=torch.float32) -> Tensor:
        """look() for a compiled step: one token in every row but the last, positions (R - 1, 1), -1 for an unused row.

        The shapes are the same in every step, because a compiled graph has fixed shapes. So an unused row takes part:
        what it writes goes to the last row, which belongs to no sequence. And the mask (R - 1, 1, 1, C) covers the
        whole capacity, most of it hidden.
        """
        spare, row = self.rows - 1, torch.arange(self.rows - 1, device=positions.device)
        place = torch.where(positions.flatten() < 0, spare * self.capacity, row * self.capacity + positions.flatten())
        self._rows, self._span, self._write, self._not_padding = slice(0, spare), self.capacity, place, None
        return self._mask(positions, dtype)

    def _mask(self, positions: Tensor, dtype) -> Tensor:
        # Padding is treated as position 0: with -inf in all places its softmax would be NaN. Its result is not used.
        hidden = torch.arange(self._span, device=positions.device) > positions.clamp(min=0).unsqueeze(-1)  # (B, T, S)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        return mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)

    def update(self, k: Tensor, v: Tensor, layer: int, *unused, **unused_too) -> tuple[Tensor, Tensor]:
        """k, v (B, G, T, h) of the new tokens -> keys and values (B, G, S, h) of all tokens so far.

        Called once a layer by attention. The other arguments are those that transformers' classes pass to other caches.
        """
        while len(self.keys) <= layer:
            # Made here, when the shapes are known, and each in its own type: under autocast k and v may differ.
            for store, x in ((self.keys, k), (self.values, v)):
                store.append(x.new_zeros(self.rows, self.capacity, x.shape[1], x.shape[3]))
        return self._put(self.keys[layer], k), self._put(self.values[layer], v)

    def _put(self, store: Tensor, x: Tensor) -> Tensor:
        new = x.transpose(1, 2).reshape(-1, store.shape[2] * store.shape[3])  # (B T, G h), token after token
        if self._not_padding is not None:
            new = new[self._not_padding]  # padding has position -1: its place would be one of another row
        store.view(self.rows * self.capacity, -1).index_copy_(0, self._write, new)
        return store[self._rows, : self._span].transpose(1, 2)  # a view: with rows as a slice nothing is copied

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Gives row `target` the first `length` tokens of row `source`."""
        if source != target:
            for store in (*self.keys, *self.values):
                store[target, :length] = store[source, :length]

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks this where it is given no position_ids; the engine always gives them."""
        return self._span


class Batch:
    """Up to `slots` sequences over one cache. Two threads must not use it at the same time.

    compiled: options of torch.compile, for the batch of a server. Decode steps then have the same shapes every time
    (all slots, the cache's whole capacity) and run as one compiled graph, see CompiledStep.
    adapters: those of the model, if it has any; each sequence has one of them or none.
    """

    def __init__(
        self, model, slots: int, capacity: int = 256, compiled: dict | None = None, adapters: Adapters | None = None
    ):
        self.model, self.slots, self.adapters = model, slots, adapters or Adapters()
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        # A compiled step runs every slot, used or not: unused ones write to one row more.
        self.cache = StaticCache(slots + (compiled is not None), capacity)
        self.compiled = None if compiled is None else CompiledStep(model, self.cache, compiled)
        self.decoding: list[Sequence] = []  # the place in this list is the row in the cache
        self.joining: list[list[Sequence]] = []  # samples of one prompt together, first come first served
        self.read = 0  # tokens of the first long prompt that are in the cache's last row already

    @property
    def free(self) -> int:
        return self.slots - len(self.decoding) - sum(map(len, self.joining))

    @property
    def busy(self) -> bool:
        return bool(self.decoding or self.joining)

    def join(self, samples: list[Sequence]) -> None:
        """Takes in the samples of one prompt; the next step reads it. ValueError if there is no room."""
        if len(samples) > self.free:
            raise ValueError(f"{len(samples)} sequences do not fit into {self.free} free places of {self.slots}")
        self.joining.append(samples)

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Piece]]:
        """At most three forward passes: a token for every sequence that decodes, short prompts, a part of a long one.

        Returns the pieces with their sequences. Finished sequences have left the batch by then.
        """
        # Decoding comes first: a prompt read in this step joins self.decoding with its first token and must not get
        # a second one.
        gained = self._decode() if self.decoding else []
        # One pass over prompts a step: those who decode wait for it, so it must stay short.
        short = self._short_prompts()
        if short:
            gained += self._read_short(short)
        long = self._first_long()
        if long:
            gained += self._read_long(long)
        for sequence, piece in gained:
            if piece.finish_reason:
                self.leave(sequence)
        return gained

    @torch.inference_mode()
    def leave(self, sequence: Sequence) -> None:
        """Frees the sequence's row at once, finished or not; the last row moves into the gap."""
        if sequence in self.decoding:
            # Rows stay dense, so that a decode step can take them as a slice: the last sequence moves into the gap.
            row, last = self.decoding.index(sequence), len(self.decoding) - 1
            self.cache.copy_row(last, row, self.decoding[last].length)
            self.decoding[row] = self.decoding[last]
            del self.decoding[last]
            return
        # Its prompt has not been read. The other samples of the prompt, if any, still wait for that.
        for samples in self.joining:
            if sequence in samples and len(samples) > 1:
                samples.remove(sequence)
                return
            elif sequence in samples:
                if samples is self._first_long():
                    self.read = 0  # or the next long prompt would be read from the middle
                self.joining.remove(samples)
                return

    def _decode(self) -> list[tuple[Sequence, Piece]]:
        # The newest token of each is not in the cache yet: its place is the sequence's length there.
        lengths = [s.length for s in self.decoding]
        newest = [[s.token_ids[-1]] for s in self.decoding]
        if self.compiled:  # one shape for every step, whoever decodes
            unused = self.slots - len(lengths)
            tokens, positions = newest + [[0]] * unused, [[n] for n in lengths] + [[-1]] * unused
            with self.adapters.rows([s.params.adapter for s in self.decoding] + [None] * unused):
                logits = self.compiled(self._tensor(tokens), self._tensor(positions), max(lengths) + 1)
            return self._continue(self.decoding, logits[: len(lengths)])
        tokens, positions = self._tensor(newest), self._tensor([[length] for length in lengths])
        logits = self._forward(self.decoding, slice(0, len(lengths)), tokens, positions, max(lengths) + 1)
        return self._continue(self.decoding, logits[:, -1])

    def _first_long(self) -> list[Sequence] | None:
        return next((samples for samples in self.joining if is_long(samples)), None)

    def _short_prompts(self) -> list[list[Sequence]]:
        """The next prompts to read in one pass, first come first served."""
        group, longest = [], 0
        for samples in self.joining:
            if is_long(samples):
                continue
            # All are padded to the longest: what counts is the rectangle, not the sum of the lengths.
            longest = max(longest, len(samples[0].prompt))
            if group and longest * (len(group) + 1) > PREFILL_TOKENS:
                break
            group.append(samples)
        return group

    def _read_short(self, group: list[list[Sequence]]) -> list[tuple[Sequence, Piece]]:
        """Whole prompts in one pass, into the rows after those that decode."""
        prompts = [samples[0].prompt for samples in group]
        first, T = len(self.decoding), max(map(len, prompts))
        # Padding stands on the left, so that every prompt's last token, the one that predicts, is in the last column.
        tokens = [[0] * (T - len(prompt)) + prompt for prompt in prompts]
        positions = [[-1] * (T - len(prompt)) + list(range(len(prompt))) for prompt in prompts]
        rows = slice(first, first + len(group))
        readers = [samples[0] for samples in group]
        logits = self._forward(readers, rows, self._tensor(tokens), self._tensor(positions), T)
        return self._start(group, list(range(first, first + len(group))), logits[:, -1])

    def _read_long(self, samples: list[Sequence]) -> list[tuple[Sequence, Piece]]:
        """The next chunk of a long prompt, into the last row.

        Every sample that joins has been counted in `free`, so the rows in use never reach the last one while a long
        prompt waits.
        """
        prompt, begin = samples[0].prompt, self.read
        end = min(begin + CHUNK, len(prompt))
        row = self.slots - 1
        tokens, positions = self._tensor([prompt[begin:end]]), self._tensor([list(range(begin, end))])
        wanted = samples[0].params.prompt_logprobs
        keep = 1 if wanted is None else end - begin
        logits = self._forward(samples[:1], slice(row, row + 1), tokens, positions, end, keep)
        self.read = end
        if wanted is not None:  # each column predicts the next token; what the prompt's last one predicts is the answer
            target = prompt[begin + 1 : end + 1]
            samples[0].prompt_logprobs += token_logprobs(logits[0, : len(target)], target, [wanted] * len(target))
        if end < len(prompt):
            return []
        self.read = 0
        return self._start([samples], [row], logits[:, -1])

    def _start(self, group: list[list[Sequence]], rows: list[int], logits: Tensor) -> list[tuple[Sequence, Piece]]:
        """Lets the samples of prompts decode, once the prompts are in `rows`; logits (prompts, V): their last columns.

        Every sample gets a copy of its prompt's row. The first samples of short prompts are in their places already.
        """
        for samples in group:
            self.joining.remove(samples)
        # The first sample of every prompt before the second of any: row i of the pass is then the place of sample i,
        # and no copy overwrites a prompt that another sample still needs.
        order = [(samples[0], i) for i, samples in enumerate(group)]
        order += [(sample, i) for i, samples in enumerate(group) for sample in samples[1:]]
        for sample, i in order:
            self.cache.copy_row(rows[i], len(self.decoding), len(sample.prompt))
            self.decoding.append(sample)
        logits = logits.index_select(0, self._tensor([i for _, i in order]))  # samples of a prompt share its logits
        return self._continue([sample for sample, _ in order], logits)

    def _tensor(self, numbers: list) -> Tensor:
        return upload(numbers, self.device)

    def _forward(
        self, sequences: list[Sequence], rows: slice, tokens: Tensor, positions: Tensor, span: int, keep: int = 1
    ) -> Tensor:
        """tokens, positions (B, T) of B sequences -> fp32 logits (B, keep, V) of the last columns."""
        mask = self.cache.look(rows, positions, span, self.dtype)
        # keep=1 as a rule: only the last column predicts something new, so the output layer runs for it alone.
        with self.adapters.rows([s.params.adapter for s in sequences]):
            output = self.model(
                input_ids=tokens, attention_mask=mask, position_ids=positions.clamp(min=0), use_cache=True,
                logits_to_keep=keep, **{CACHE: self.cache},
            )  # fmt: skip
        return output.logits.float()

    def _continue(self, sequences: list[Sequence], logits: Tensor) -> list[tuple[Sequence, Piece]]:
        tokens = choose(logits, [s.sampler for s in sequences])
        logprobs = token_logprobs(logits, tokens, [s.params.logprobs for s in sequences])
        return [(s, s.accept(token, lp)) for s, token, lp in zip(list(sequences), tokens, logprobs, strict=True)]


def is_long(samples: list[Sequence]) -> bool:
    """Whether the prompt is read by itself, part by part: also where the logits of all its tokens are asked for."""
    return len(samples[0].prompt) > CHUNK or samples[0].params.prompt_logprobs is not None
