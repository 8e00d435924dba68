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

from inference.cache import StaticCache
from inference.sampling import Sampler, SamplingParams, choose
from inference.text import TextStream

CHUNK = 512  # tokens of one sequence in one pass: bounds the mask's memory and the wait of those who decode meanwhile
PREFILL_TOKENS = 2048  # tokens of one pass over several prompts


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
    """Up to `slots` sequences over one cache. Not for use by two threads at once."""

    def __init__(self, model, slots: int, capacity: int = 256):
        self.model, self.slots = model, slots
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.cache = StaticCache(slots, capacity)
        self.decoding: list[Sequence] = []  # the place in this list is the row in the cache
        self.joining: list[list[Sequence]] = []  # samples of one prompt together, first come first served
        self.prefilled = 0  # tokens of joining[0]'s prompt that are in row len(decoding) already

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
        """One token for every sequence that decodes, and one pass over waiting prompts; what each has gained.

        Finished sequences have left when this returns.
        """
        gained = self._decode() if self.decoding else []
        if self.joining:
            gained += self._prefill()
        for sequence, piece in gained:
            if piece.finish_reason:
                self.leave(sequence)
        return gained

    def leave(self, sequence: Sequence) -> None:
        """Frees the sequence's row at once, finished or not; the last row moves into the gap."""
        if sequence in self.decoding:
            row, last = self.decoding.index(sequence), len(self.decoding) - 1
            self.cache.copy_row(last, row, self.decoding[last].length)
            self.decoding[row] = self.decoding[last]
            del self.decoding[last]
            if self.prefilled:
                self.cache.copy_row(last + 1, last, self.prefilled)
            return
        for samples in self.joining:
            if sequence in samples:
                samples.remove(sequence)
                if not samples:
                    if samples is self.joining[0]:
                        self.prefilled = 0
                    self.joining.remove(samples)
                return

    def _decode(self) -> list[tuple[Sequence, Piece]]:
        tokens = torch.tensor([[s.token_ids[-1]] for s in self.decoding], device=self.device)
        lengths = [s.length for s in self.decoding]
        positions = torch.tensor(lengths, device=self.device).unsqueeze(-1)
        logits = self._forward(slice(0, len(lengths)), tokens, positions, max(lengths) + 1)
        return self._continue(self.decoding, logits)

    def _prefill(self) -> list[tuple[Sequence, Piece]]:
        """The first prompt's next chunk; or, where what is left of it fits into one, several short prompts at once."""
        first_row, start = len(self.decoding), self.prefilled
        head = self.joining[0][0].prompt
        if len(head) - start > CHUNK:
            tokens = torch.tensor([head[start : start + CHUNK]], device=self.device)
            positions = torch.arange(start, start + CHUNK, device=self.device).unsqueeze(0)
            self._forward(slice(first_row, first_row + 1), tokens, positions, start + CHUNK)
            self.prefilled += CHUNK
            return []
        group = self._next_prompts(len(head) - start)
        prompts = [samples[0].prompt for samples in group]
        rests = [prompts[0][start:], *prompts[1:]]
        starts = [start] + [0] * (len(group) - 1)
        T = max(map(len, rests))
        # Padding stands on the left, so that every prompt's last token, the one that predicts, is in the last column.
        tokens = torch.tensor([[0] * (T - len(rest)) + rest for rest in rests], device=self.device)
        positions = torch.tensor(
            [[-1] * (T - len(rest)) + list(range(begin, begin + len(rest)))
             for begin, rest in zip(starts, rests, strict=True)], device=self.device,
        )  # fmt: skip
        rows = slice(first_row, first_row + len(group))
        logits = self._forward(rows, tokens, positions, max(map(len, prompts)))

        del self.joining[: len(group)]
        self.prefilled = 0
        self.decoding += [samples[0] for samples in group]
        source = list(range(len(group)))
        for i, samples in enumerate(group):  # further samples of a prompt get copies of its row
            for sample in samples[1:]:
                self.cache.copy_row(first_row + i, len(self.decoding), len(sample.prompt))
                self.decoding.append(sample)
                source.append(i)
        return self._continue(self.decoding[first_row:], logits[source])

    def _next_prompts(self, first_length: int) -> list[list[Sequence]]:
        """Waiting prompts to read in one pass, the first among them; padding counts."""
        group, longest = [self.joining[0]], first_length
        for samples in self.joining[1:]:
            longest = max(longest, len(samples[0].prompt))
            if longest > CHUNK or longest * (len(group) + 1) > PREFILL_TOKENS:
                break
            group.append(samples)
        return group

    def _forward(self, rows: slice, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
        """tokens, positions (B, T) -> fp32 logits (B, V) of the last column."""
        mask = self.cache.look(rows, positions, span, self.dtype)
        output = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions.clamp(min=0), past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].float()

    def _continue(self, sequences: list[Sequence], logits: Tensor) -> list[tuple[Sequence, Piece]]:
        tokens = choose(logits, [s.sampler for s in sequences])
        logprobs = token_logprobs(logits, tokens, [s.params.logprobs for s in sequences])
        return [(s, s.accept(token, lp)) for s, token, lp in zip(list(sequences), tokens, logprobs, strict=True)]


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
