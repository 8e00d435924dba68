r"""From text to token ids: plain texts, documents and conversations.

A conversation can become token ids in two ways, which tests hold equal:
  CHAT_TEMPLATE  Jinja, saved with the vocabulary; any program that knows `transformers` templates can use it
  render()       Python; the same ids, and a mask of the assistant's text. It is stricter: in text of the system, the
                 user or a tool, a string that spells a special token stays text. The template cannot do that, because
                 it makes one string in which markers and text look alike.

    <|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n<think>\n...\n</think>\n\n2<|im_end|>\n
                                                             |------------ mask = 1 -----------|

The vocabulary is made in vocabulary.py, and read and written in tokenizer_files.py.
"""

import json
import re
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from model.chat_template import TOOLS_EXAMPLE, TOOLS_HEAD, TOOLS_TAIL, assistant_text, normalise_conversation, to_json
from model.tokenizer_files import backend_json
from model.tokenizer_files import load_tokenizer as load_tokenizer  # offered here too, beside render
from model.vocabulary import IM_END, IM_START, TAGS


# ----------------------------------------------------------------------------------------------------- plain text
class _Codec:
    """An encoder for plain text that knows no markers, and the ids of the markers.

    transformers' own encoder turns every "<|im_end|>" in a text into the token that ends a turn. A user could type one
    and then write the assistant's turn. Here text and markers are encoded separately, so that cannot happen.
    """

    def __init__(self, tokenizer):
        content = backend_json(tokenizer)
        vocabulary = tokenizer.get_vocab()
        if IM_START in vocabulary and IM_END in vocabulary:
            self.start, self.end = vocabulary[IM_START], vocabulary[IM_END]
        elif tokenizer.bos_token_id is not None and tokenizer.eos_token_id is not None:
            self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        else:
            raise ValueError("this tokenizer has no tokens that begin and end a turn (bos_token and eos_token)")
        added = {token["content"] for token in content["added_tokens"]}
        self.tags = {tag: vocabulary[tag] for tag in TAGS if tag in added}
        pattern = "|".join(map(re.escape, self.tags)) or r"(?!)"  # (?!) never matches: no tag is a token here
        self.tag_pattern = re.compile(f"({pattern})")
        # A second encoder from the same file, without the added tokens: to it "<|im_end|>" is ten characters.
        content["added_tokens"], content["post_processor"] = [], None
        self.plain = Tokenizer.from_str(json.dumps(content))

    def encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:  # the library raises it for half of a surrogate pair, too
            raise ValueError("a text to encode must be a string of valid Unicode") from None


# Built once for each tokenizer and freed with it, so that callers need to pass the tokenizer only.
_codecs: WeakKeyDictionary = WeakKeyDictionary()


def _codec(tokenizer) -> _Codec:
    if tokenizer not in _codecs:
        _codecs[tokenizer] = _Codec(tokenizer)
    return _codecs[tokenizer]


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of many texts at once. No string in them is ever a special token or a tag."""
    return _codec(tokenizer).encode(texts)


def encode_text(tokenizer, text: str) -> list[int]:
    """Ids of a text in which no string is ever a special token or a tag."""
    return _codec(tokenizer).encode([text])[0]


def encode_document(tokenizer, text: str) -> list[int]:
    """A pretraining document: <|im_start|> text <|im_end|>."""
    codec = _codec(tokenizer)
    return [codec.start, *codec.encode([text])[0], codec.end]


# ---------------------------------------------------------------------------------------------------- conversations
def render(tokenizer, messages, tools=None, add_generation_prompt=False, enable_thinking=None):
    """A conversation as (ids, mask), two lists of equal length; mask is 1 where the assistant speaks.

    The assistant's part is its text (thinking and tool calls included) and the <|im_end|> that ends the turn; the
    header before and the line end after are not. messages: [{"role", "content", ...}], roles system, user,
    assistant, tool; content a string or a list of {"type": "text", "text": ...}. An assistant message may have
    reasoning_content (present, even empty: a think block) and tool_calls; a first system message may have tools; both
    as lists or as JSON text. enable_thinking opens a think block after the generation prompt (True), closes an
    empty one (False) or adds none (None). Raises ValueError naming the message and the key that is wrong.
    """
    ids, mask, _ = render_spans(tokenizer, messages, tools, add_generation_prompt, enable_thinking)
    return ids, mask


def render_spans(tokenizer, messages, tools=None, add_generation_prompt=False, enable_thinking=None):
    """As render, and `starts`: for each message the position of its first token.

    Before starts[0] there may be a system turn: `tools` need one where the conversation has none. Consecutive tool
    messages share one user turn; the second one's start is inside that turn.
    """
    messages, tools = normalise_conversation(messages, tools)
    transcript = _Transcript(_codec(tokenizer))
    if tools and messages[0]["role"] != "system":
        transcript.system_turn("", tools)
    for i, message in enumerate(messages):
        transcript.begin_message()
        if message["role"] == "system":
            transcript.system_turn(message["content"], tools if i == 0 else None)
        elif message["role"] == "user":
            transcript.user_turn(message["content"])
        elif message["role"] == "tool":
            first = i == 0 or messages[i - 1]["role"] != "tool"
            last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            transcript.tool_turn(message["content"], first, last)
        else:
            transcript.assistant_turn(assistant_text(message))
    if add_generation_prompt:
        transcript.marker(transcript.codec.start).text("assistant\n")
        if enable_thinking is not None:
            transcript.tagged("<think>\n" if enable_thinking else "<think>\n\n</think>\n\n", target=0)
    return transcript.finish()


class _Transcript:
    """Collects a conversation as pieces, each a marker's id or a string, and for each whether it is a target.

    All strings are encoded at the end in one call, which is far faster than one at a time.
    """

    def __init__(self, codec: _Codec):
        self.codec = codec
        self.pieces: list[int | str] = []
        self.targets: list[int] = []  # for each piece: 1 where it is learned
        self.message_pieces: list[int] = []  # for each message the index of its first piece

    def begin_message(self):
        self.message_pieces.append(len(self.pieces))

    def marker(self, token: int, target=0):
        self.pieces.append(token)
        self.targets.append(target)
        return self

    def text(self, text: str, target=0):
        """Adds text in which nothing is a marker. It is joined to a text before it that has the same target.

        The template writes one string, in which two neighbouring line ends become one token: joining gives these ids.
        Nothing is joined across the start of a message, which must begin with a token of its own.
        """
        joinable = self.pieces and isinstance(self.pieces[-1], str) and self.targets[-1] == target
        if joinable and len(self.pieces) not in self.message_pieces[-1:]:
            self.pieces[-1] += text
        elif text:
            self.pieces.append(text)
            self.targets.append(target)
        return self

    def tagged(self, text: str, target=1):
        """Adds text in which the tags are tokens (where this vocabulary has them)."""
        for i, part in enumerate(self.codec.tag_pattern.split(text)):  # the odd parts are the tags
            self.marker(self.codec.tags[part], target) if i % 2 else self.text(part, target)
        return self

    def user_turn(self, text: str):
        self.marker(self.codec.start).text("user\n" + text).marker(self.codec.end).text("\n")

    def system_turn(self, text: str, tools):
        self.marker(self.codec.start).text("system\n" + text)
        if tools:
            signatures = "\n".join(map(to_json, tools))
            self.text(("\n\n" if text else "") + TOOLS_HEAD + signatures + TOOLS_TAIL)
            self.tagged(f"<tool_call>{TOOLS_EXAMPLE}</tool_call>", target=0)
        self.marker(self.codec.end).text("\n")

    def tool_turn(self, text: str, first: bool, last: bool):
        """Adds a tool's answer. Several in a row share one user turn, which `first` opens and `last` closes."""
        if first:
            self.marker(self.codec.start).text("user\n")
        self.tagged(("" if first else "\n") + "<tool_response>", target=0).text("\n" + text + "\n")
        self.tagged("</tool_response>", target=0)
        if last:
            self.marker(self.codec.end).text("\n")

    def assistant_turn(self, text: str):
        self.marker(self.codec.start).text("assistant\n").tagged(text).marker(self.codec.end, target=1).text("\n")

    def finish(self) -> tuple[list[int], list[int], list[int]]:
        """-> (ids, mask, position of each message's first token)."""
        encoded = iter(self.codec.encode([piece for piece in self.pieces if isinstance(piece, str)]))
        ids, mask, offsets = [], [], []
        for piece, target in zip(self.pieces, self.targets, strict=True):
            offsets.append(len(ids))
            tokens = next(encoded) if isinstance(piece, str) else [piece]
            ids += tokens
            mask += [target] * len(tokens)
        return ids, mask, [offsets[i] for i in self.message_pieces]
