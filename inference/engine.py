"""The engine: generate, stream and score with one model.

    engine = Engine(model, tokenizer)
    engine.generate(["从前有座山", [{"role": "user", "content": "1+1=?"}]], SamplingParams(max_tokens=64))
    for piece in engine.stream(messages, SamplingParams(temperature=0)): print(piece.text, end="")
    engine.score(["1+1="], ["2"])

A prompt is a string (text to continue, as a pretraining document begins), a list of messages (a chat, rendered with
the template), or a list of token ids (taken as they are).
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch

from inference.adapters import with_adapters
from inference.batch import Batch
from inference.characters import Characters
from inference.log_probs import Score, score_sequences
from inference.sampling import SamplingParams
from inference.stream_text import Completion, Piece, Sequence, sequences
from inference.token_mask import Grammars
from model.tokenizer import encode_document, encode_text, render
from model.vocabulary import spelled_bytes

COMPILED = {"capacity": 1024, "compiled": {"mode": "reduce-overhead"}}  # few sizes of the cache: few graphs
SCORED_TOGETHER = 64  # documents; their logits are not kept, their tokens are


@dataclass
class Speed:
    """Tokens and seconds of the last call, prompts and generation apart."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        decode = self.new_tokens / max(self.decode_seconds, 1e-9)
        return f"prompt {self.prompt_tokens} tokens, {prefill:,.0f}/s; new {self.new_tokens} tokens, {decode:,.1f}/s"


@dataclass
class Engine:
    """model: a decoder of ours or of transformers, in eval mode. tokenizer: needed for text in or out.

    Adapters that the model has (model/lora.py) are chosen by SamplingParams.adapter, for each prompt on its own.

    max_batch         sequences generated side by side; more prompts take turns
    enable_thinking   for chats, see model.tokenizer.render: None leaves it to the model
    own_template      chats are written by the tokenizer's own template: for models of other projects
    """

    model: object
    tokenizer: object
    max_batch: int = 32
    enable_thinking: bool | None = None
    own_template: bool = False
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self):
        # `source` is what was given, to be exported or counted; `model` is what runs.
        self.source = self.model
        self.model, self.adapters = with_adapters(self.source)
        config = self.model.config
        self.context = config.max_position_embeddings
        self.vocab_size = config.vocab_size
        # transformers' configs have one end token or a list; the tokenizer may name another.
        ends = config.eos_token_id if isinstance(config.eos_token_id, list | tuple) else [config.eos_token_id]
        self.end_tokens = frozenset([*ends, getattr(self.tokenizer, "eos_token_id", None)]) - {None}

    @cached_property
    def grammars(self) -> Grammars:
        """What SamplingParams.grammar needs, made at the first one. ValueError without llguidance."""
        return Grammars(self.tokenizer, self.vocab_size, self.end_tokens)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """For each entry of the vocabulary what it adds to a text; b"" for markers, which have none."""
        special, known = set(self.tokenizer.all_special_ids), len(self.tokenizer)
        return [b"" if i in special or i >= known else spelled_bytes(self.tokenizer, i) for i in range(self.vocab_size)]

    @cached_property
    def characters(self) -> Characters:
        """What SamplingParams.whole_characters needs, made at the first one."""
        return Characters(self.token_bytes)

    # ------------------------------------------------------------------------------------------------ generation
    def generate(self, prompts: list, params: SamplingParams | list[SamplingParams] | None = None) -> list[Completion]:
        """Answers in the order of the prompts, the n samples of a prompt side by side.

        params: for all prompts, or one for each. Raises ValueError for a prompt that is empty, not a prompt, or does
        not fit into the context.
        """
        params = params if isinstance(params, list) else [params or SamplingParams()] * len(prompts)
        requests = [
            sequences(self, self.encode(p), q, request=i) for i, (p, q) in enumerate(zip(prompts, params, strict=True))
        ]
        if not requests:
            return []
        # Prompts of like length are read together, which leaves little padding. The answers keep `requests`' order.
        waiting = sorted(requests, key=lambda samples: len(samples[0].prompt))
        widest = max(map(len, requests))
        batch = self.batch(min(max(self.max_batch, widest), sum(map(len, requests))))
        for _ in self._run(batch, waiting):
            pass
        return [s.completion() for samples in requests for s in samples]

    def stream(self, prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The answer in pieces as it is generated; with n > 1 the samples' pieces are mixed, see Piece.index."""
        samples = sequences(self, self.encode(prompt), params or SamplingParams())
        for _, piece in self._run(self.batch(len(samples)), [samples]):
            yield piece

    def _run(self, batch: Batch, waiting: list[list[Sequence]]):
        """Takes steps until all are done -> (sequence, piece). Requests join in order, as rows become free."""
        waiting = waiting[::-1]  # pop() takes from the end
        self.speed = Speed(prompt_tokens=sum(len(samples[0].prompt) for samples in waiting))
        while waiting or batch.busy:
            while waiting and batch.free >= len(waiting[-1]):
                batch.join(waiting.pop())
            reading, begin = bool(batch.joining), time.perf_counter()
            gained = batch.step()
            seconds = time.perf_counter() - begin
            if reading:  # a step that reads prompts counts as prefill, though others get a token in it
                self.speed.prefill_seconds += seconds
            else:
                self.speed.decode_seconds += seconds
                self.speed.new_tokens += len(gained)
            yield from gained

    def batch(self, slots: int, compile: bool = False) -> Batch:
        """compile: decode steps as CUDA graphs, which pays for a batch that lives as long as a server."""
        if compile and next(self.model.parameters()).device.type != "cuda":
            raise ValueError("compiled decode steps pay on CUDA only; leave --compile out")
        return Batch(self.model, slots, adapters=self.adapters, **(COMPILED if compile else {}))

    # --------------------------------------------------------------------------------------------------- scoring
    def score(self, prompts: list, continuations: list, adapter: str | None = None) -> list[Score]:
        """Log-probability (nats) of each continuation after its prompt; both as in `generate`, text or token ids.

        A string as continuation is encoded on its own, not together with its prompt. What prompts have in common is
        computed once. adapter: see SamplingParams. Raises ValueError for empty ones, pairs longer than the context, and
        an adapter that is not there.
        """
        self.adapters.check(adapter)
        pairs = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            p = self.encode(prompt)
            c = encode_text(self.tokenizer, continuation) if isinstance(continuation, str) else list(continuation)
            if not c:
                raise ValueError("a continuation to score is empty")
            if len(p) + len(c) > self.context:
                raise ValueError(f"{len(p)} + {len(c)} tokens to score, but the context holds {self.context}")
            pairs.append((self._checked(p), self._checked(c)))
        with self.adapters.rows([adapter]):
            return score_sequences(self.model, pairs, max_batch=self.max_batch)

    def bits_per_byte(self, texts: Iterable[str], length: int = 512) -> tuple[float, int]:
        """Bits that the model needs for whole documents, end tokens included, per UTF-8 byte -> (bits per byte, bytes).

        Documents longer than `length` tokens are read in pieces, as in training on rows of that length: each piece
        begins with the last token of the one before and sees nothing earlier. ValueError without a text.
        """
        if length < 1:
            raise ValueError(f"texts are read in pieces of at least 1 token, not {length}")
        length = min(length, self.context)
        # Block by block: a file of any size is measured in the memory of SCORED_TOGETHER documents.
        nats, n_bytes, texts = 0.0, 0, iter(texts)
        while block := list(islice(texts, SCORED_TOGETHER)):
            pieces = []
            for text in block:
                ids = encode_document(self.tokenizer, text)
                # Pieces overlap by one token, so that every token but a document's first is predicted exactly once.
                pieces += [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
                n_bytes += len(text.encode())
            pairs = [(piece[:1], piece[1:]) for piece in pieces]  # the first token is given, the others are predicted
            nats -= sum(score.total for score in score_sequences(self.model, pairs, self.max_batch))
        if not n_bytes:
            raise ValueError("there is no text to measure")
        return nats / math.log(2) / n_bytes, n_bytes

    # ---------------------------------------------------------------------------------------------------- prompts
    def encode(
        self, prompt, tools: list[dict] | None = None, thinking: bool | None = None, continued: bool = False
    ) -> list[int]:
        """Token ids of a prompt of any kind.

        For a chat: tools it may call; thinking: in place of enable_thinking; continued: its last message is the
        beginning of the answer.
        """
        if isinstance(prompt, str):
            return encode_document(self.tokenizer, prompt)[:-1]  # the text goes on: no end token
        if isinstance(prompt, torch.Tensor):
            prompt = prompt.tolist()
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            if self.own_template:
                return self._by_template(prompt, continued)
            if continued:
                return render(self.tokenizer, prompt, tools, continue_final_message=True)[0]
            thinking = self.enable_thinking if thinking is None else thinking
            return render(self.tokenizer, prompt, tools, add_generation_prompt=True, enable_thinking=thinking)[0]
        return self._checked(prompt)

    def _by_template(self, messages: list[dict], continued: bool) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("this model's tokenizer has no chat template: it continues text and was taught no chats")
        how = {"continue_final_message": True} if continued else {"add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(messages, return_dict=False, **how)

    def _checked(self, ids) -> list[int]:
        if not isinstance(ids, list | tuple) or not ids:
            raise ValueError("a prompt must be a text, a list of messages or a list of token ids, and not empty")
        wrong = [t for t in ids if type(t) is not int or not 0 <= t < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]!r} does not exist; ids run from 0 to {self.vocab_size - 1}")
        return list(ids)
