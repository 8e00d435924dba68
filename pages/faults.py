"""Which of the catalogue's sentences an error is: the programs below speak English, the page the visitor's language."""

import re

PATTERNS = {  # key of the words, after "fault_": what the error says
    "too_long": r"prompt has (?P<tokens>\d+) tokens.* context of (?P<context>\d+)",
    "text_too_long": r"(?:text|conversation) has (?P<tokens>\d+) tokens.*?(?P<most>\d+) at most",
    "unreachable": r"cannot reach (?P<address>\S*): ",
    "refused": r"(?P<address>\S+) refuses: ",
    "no_api": r"(?P<address>\S+) does not answer as OpenAI's API",
    "no_client": r"pip install openai",
    "adapter": r"is an adapter for the weights (?P<base>.+), which are not there",
    "tokenizer": r"comes without a tokenizer|the tokenizer has .* entries",
    "form": r"^(?:this (?:JSON schema|choice) |the schema is |a JSON schema is |a choice is )",
    "no_grammar": r"pip install llguidance",
    "weights": r"(?P<file>\S+\.(?:pth|safetensors|bin))",
    "not_a_chat": r"not a chat: ",
    "empty_text": r"no text to look at",
    "vocabularies": r"tokenizers differ|did not read the same tokens",
    "file_line": r"(?P<file>\S+):(?P<line>\d+): ",
    "no_rows": r"(?P<file>\S+) holds no (?:usable )?rows",
    "no_file": r"no such file[^:]*: (?P<file>.+)",
    "no_folder": r"no folder (?P<folder>[^:]+): ",
}


def explained(error: Exception) -> tuple[str, dict[str, str]]:
    """-> (key, what the sentence is filled with). "other" for an error that no sentence is about: it is shown as is."""
    text = str(error)
    for key, pattern in PATTERNS.items():
        if found := re.search(pattern, text):
            return key, found.groupdict()
    return "other", {"text": text}
