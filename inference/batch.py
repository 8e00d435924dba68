"""The running batch: sequences that share forward passes, join while others run and leave when they are done.

Legend: R rows of the cache, B sequences in a forward pass, T tokens of it a sequence, S tokens looked back on.

A prompt is read in one pass (or a few, if long), then every step adds one token to every sequence ("decode"). A
decode step reads all weights whatever the number of sequences, so sixteen together take little longer than one.
Rows of the cache are kept dense: sequences that decode have rows 0 to B-1, so keys and values are read in place.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.device import upload
from inference.cache import StaticCache
from inference.sampling import Sampler, SamplingParams, choose
from inference.stream_text import TextStream
from model.compat import CACHE

CHUNK = 512  # tokens of one prompt in one pass: bounds the mask's memory and the wait of those who decode meanwhile
PREFILL_TOKENS = 1024  # tokens of one pass over several short prompts, padding included


@dataclass
class TokenLogprob:
    """Log-probability (nats) of a generated token, and the best tokens of its place with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Piece:
    """What one step added to one sequence. `text` may be empty while a character or a stop string is incomplete."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None  # None while it goes on; "stop", "length" or "cancelled"
    index: int = 0  # which of the n samples


@dataclass(eq=False)
class Sequence:
    """One answer in the making. `request` is whatever the caller wants to find again."""

    request: object
    index: int
    params: SamplingParams
    prompt: list[int]
    limit: int  # tokens it may generate
    end_tokens: frozenset[int]
    sampler: Sampler
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        """Tokens it has in the cache: all but the newest, which the next step feeds in."""
        return len(self.prompt) + max(len(self.token_ids) - 1, 0)

    def accept(self, token: int, logprob: TokenLogprob | None) -> Piece:
        """Takes the next token; returns what it says."""
        self.token_ids.append(token)
        self.sampler.accept(token)
        ended = token in self.end_tokens
        text = "" if ended else self.stream.feed(token)
        if ended or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self.stream.finish()
        self.text += text
        if logprob is not None:
            self.logprobs.append(logprob)
        return Piece(text, [token], None if logprob is None else [logprob], self.finish_reason, self.index)


class Batch:
    """Up to `slots` sequences over one cache. Not for use by two threads at once.

    compiled: options of torch.compile, for a batch that lives long: decode steps then always have the same shapes
    (every slot, the cache's whole capacity) and run as one compiled graph, see CompiledStep.
    """

    def __init__(self, model, slots: int, capacity: int = 256, compiled: dict | None = None):
        self.model, self.slots = model, slots
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
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
        """Lets the samples of one prompt take part from the next step on; ValueError if there is no room."""
        if len(samples) > self.free:
            raise ValueError(f"{len(samples)} sequences do not fit into {self.free} free places of {self.slots}")
        self.joining.append(samples)

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Piece]]:
        """One token for every sequence that decodes, one pass over short prompts, one over a long one: what they gain.

        Finished sequences have left when this returns.
        """
        gained = self._decode() if self.decoding else []
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
            row, last = self.decoding.index(sequence), len(self.decoding) - 1
            self.cache.copy_row(last, row, self.decoding[last].length)
            self.decoding[row] = self.decoding[last]
            del self.decoding[last]
            return
        for samples in self.joining:
            if sequence in samples and len(samples) > 1:
                samples.remove(sequence)
                return
            elif sequence in samples:
                if samples is self._first_long():
                    self.read = 0
                self.joining.remove(samples)
                return

    def _decode(self) -> list[tuple[Sequence, Piece]]:
        lengths = [s.length for s in self.decoding]
        newest = [[s.token_ids[-1]] for s in self.decoding]
        if self.compiled:
            unused = self.slots - len(lengths)
            tokens, positions = newest + [[0]] * unused, [[n] for n in lengths] + [[-1]] * unused
            logits = self.compiled(self._tensor(tokens), self._tensor(positions), max(lengths) + 1)
            return self._continue(self.decoding, logits[: len(lengths)])
        tokens, positions = self._tensor(newest), self._tensor([[length] for length in lengths])
        logits = self._forward(slice(0, len(lengths)), tokens, positions, max(lengths) + 1)
        return self._continue(self.decoding, logits)

    def _first_long(self) -> list[Sequence] | None:
        return next((samples for samples in self.joining if is_long(samples)), None)

    def _short_prompts(self) -> list[list[Sequence]]:
        """The next prompts to read in one pass, first come first served."""
        group, longest = [], 0
        for samples in self.joining:
            if is_long(samples):
                continue
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
        logits = self._forward(rows, self._tensor(tokens), self._tensor(positions), T)
        return self._start(group, list(range(first, first + len(group))), logits)

    def _read_long(self, samples: list[Sequence]) -> list[tuple[Sequence, Piece]]:
        """The next chunk of a long prompt, into the last row: places are given out so that no other needs it yet."""
        prompt, begin = samples[0].prompt, self.read
        end = min(begin + CHUNK, len(prompt))
        row = self.slots - 1
        tokens, positions = self._tensor([prompt[begin:end]]), self._tensor([list(range(begin, end))])
        logits = self._forward(slice(row, row + 1), tokens, positions, end)
        self.read = end
        if end < len(prompt):
            return []
        self.read = 0
        return self._start([samples], [row], logits)

    def _start(self, group: list[list[Sequence]], rows: list[int], logits: Tensor) -> list[tuple[Sequence, Piece]]:
        """Prompts in `rows` are read, logits (prompts, V) predict their first tokens: their samples now decode.

        Every sample gets a copy of its prompt's row; the first samples of short prompts are in their places already.
        """
        for samples in group:
            self.joining.remove(samples)
        order = [(samples[0], i) for i, samples in enumerate(group)]
        order += [(sample, i) for i, samples in enumerate(group) for sample in samples[1:]]
        for sample, i in order:
            self.cache.copy_row(rows[i], len(self.decoding), len(sample.prompt))
            self.decoding.append(sample)
        logits = logits.index_select(0, self._tensor([i for _, i in order]))
        return self._continue([sample for sample, _ in order], logits)

    def _tensor(self, numbers: list) -> Tensor:
        return upload(numbers, self.device)

    def _forward(self, rows: slice, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """tokens, positions (B, T) -> fp32 logits (B, V) of the last column."""
        mask = self.cache.look(rows, positions, span, self.dtype)
        output = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions.clamp(min=0), use_cache=True,
            logits_to_keep=1, **{CACHE: self.cache},
        )  # fmt: skip
        return output.logits[:, -1].float()

    def _continue(self, sequences: list[Sequence], logits: Tensor) -> list[tuple[Sequence, Piece]]:
        tokens = choose(logits, [s.sampler for s in sequences])
        logprobs = token_logprobs(logits, tokens, [s.params.logprobs for s in sequences])
        return [(s, s.accept(token, lp)) for s, token, lp in zip(list(sequences), tokens, logprobs, strict=True)]


class CompiledStep:
    """A decode step as one graph. On CUDA a small model's step is hundreds of kernels of a few microseconds, and
    starting them takes longer than they do; torch.compile records them once (mode "reduce-overhead": CUDA graphs) and
    replays them. A graph is made for one shape and fixed memory, hence the fixed shapes; the cache's growth to twice
    its capacity makes a new one, half a minute each.
    """

    def __init__(self, model, cache: StaticCache, options: dict):
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
        self.cache.reserve(span)
        mask = self.cache.look_at_all(positions, self.cache.keys[0].dtype)
        if self._capacity != self.cache.capacity:
            self._capacity = self.cache.capacity
            for store in (*self.cache.keys, *self.cache.values):
                torch._dynamo.mark_static_address(store)  # written in place: without this CUDA graphs are not used
        torch.compiler.cudagraph_mark_step_begin()  # the last step's logits may be overwritten
        return self.step(tokens, positions.clamp(min=0), mask)


def is_long(samples: list[Sequence]) -> bool:
    return len(samples[0].prompt) > CHUNK


def token_logprobs(logits: Tensor, tokens: list[int], wanted: list[int | None]) -> list[TokenLogprob | None]:
    """logits (B, V): each chosen token's log-probability and the `wanted` best ones, None where not wanted."""
    if all(n is None for n in wanted):
        return list(itertools.repeat(None, len(tokens)))
    log_p = logits.log_softmax(dim=-1)
    best = log_p.topk(min(max(n or 0 for n in wanted), log_p.shape[-1]), dim=-1)
    result = []
    for row, (token, n) in enumerate(zip(tokens, wanted, strict=True)):
        top = list(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
        result.append(None if n is None else TokenLogprob(token, log_p[row, token].item(), top[:n]))
    return result
