"""Tokens as a reader can see them: their bytes, the characters they are parts of, and the merges that made them."""

import codecs
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from common.errors import UserError, user_errors
from inference.engine import Engine
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_text, render
from model.tokenizer_files import backend_json
from model.vocabulary import BYTE_OF, spelled_bytes

MOST_TOKENS = 512  # of a text to look at: attention maps are layers x heads x tokens x tokens numbers


# --------------------------------------------------------------------------------------------- what is looked at
def read(engine: Engine, text, most: int = MOST_TOKENS) -> list[int]:
    """The token ids of what is to be looked at.

    text: a string (as a document begins: <|im_start|>, then the text), a list of messages (a chat; where the last one
    is not the assistant's, its answer is about to begin), or token ids. Raises UserError for what is empty, longer than
    `most` tokens or the model's context, or no token of the model.
    """
    if not isinstance(text, list | tuple | str) or not len(text) or (isinstance(text, str) and not text.strip()):
        raise UserError("there is no text to look at; write one")
    with user_errors():
        if isinstance(text, list) and isinstance(text[0], dict) and text[-1].get("role") == "assistant":
            ids, _ = render(engine.tokenizer, text)
        else:
            ids = engine.encode(text)
    if len(ids) > (limit := min(most, engine.context)):
        raise UserError(f"the text has {len(ids)} tokens, and {limit} at most can be looked at; take a part of it")
    return ids


def own_model(engine: Engine) -> MiniMindForCausalLM:
    """The engine's model, inside of which one can look; UserError for another project's."""
    if not isinstance(engine.source, MiniMindForCausalLM):
        raise UserError(f"{type(engine.source).__name__} is not a model of this project: only those can be looked into")
    return engine.source


# -------------------------------------------------------------------------------------------------------- the pieces
@dataclass(frozen=True)
class TokenPiece:
    """One token of a text.

    text    its characters; bytes that are only a part of a character are written \\xe6
    whole   whether all its bytes are whole characters
    group   tokens that share a character have the same number; else every token has its own
    special whether it is a marker (<|im_start|>) or a tag (<think>), which no text spells
    """

    id: int
    bytes: bytes
    text: str
    whole: bool
    group: int
    special: bool


def pieces(tokenizer, ids: list[int]) -> list[TokenPiece]:
    """The tokens `ids`, one piece each. The bytes of all pieces together are the bytes of the text."""
    added, found, group = set(tokenizer.added_tokens_decoder), [], 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        raw = spelled_bytes(tokenizer, token)
        found.append(TokenPiece(token, raw, shown(raw), is_whole(raw), group, token in added))
        decoder.decode(raw)
        if not decoder.getstate()[0]:  # no byte of a character waits for the next token
            group += 1
    return found


def shown(raw: bytes) -> str:
    """Bytes as text; what is no whole character is written as its bytes: b"\\xe6\\x88" -> "\\\\xe6\\\\x88"."""
    return raw.decode("utf-8", "backslashreplace")


def is_whole(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def visible_tokens(tokenizer, limit: int, first: int = 0) -> list[int]:
    """The first `limit` ids from `first` on that spell whole characters a reader can see: no marker, no blank."""
    added, found = set(tokenizer.added_tokens_decoder), []
    for token in range(first, len(tokenizer)):
        raw = spelled_bytes(tokenizer, token)
        if len(found) < limit and token not in added and is_whole(raw) and raw.strip() and raw.decode().isprintable():
            found.append(token)
    return found


# -------------------------------------------------------------------------------------------------------- the merges
@dataclass(frozen=True)
class Merge:
    """One step of byte-pair encoding: two neighbours become one.

    rank    place of the merge in the vocabulary's list: the lower, the earlier it was learned, and the sooner it is
            applied
    after   all parts of the word after this step
    """

    left: bytes
    right: bytes
    rank: int
    after: tuple[bytes, ...]


def merges_of_token(tokenizer, token: int) -> list[Merge]:
    """The merges that made a token from its single bytes, in their order; none for a single byte or a marker.

    Raises UserError for an id outside the vocabulary, and for a vocabulary that is not byte-level BPE.
    """
    name = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    if name is None:
        raise UserError(f"token id {token} does not exist; ids run from 0 to {len(tokenizer) - 1}")
    ranks = merge_ranks(tokenizer)
    return [] if token in tokenizer.added_tokens_decoder else merge_steps(name, ranks)


def merges_of_text(tokenizer, text: str) -> list[list[Merge]]:
    """For each piece that the text is cut into before any merge (a word, a digit, ...), the merges made in it."""
    if not text:
        raise UserError("there is no text to look at; write one")
    ranks = merge_ranks(tokenizer)
    encode_text(tokenizer, text)  # of text that is not valid Unicode it says so
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [merge_steps(piece, ranks) for piece, _ in cut]


def merge_steps(name: str, ranks: dict[tuple[str, str], int]) -> list[Merge]:
    """Byte-pair encoding of one piece of text, step by step.

    name: its bytes, written as the vocabulary does, one character each. Of all neighbours those whose merge was learned
    first are joined, the leftmost of them first, until no two neighbours have a merge.
    """
    parts, steps = list(name), []
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(parts, parts[1:])))
        if rank == len(ranks):
            break
        left, right = parts[at], parts[at + 1]
        parts[at : at + 2] = [left + right]
        steps.append(Merge(in_bytes(left), in_bytes(right), rank, tuple(map(in_bytes, parts))))
    return steps


def in_bytes(name: str) -> bytes:
    return bytes(BYTE_OF[character] for character in name)


_ranks: WeakKeyDictionary = WeakKeyDictionary()  # reading the list takes as long as all else here


def merge_ranks(tokenizer) -> dict[tuple[str, str], int]:
    """{(left, right): rank} of tokenizer.json's merges; UserError where it is not byte-level BPE."""
    if tokenizer not in _ranks:
        model = backend_json(tokenizer)["model"]
        if model.get("type") != "BPE" or "ByteLevel" not in type(tokenizer.backend_tokenizer.decoder).__name__:
            raise UserError("this vocabulary is not byte-level BPE: its merges cannot be shown")
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        _ranks[tokenizer] = {tuple(pair): rank for rank, pair in enumerate(pairs)}
    return _ranks[tokenizer]
