"""Which tokens may come next in an answer that has a form, and the mask that leaves no others.

Legend: B rows, V vocabulary. A grammar speaks of bytes, a model of tokens: llguidance walks the tree of all entries of
the vocabulary and keeps those along which the grammar can go on (about 20 us for 6,400). Nothing is ever taken back.
"""

from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.device import upload
from inference.grammar import Grammar, compiled, library
from model.tokenizer import encode_text
from model.vocabulary import TAGS

KEPT = 64  # compiled grammars, the last ones used


class Vocabulary:
    """A tokenizer as llguidance takes it: the bytes of each entry. No string in a text is ever a special token."""

    def __init__(self, tokenizer, vocab_size: int, end_tokens: frozenset[int]):
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        backend = tokenizer.backend_tokenizer
        if "ByteLevel" not in type(backend.decoder).__name__ or not end_tokens:
            raise ValueError("answers of a given form need a byte-level tokenizer that has an end token")
        added = set(backend.get_added_tokens_decoder())
        self.tokenizer, self.bos_token_id, self.eos_token_id = tokenizer, None, min(end_tokens)
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.tokens, self.special_token_ids = [], []
        for i in range(vocab_size):
            name = names[i] if i < len(names) else None
            # Byte-level BPE writes each byte as a printable character. What is not so written is not text: a marker, a
            # tag, or a row of the model's output that has no entry. A grammar can only ask for it by its number.
            if i in added or name is None or not all(character in byte_of for character in name):
                self.special_token_ids.append(i)
                self.tokens.append(f"<|{i}|>".encode())
            else:
                self.tokens.append(bytes(byte_of[character] for character in name))

    def __call__(self, text) -> list[int]:
        return encode_text(self.tokenizer, text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Grammars:
    """The grammars of one engine, compiled once each."""

    def __init__(self, tokenizer, vocab_size: int, end_tokens: frozenset[int]):
        self.end_tokens = end_tokens
        lib, words = library(), Vocabulary(tokenizer, vocab_size, end_tokens)
        self.tokens = lib.LLTokenizer(lib.TokenizerWrapper(words), eos_token=sorted(end_tokens))
        self.compiled = lru_cache(KEPT)(lambda grammar: compiled(grammar, self.tokens))
        # What stands around an answer, where this vocabulary has it as one token.
        entries = tokenizer.get_vocab()
        self.tag = {tag: entries.get(tag) for tag in TAGS}
        self.start, self.header = entries.get("<|im_start|>"), encode_text(tokenizer, "assistant\n")
        blank = encode_text(tokenizer, "\n\n")
        self.blank = blank[0] if len(blank) == 1 else None
        self.vocab_size = vocab_size
        self.the_end = self.bits(sorted(end_tokens))
        self.not_the_end = ~self.the_end

    def matcher(self, grammar: Grammar, prompt: list[int]) -> "Matcher":
        """For one answer to the prompt. Raises ValueError for a grammar that cannot be held."""
        return Matcher(self, grammar, self.compiled(grammar), *self._thought(prompt))

    def bits(self, tokens: list[int]) -> np.ndarray:
        """A set of tokens as llguidance writes it: a bit each, the first in a byte's lowest place."""
        mask = np.zeros(self.vocab_size, dtype=bool)
        mask[tokens] = True
        return np.packbits(mask, bitorder="little")

    def _thought(self, prompt: list[int]) -> tuple[bool, bool]:
        """-> whether the prompt has opened a think block, and whether the answer may open one: only a chat's may."""
        if self.start not in prompt or self.tag["<think>"] is None:
            return False, False
        begin = len(prompt) - prompt[::-1].index(self.start)
        turn = prompt[begin + len(self.header) :]
        if prompt[begin : begin + len(self.header)] != self.header:
            return False, False
        return self.tag["<think>"] in turn and self.tag["</think>"] not in turn, not turn


class Matcher:
    """Follows one answer: free in its think block, then held by the grammar.

    A grammar with `begins` holds from that token on, to the grammar's end, and again from the next such token.
    """

    def __init__(self, grammars: Grammars, grammar: Grammar, prototype, thinking: bool, may_think: bool):
        self.grammars, self.begins, self.prototype = grammars, grammar.begins, prototype
        self.thinking, self.may_think = thinking, may_think
        self.blank_may_come = False  # after a think block comes an empty line, as in the texts the model has learned
        self.parser = prototype.deep_copy() if self.begins is None else None  # None: nothing holds now
        self.ended = self.failed = False

    def allowed(self, logits: Tensor, row: int) -> np.ndarray | None:
        """A bit a token: what may come next; None: anything. logits (B, V) say whether the model would think."""
        grammars = self.grammars
        if self.thinking:  # an answer that ends in its thoughts has no form
            return grammars.not_the_end if self.begins is None else None
        # Whether it thinks is the model's choice: yes where that is its best token, before the grammar is asked.
        if self.may_think and int(logits[row].argmax()) == grammars.tag["<think>"]:
            return grammars.bits([grammars.tag["<think>"]])
        if self.parser is None:
            return None
        bits = np.frombuffer(self.parser.compute_bitmask(), dtype=np.uint8, count=len(grammars.the_end))
        if self.parser.is_error():  # llguidance's limits are reached: the answer cannot go on
            self.failed = True
            return grammars.the_end
        if self.blank_may_come and grammars.blank is not None:
            bits = bits | grammars.bits([grammars.blank])
        return bits

    def accept(self, token: int) -> None:
        tag = self.grammars.tag
        begun, self.may_think = self.may_think, False
        if self.thinking or (begun and token == tag["<think>"]):
            self.thinking = token != tag["</think>"]
            self.blank_may_come = not self.thinking
            return
        blank, self.blank_may_come = self.blank_may_come and token == self.grammars.blank, False
        if blank or self.ended:
            return
        if self.parser is None:
            self.parser = self.prototype.deep_copy() if token == self.begins else None
            return
        self.parser.consume_token(token)
        if self.begins is None:
            self.ended = token in self.grammars.end_tokens
        elif self.parser.is_stopped():
            self.parser = None


def keep_allowed(logits: Tensor, matchers: list[Matcher | None]) -> Tensor:
    """logits (B, V): -inf where a row's grammar does not allow the token. Rows without a grammar stay as they are."""
    held = [(i, matcher.allowed(logits, i)) for i, matcher in enumerate(matchers) if matcher is not None]
    held = [(i, bits) for i, bits in held if bits is not None]
    if not held:
        return logits
    rows, bits = zip(*held, strict=True)
    masks = upload(torch.from_numpy(np.stack(bits)).int(), logits.device)  # (rows, V / 8)
    # A look-up of eight entries at a time and a sum: on a CPU several times faster than masked_fill.
    added = F.embedding(masks, _of_a_byte(logits.device)).flatten(1)[:, : logits.shape[1]]
    return logits.index_add(0, upload(list(rows), logits.device), added)


@cache
def _of_a_byte(device: torch.device) -> Tensor:
    """(256, 8): what each of a byte's eight bits adds to a logit, 0 where it is set and -inf where not."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.where(torch.from_numpy(bits) > 0, 0.0, float("-inf")).to(device)
