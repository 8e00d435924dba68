"""The form that a visitor wants answers in: one of some texts, or JSON of a schema."""

import functools

from inference.grammar import Grammar, refusal

KINDS = ("choice", "schema")


@functools.lru_cache(maxsize=32)
def form_of(kind: str, text: str) -> Grammar:
    """kind "choice": a text a line; "schema": a JSON schema. Raises ValueError for what is none or cannot be held."""
    if kind == "choice":
        grammar = Grammar.choice(list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())))
    else:
        grammar = Grammar.json(text)
    if why := refusal(grammar):
        raise ValueError(why)
    return grammar
