"""The vocabulary: special tokens, how text is cut, and byte-pair encoding, which learns the rest from text.

Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; on bytes as in GPT-2) begins with the 256 bytes, so any UTF-8
string can be encoded and comes back exactly. Then, again and again, the pair of neighbours that is most frequent in
the text becomes one new entry, until the vocabulary is full. The tokenizer is the list of these merges, in their order.

Text is first cut into pieces, and merges never cross a cut: otherwise the vocabulary would fill up with phrases, and
with words that their punctuation sticks to. The cuts are Qwen2's, which llama.cpp knows under the name `qwen2`.
"""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.chat_template import CHAT_TEMPLATE

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

# Qwen2's pattern: English contractions | letters, with at most one other character before them | one digit |
# punctuation with the line ends after it | line ends with the blanks before them | blanks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(bpe: models.BPE) -> PreTrainedTokenizerFast:
    """A complete tokenizer around a BPE model whose vocabulary holds ADDED_TOKENS as ids 0 to 15."""
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    for token in ADDED_TOKENS:
        special = token in SPECIAL_TOKENS
        backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=CHAT_TEMPLATE,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,  # decoding gives back every blank
    )


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
    # What was learned is taken out and a tokenizer built around it: the trainer makes all ADDED_TOKENS special, and
    # decoding would drop the tags.
    model = json.loads(backend.to_str())["model"]
    return build_tokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]))


def _pre_tokenizer():
    """Cuts the text, then writes each byte of a piece as one printable character (GPT-2's table)."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def spelled_bytes(tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, which may be a part of a character.

    Byte-level BPE writes each byte as a printable character ("Ġ" is a blank); here that is undone.
    """
    name = tokenizer.convert_ids_to_tokens(token)
    if name is not None and all(character in BYTE_OF for character in name):
        return bytes(BYTE_OF[character] for character in name)
    return tokenizer.decode([token]).encode("utf-8")  # another kind of vocabulary, or an entry without a name
