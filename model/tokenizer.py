"""Words of the model: special tokens, training and loading a vocabulary, and `render`.

The tokenizer is byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2): 256 bytes, then merges learned from text.
Any UTF-8 string can be encoded and comes back exactly. Text is first cut by Qwen2's pattern (single digits; a run of
letters may begin with one other character), which llama.cpp knows under the name `qwen2`; merges never cross a cut.

Two ways lead from a conversation to token ids, and tests hold them equal:
  CHAT_TEMPLATE  Jinja, travels with the vocabulary; any program that knows `transformers` templates can use it
  render()       Python; the same ids, and a mask of what the assistant says. It is stricter: in text of the system,
                 the user or a tool, a string that spells a special token stays text. The template cannot do that,
                 because it produces one string in which markers and text look alike.

    <|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n<think>\n...\n</think>\n\n2<|im_end|>\n
                                                             |------------ mask = 1 -----------|
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.chat_template import (
    CHAT_TEMPLATE,
    TOOLS_EXAMPLE,
    TOOLS_HEAD,
    TOOLS_TAIL,
    assistant_text,
    normalise_conversation,
    to_json,
)
from model.files import named

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0 (padding, unknown), 1, 2
# Ids 3-10. Not "special", so that decoding with skip_special_tokens=True keeps them: they carry meaning.
TAGS = (
    "<think>", "</think>", "<answer>", "</answer>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(5))  # ids 11-15, for those who extend the model
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *RESERVED)
ADDED_TOKENS = (END_OF_TEXT, IM_START, IM_END, *TAGS, *RESERVED)  # in the order of their ids
MIN_VOCAB_SIZE = len(ADDED_TOKENS) + 256
DEFAULT_VOCAB_SIZE = 6400
MODEL_MAX_LENGTH = 32768
DEFAULT_FOLDER = Path(__file__).parent / "minimind_tokenizer"

# Qwen2's pattern: English contractions | letters, with at most one other character before them | one digit |
# punctuation with the line ends after it | line ends with the blanks before them | blanks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ------------------------------------------------------------------------------------------------ build and train
def build_tokenizer(bpe: models.BPE) -> PreTrainedTokenizerFast:
    """A complete tokenizer around a BPE model whose vocabulary holds ADDED_TOKENS as ids 0 to 15."""
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    for token in ADDED_TOKENS:
        special = token in SPECIAL_TOKENS
        backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    return _wrap(backend, _default_config(), CHAT_TEMPLATE)


def train_tokenizer(texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Learns the merges from an iterator of texts, read once; counts of their pieces are held in memory.

    The result has `vocab_size` entries, or fewer where the texts have no pair of tokens left to merge.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {len(ADDED_TOKENS)} special tokens and 256 bytes "
            f"need {MIN_VOCAB_SIZE}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    return build_tokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]))


def _pre_tokenizer():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _default_config() -> dict:
    return {
        "bos_token": IM_START,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }


def _wrap(backend: Tokenizer, config: dict, chat_template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **config)


# --------------------------------------------------------------------------------------------------- save and load
def tokenizer_to_dict(tokenizer) -> dict[str, str]:
    """The files of a tokenizer as {file name: text}; plain strings, so a weights file can carry them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a name that transformers 4 and 5 both know
        **{key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": json.dumps(_backend_json(tokenizer), ensure_ascii=False, indent=2)}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template  # transformers 4 reads it here, 5 from its own file
        files["chat_template.jinja"] = tokenizer.chat_template
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2)
    return files


def tokenizer_from_dict(files: dict[str, str]) -> PreTrainedTokenizerFast:
    """The inverse of tokenizer_to_dict; also takes the texts of another project's tokenizer files.

    The vocabulary file alone decides how text is cut. (MiniMind v1's config says add_prefix_space, its vocabulary
    says no; newer transformers follow the config, and the released weights then see other tokens.)
    """
    if "tokenizer.json" not in files:
        raise ValueError(f"no tokenizer.json among the tokenizer's files ({', '.join(files) or 'none'})")
    raw = json.loads(files.get("tokenizer_config.json", "{}"))
    if not isinstance(raw, dict):
        raise ValueError("tokenizer_config.json holds no JSON object")
    config = {"clean_up_tokenization_spaces": False}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length"):
        value = raw.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and key.endswith("_token") and not isinstance(value, str):
            raise ValueError(f"{key} of tokenizer_config.json must be a text, not {value!r}")
        if value is not None:
            config[key] = value
    template = files.get("chat_template.jinja") or raw.get("chat_template")
    try:
        backend = Tokenizer.from_str(files["tokenizer.json"])
        return _wrap(backend, config, template if isinstance(template, str) else None)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # for a broken file the library raises bare Exception, or Rust's panic
        raise ValueError(f"tokenizer.json cannot be read: {error}") from None


def save_tokenizer(tokenizer, folder) -> None:
    """Writes the folder whole or not at all; files of the same names in an existing folder are replaced."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with named(folder):
            temporary.chmod(0o755)
            for name, text in tokenizer_to_dict(tokenizer).items():
                line_end = "\n" * (not text.endswith("\n") and name.endswith(".json"))
                (temporary / name).write_text(text + line_end, "utf-8")
            if folder.exists():
                for file in temporary.iterdir():
                    os.replace(file, folder / file.name)
            else:
                os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tokenizer(path=None) -> PreTrainedTokenizerFast:
    """Loads a tokenizer folder, by default the one that comes with the project; ValueError where there is none."""
    folder = Path(path) if path is not None else DEFAULT_FOLDER
    if not folder.is_dir():
        raise ValueError(f"no tokenizer folder at {folder}")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    try:
        files = {name: (folder / name).read_text("utf-8") for name in names if (folder / name).is_file()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder} holds no tokenizer in UTF-8: {error}") from None
    if "tokenizer.json" in files:
        try:
            return tokenizer_from_dict(files)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    try:
        # A kind of vocabulary that transformers can convert. Without the word it asks whether to run the folder's code.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer that can be read in {folder}: {error}") from None


def tokenizer_hash(tokenizer) -> str:
    """16 hex digits that change whenever the ids of some text would: the key of a cache of token ids."""
    key = [_backend_json(tokenizer), tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _backend_json(tokenizer) -> dict:
    content = json.loads(_backend(tokenizer).to_str())
    content["truncation"] = content["padding"] = None  # left behind by the last call, no part of the vocabulary
    return content


def _backend(tokenizer) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast version; convert it to a tokenizer.json first")
    return backend


# ----------------------------------------------------------------------------------------------------- plain text
class _Codec:
    """What encoding needs, made once per tokenizer: an encoder that knows no markers, and the markers' ids."""

    def __init__(self, tokenizer):
        content = _backend_json(tokenizer)
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
        content["added_tokens"], content["post_processor"] = [], None
        self.plain = Tokenizer.from_str(json.dumps(content))

    def encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:  # the library's answer to half of a surrogate pair, too
            raise ValueError("a text to encode must be a string of valid Unicode") from None


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

    What stands before starts[0] is the system turn that `tools` need where the conversation has none of its own.
    Consecutive tool messages share one user turn; the second one's start is inside that turn.
    """
    messages, tools = normalise_conversation(messages, tools)
    page = _Page(_codec(tokenizer))
    if tools and messages[0]["role"] != "system":
        page.system_turn("", tools)
    for i, message in enumerate(messages):
        page.begin_message()
        if message["role"] == "system":
            page.system_turn(message["content"], tools if i == 0 else None)
        elif message["role"] == "user":
            page.marker(page.codec.start).text("user\n" + message["content"]).marker(page.codec.end).text("\n")
        elif message["role"] == "tool":
            first = i == 0 or messages[i - 1]["role"] != "tool"
            last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            page.tool_turn(message["content"], first, last)
        else:
            page.assistant_turn(assistant_text(message))
    if add_generation_prompt:
        page.marker(page.codec.start).text("assistant\n")
        if enable_thinking is not None:
            page.tagged("<think>\n" if enable_thinking else "<think>\n\n</think>\n\n", learned=0)
    return page.finish()


class _Page:
    """A conversation in the making: pieces are marker ids, or strings that are encoded together at the end."""

    def __init__(self, codec: _Codec):
        self.codec = codec
        self.pieces: list[int | str] = []
        self.learned: list[int] = []
        self.message_pieces: list[int] = []  # for each message the index of its first piece

    def begin_message(self):
        self.message_pieces.append(len(self.pieces))

    def marker(self, token: int, learned=0):
        self.pieces.append(token)
        self.learned.append(learned)
        return self

    def text(self, text: str, learned=0):
        """Text in which nothing is a marker. Neighbours of one kind are joined: they may merge across the seam."""
        joinable = self.pieces and isinstance(self.pieces[-1], str) and self.learned[-1] == learned
        if joinable and len(self.pieces) not in self.message_pieces[-1:]:
            self.pieces[-1] += text
        elif text:
            self.pieces.append(text)
            self.learned.append(learned)
        return self

    def tagged(self, text: str, learned=1):
        """Text in which the tags are tokens (where this vocabulary has them)."""
        for i, part in enumerate(self.codec.tag_pattern.split(text)):  # the odd parts are the tags
            self.marker(self.codec.tags[part], learned) if i % 2 else self.text(part, learned)
        return self

    def system_turn(self, text: str, tools):
        self.marker(self.codec.start).text("system\n" + text)
        if tools:
            signatures = "\n".join(map(to_json, tools))
            self.text(("\n\n" if text else "") + TOOLS_HEAD + signatures + TOOLS_TAIL)
            self.tagged(f"<tool_call>{TOOLS_EXAMPLE}</tool_call>", learned=0)
        self.marker(self.codec.end).text("\n")

    def tool_turn(self, text: str, first: bool, last: bool):
        if first:
            self.marker(self.codec.start).text("user\n")
        self.tagged(("" if first else "\n") + "<tool_response>", learned=0).text("\n" + text + "\n")
        self.tagged("</tool_response>", learned=0)
        if last:
            self.marker(self.codec.end).text("\n")

    def assistant_turn(self, text: str):
        self.marker(self.codec.start).text("assistant\n").tagged(text).marker(self.codec.end, learned=1).text("\n")

    def finish(self):
        encoded = iter(self.codec.encode([piece for piece in self.pieces if isinstance(piece, str)]))
        ids, mask, offsets = [], [], []
        for piece, learned in zip(self.pieces, self.learned, strict=True):
            offsets.append(len(ids))
            tokens = next(encoded) if isinstance(piece, str) else [piece]
            ids += tokens
            mask += [learned] * len(tokens)
        return ids, mask, [offsets[i] for i in self.message_pieces]
