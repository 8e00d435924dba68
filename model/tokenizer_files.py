"""Tokenizers as files: a folder that transformers can read, and the same texts inside a weights file."""

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.files import replaced

DEFAULT_FOLDER = Path(__file__).parent / "minimind_tokenizer"


def tokenizer_to_dict(tokenizer) -> dict[str, str]:
    """The files of a tokenizer as {file name: text}: plain strings, so a weights file can carry them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a name that transformers 4 and 5 both know
        **{key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": json.dumps(backend_json(tokenizer), ensure_ascii=False, indent=2)}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template  # transformers 4 reads it here, 5 from its own file
        files["chat_template.jinja"] = tokenizer.chat_template
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2)
    return files


def tokenizer_from_dict(files: dict[str, str]) -> PreTrainedTokenizerFast:
    """The inverse of tokenizer_to_dict; also takes the texts of another project's tokenizer files.

    Only tokenizer.json decides how text is cut, not tokenizer_config.json. (MiniMind v1's two files contradict each
    other on add_prefix_space. Newer transformers follow the config, which is not what the weights were trained with.)
    A step that puts a start token before each text is left out: here encode_document and render write the markers.
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
    template = template if isinstance(template, str) else None
    try:
        content = json.loads(files["tokenizer.json"])
        content["post_processor"] = None
        backend = Tokenizer.from_str(json.dumps(content))
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **config)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a broken file raises a bare Exception, or a panic of the library's Rust code
        raise ValueError(f"tokenizer.json cannot be read: {error}") from None


def save_tokenizer(tokenizer, folder) -> None:
    """Writes the tokenizer's files into `folder`, each whole or not at all; other files in it stay.

    tokenizer.json comes last: a folder without it counts as no tokenizer, so a half-written one is not used.
    """
    for name, text in reversed(tokenizer_to_dict(tokenizer).items()):
        line_end = "\n" * (not text.endswith("\n") and name.endswith(".json"))
        with replaced(Path(folder) / name, text=True) as file:
            file.write(text + line_end)


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
        # Another kind of vocabulary, which transformers may convert. trust_remote_code=False: code in the folder is not
        # run, and the user is not asked about it.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer that can be read in {folder}: {error}") from None


def tokenizer_hash(tokenizer) -> str:
    """16 hex digits, the key of token caches: they differ whenever some text would get other ids."""
    key = [backend_json(tokenizer), tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def backend_json(tokenizer) -> dict:
    """The content of tokenizer.json; ValueError for a tokenizer of transformers that has no such file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast version; convert it to a tokenizer.json first")
    content = json.loads(backend.to_str())
    content["truncation"] = content["padding"] = None  # settings of the last call, not part of the vocabulary
    return content
