"""From logits to the next token: what a request may ask for, and the functions that do it.

Legend: B rows (sequences generated side by side), V vocabulary. Every function takes and returns logits (B, V), and
takes its parameter once for each row, so requests with different parameters share a batch.
"""

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.device import upload
from inference.bad_words import BadWords
from inference.characters import Characters
from inference.grammar import Grammar
from inference.token_mask import Matcher, keep_allowed


@dataclass
class SamplingParams:
    """What one request asks for. Raises ValueError, in a sentence, for values out of range.

    max_tokens          tokens to generate at most; None: what fits into the context; 0 only with prompt_logprobs
    temperature         logits are divided by it; 0: always the best token (greedy), top_k to min_p then do nothing
    top_k               only the k best tokens; 0: all
    top_p               only the best tokens that together hold this probability (nucleus, arXiv 1904.09751)
    min_p               only tokens at least this fraction as probable as the best (arXiv 2407.01082)
    repetition_penalty  tokens of prompt and answer so far: logits divided by it if positive, multiplied if negative
                        (CTRL, arXiv 1909.05858); 1: none
    presence_penalty    subtracted from the logits of tokens the answer has (OpenAI's definition)
    frequency_penalty   subtracted as often as the answer has the token
    logit_bias          {token id: number added to its logit}
    seed                same seed, same answer, whatever else is in the batch; None: a new one each time
    stop                strings that end the answer; they and what follows are not part of its text
    include_stop        the stop string, or the text of the token in stop_token_ids, is part of the text
    stop_token_ids      tokens that end the answer, besides the model's own
    allowed_token_ids   nothing but these tokens; None: any
    bad_words           texts that must not stand in the answer, however tokens spell them
    logprobs            report the log-probability of each token and of so many best ones; None: do not. They are the
                        model's own, before temperature, penalties and filters
    prompt_logprobs     the same for the prompt: of each of its tokens but the first
    n                   answers to the one prompt
    ignore_eos          the model's own end token does not end the answer
    whole_characters    tokens that would leave a character incomplete are not chosen, see inference.characters
    grammar             what the answer must match, a think block before it apart; an answer that has come to its
                        grammar's end ends
    adapter             name of the adapter that answers, see Engine.adapters; None: as the model computes by itself
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    include_stop: bool = False
    stop_token_ids: list[int] = field(default_factory=list)
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = field(default_factory=list)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False
    whole_characters: bool = False
    grammar: Grammar | None = None
    adapter: str | None = None

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.top_k = self.top_k or 0
        faults = []  # all are reported together

        def check(name: str, what: str, holds) -> None:
            value = getattr(self, name)
            # True is an int in Python, and NaN passes comparisons that it should not.
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not holds(value):
                faults.append(f"{name} must be {what}, not {value!r}")

        if self.max_tokens is not None:
            least = 1 if self.prompt_logprobs is None else 0
            check("max_tokens", f"a whole number of at least {least}", lambda x: isinstance(x, int) and x >= least)
        check("temperature", "0 or more", lambda x: x >= 0)
        check("top_k", "a whole number of at least 0", lambda x: isinstance(x, int) and x >= 0)
        check("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1)
        check("min_p", "from 0 to 1", lambda x: 0 <= x <= 1)
        check("repetition_penalty", "above 0", lambda x: x > 0)
        check("presence_penalty", "a number", lambda x: True)
        check("frequency_penalty", "a number", lambda x: True)
        check("n", "a whole number of at least 1", lambda x: isinstance(x, int) and x >= 1)
        if self.seed is not None:
            check("seed", "a whole number", lambda x: isinstance(x, int))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check(name, "a whole number of at least 0", lambda x: isinstance(x, int) and x >= 0)
        if not all(isinstance(s, str) and s for s in self.stop):
            faults.append(f"stop must be strings of at least one character, not {self.stop!r}")
        if not all(isinstance(word, str) and word for word in self.bad_words):
            faults.append(f"bad_words must be strings of at least one character, not {self.bad_words!r}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            faults.append("allowed_token_ids must name a token")
        # Each leaves some token to go on with. Two of them together may leave none.
        limits = [name for name in ("grammar", "allowed_token_ids", "bad_words") if getattr(self, name)]
        if len(limits) > 1:
            faults.append(f"{' and '.join(limits)} cannot be held together; ask for one of them")
        if not all(isinstance(b, int | float) and math.isfinite(b) for b in self.logit_bias.values()):
            faults.append("logit_bias must map token ids to numbers")
        if not isinstance(self.grammar, Grammar | None):
            faults.append(f"grammar must be a Grammar, as Grammar.json(schema) makes it, not {self.grammar!r:.60}")
        if faults:
            raise ValueError("; ".join(faults))

    def check_tokens(self, vocab_size: int) -> None:
        """ValueError where a token id the request names does not exist."""
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                if not isinstance(token, int) or not 0 <= token < vocab_size:
                    raise ValueError(f"{name} names token {token!r}; ids run from 0 to {vocab_size - 1}")


# ------------------------------------------------------------------------------------------------- on logits (B, V)
def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """seen (B, V) bool, penalty (B, 1). Negative logits are multiplied: dividing would raise them."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_counts(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """counts (B, V): how often the answer has each token; presence, frequency (B, 1)."""
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits: Tensor, k: list[int]) -> Tensor:
    """All but the k best logits of each row become -inf; 0 keeps all. Ties with the k-th best are kept."""
    V = logits.shape[-1]
    k = [min(n, V) if n > 0 else V for n in k]
    # One topk for the largest k; each row then looks up its own k-th best logit.
    best = logits.topk(max(k), dim=-1).values
    worst_kept = best.gather(-1, upload([[n - 1] for n in k], logits.device))  # (B, 1)
    return logits.masked_fill(logits < worst_kept, float("-inf"))


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keeps a token if those more probable than it hold less than p together; p (B, 1).

    On a CPU the best 256 are tried first, since few tokens are kept as a rule and sorting a whole vocabulary of 6,400
    takes several times longer. A GPU sorts all at once: asking it whether 256 were enough would take longer.
    """
    # `total` is over the whole vocabulary, so probabilities of the best few are true ones however few are sorted.
    total, V = logits.logsumexp(dim=-1, keepdim=True), logits.shape[-1]
    for width in (V,) if logits.is_cuda else (min(256, V), V):
        best = logits.topk(width, dim=-1)
        chance = (best.values - total).exp()
        before = chance.cumsum(dim=-1) - chance  # of the more probable ones; 0 for the best, which always stays
        if width == V or bool(((before[:, -1:] >= p) | (p >= 1)).all()):
            break
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best.indices, before < p)
    return logits.masked_fill(~(keep | (p >= 1)), float("-inf"))


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keeps tokens whose probability is at least p times the best one's; p (B, 1)."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + p.log(), float("-inf"))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row from softmax(logits), by inverting the distribution function at `uniform` (B, 1) in [0, 1).

    It takes one random number a row. So a draw depends on the row's own numbers, not on the shape of the batch, as it
    would with torch.multinomial.
    """
    # In double, so that summing thousands of small probabilities loses none of them.
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)  # (B, V), the last one 1 up to rounding
    # The first token whose cumulative probability exceeds the random number. right=True passes over those of width 0.
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return token.clamp(max=logits.shape[-1] - 1).squeeze(-1)


# --------------------------------------------------------------------------------------------------- a row's sampler
class Sampler:
    """The state of one sequence's sampling: random numbers, tokens it has had, place in its grammar and character."""

    def __init__(
        self, params: SamplingParams, prompt: list[int], sample: int, vocab_size: int, matcher: Matcher | None = None,
        words: BadWords | None = None, characters: Characters | None = None,
    ):  # fmt: skip
        self.params, self.vocab_size = params, vocab_size
        self.matcher, self.words, self.characters = matcher, words, characters
        self.state = characters.state(prompt) if characters else None  # of the character that is being written
        # The n samples of a prompt share a seed and must differ, so each seeds its generator with its number too.
        seed = None if params.seed is None else f"{params.seed}:{sample}"
        self.random = random.Random(seed)
        # Kept only where a penalty needs them: seen also counts the prompt's tokens, counts only the answer's.
        self.seen = self.counts = None
        if params.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[prompt] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = torch.zeros(vocab_size)

    def accept(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.words is not None:
            self.words.accept(token)
        if self.characters is not None:
            self.state = self.characters.next(self.state, token)


def choose(logits: Tensor, samplers: list[Sampler]) -> list[int]:
    """The next token of each row of logits (B, V), fp32. A GPU is waited for once, for the tokens."""
    params = [sampler.params for sampler in samplers]
    logits = _adjust(logits, samplers)
    tokens = logits.argmax(dim=-1)  # right for greedy rows; the others are overwritten at the end
    free = [i for i, p in enumerate(params) if p.temperature > 0]
    if not free:
        return tokens.tolist()

    rows, index = [params[i] for i in free], upload(free, logits.device)
    logits = filtered(logits.index_select(0, index), rows)
    # One number from each row's own generator, made on the CPU: a seed gives the same numbers on every device.
    uniform = upload([[samplers[i].random.random()] for i in free], logits.device, torch.float64)
    return tokens.index_copy(0, index, draw(logits, uniform)).tolist()


def filtered(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Temperature (above 0 in every row), then the filters: softmax of what is returned is what a token is drawn from.

    Temperature comes first, as in transformers: top_p then cuts the distribution that is drawn from.
    """

    def column(values) -> Tensor:
        return upload([[value] for value in values], logits.device, logits.dtype)

    logits = logits / column([p.temperature for p in params])
    if any(p.top_k for p in params):
        logits = keep_top_k(logits, [p.top_k for p in params])
    if any(p.top_p < 1 for p in params):
        logits = keep_top_p(logits, column([p.top_p for p in params]))
    if any(p.min_p > 0 for p in params):
        logits = keep_min_p(logits, column([p.min_p for p in params]))
    return logits


def _adjust(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """Penalties, biases and what is forbidden, for the rows that have any: many have none, (B, V) tensors are large."""
    params = [sampler.params for sampler in samplers]

    def there(x, dtype=None) -> Tensor:
        return upload(x, logits.device, dtype)

    def column(rows: list[int], name: str) -> Tensor:
        return there([[getattr(params[i], name)] for i in rows], logits.dtype)

    rows = [i for i, sampler in enumerate(samplers) if sampler.seen is not None]
    if rows:
        seen, index = there(torch.stack([samplers[i].seen for i in rows])), there(rows)
        changed = penalise_repetition(logits.index_select(0, index), seen, column(rows, "repetition_penalty"))
        logits = logits.index_copy(0, index, changed)
    rows = [i for i, sampler in enumerate(samplers) if sampler.counts is not None]
    if rows:
        counts, index = there(torch.stack([samplers[i].counts for i in rows])), there(rows)
        penalties = column(rows, "presence_penalty"), column(rows, "frequency_penalty")
        logits = logits.index_copy(0, index, penalise_counts(logits.index_select(0, index), counts, *penalties))
    rows = [i for i, p in enumerate(params) if p.logit_bias or p.allowed_token_ids or p.bad_words]
    logits = logits.clone() if rows else logits  # the caller's logits, whose log-probabilities are asked for, stay
    for i in rows:
        if params[i].logit_bias:
            tokens, biases = zip(*params[i].logit_bias.items(), strict=True)
            logits[i].index_add_(0, there(tokens), there(biases, logits.dtype))
        if params[i].allowed_token_ids:
            allowed = there(params[i].allowed_token_ids)
            logits[i] = torch.full_like(logits[i], float("-inf")).index_copy(0, allowed, logits[i][allowed])
        if params[i].bad_words:
            logits[i, there(samplers[i].words.banned(), torch.long)] = float("-inf")
    rows = [i for i, sampler in enumerate(samplers) if sampler.characters is not None]
    if rows:
        bias = torch.stack([samplers[i].characters.bias[samplers[i].state] for i in rows])
        logits = logits.index_add(0, there(rows), there(bias, logits.dtype))
    return keep_allowed(logits, [sampler.matcher for sampler in samplers])


# ---------------------------------------------------------------------------------------------- log-probabilities
@dataclass
class TokenLogprob:
    """Log-probability (nats) of a generated token, and the best tokens at its place with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int | None = None  # 1: no token is more probable


def token_logprobs(logits: Tensor, tokens: list[int], wanted: list[int | None]) -> list[TokenLogprob | None]:
    """logits (B, V) -> for each chosen token its log-probability and those of the `wanted` best; None: not wanted."""
    if all(n is None for n in wanted):
        return [None] * len(tokens)
    log_p = logits.log_softmax(dim=-1)
    # The most that any row wants, in one call; each row then takes as many as it asked for.
    best = log_p.topk(min(max(n or 0 for n in wanted), log_p.shape[-1]), dim=-1)
    chosen = log_p.gather(-1, upload([[token] for token in tokens], logits.device))  # (B, 1)
    ranks = ((log_p > chosen).sum(dim=-1) + 1).tolist()
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    rows = zip(tokens, wanted, chosen.flatten().tolist(), tops, ranks, strict=True)
    return [
        None if n is None else TokenLogprob(token, logprob, list(zip(*top, strict=True))[:n], rank)
        for token, n, logprob, top, rank in rows
    ]
