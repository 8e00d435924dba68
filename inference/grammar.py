"""What form an answer must have, said as a grammar: JSON of a schema, a pattern, one of some texts, a grammar's text.

  Grammar    what a request asks for
  compiled   a Grammar -> the parser that says, byte for byte, what may come next (llguidance, arXiv 2403.06988)
  refusal    tries an untrusted grammar in a process of its own -> why it cannot be used, or ""

A schema of a hundred bytes can ask for hours of work (an integer that is a multiple of 1,000,003). llguidance counts
its work, but not all of it, and a thread cannot be stopped. A process can.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

NAMES = {"json": "JSON schema", "regex": "regex", "choice": "choice", "grammar": "grammar", "calls": "set of tools"}
LONGEST = {"json": 65536, "regex": 8192, "choice": 65536, "grammar": 16384, "calls": 131072}  # characters
# JSON as the model has learned it: ", " and ": " between, no other white space. Where white space is free, a small
# model fills its answer with it.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# llguidance's counters; its own are five times as large. A step of the batch waits for the slowest of its masks.
LIMITS = {
    "initial_lexer_fuel": 300_000, "step_lexer_fuel": 50_000, "step_max_items": 10_000, "max_lexer_states": 20_000,
    "max_grammar_size": 100_000, "verbose_errors": False,
}  # fmt: skip
CHECK_SECONDS = 5.0
CHECK_BYTES = 2**30
MISSING = "answers of a given form need the package llguidance: pip install llguidance"


@dataclass(frozen=True)
class Grammar:
    """What an answer must match. Raises ValueError, in a sentence, for what is no such thing.

    kind, text   "json": a JSON schema; "regex": a pattern of Rust's regex crate, for the whole answer; "choice": a JSON
                 list of texts; "grammar": Lark's notation or llama.cpp's GBNF; "calls": Lark's, see calls()
    lenient      keywords of a schema that llguidance does not know are passed over instead of refused
    begins       the token after which the grammar holds, each time it comes; None: it holds for the whole answer
    """

    kind: str
    text: str
    lenient: bool = False
    begins: int | None = None

    def __post_init__(self):
        if self.kind not in NAMES:
            raise ValueError(f"a grammar is one of {', '.join(NAMES)}, not {self.kind!r}")
        if len(self.text) > LONGEST[self.kind]:
            raise ValueError(f"{self.name} of {len(self.text)} characters is too long; at most {LONGEST[self.kind]}")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{self.name} must be valid Unicode") from None

    @property
    def name(self) -> str:
        return f"this {NAMES[self.kind]}"

    @classmethod
    def json(cls, schema: dict | bool | str) -> "Grammar":
        """A JSON schema, or its text."""
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            schema = {} if schema is True else schema
            text = json.dumps(schema, ensure_ascii=False)
            if not isinstance(schema, dict):
                raise ValueError(f"a JSON schema is an object, not {text[:40]}")
            grammar = cls("json", text)  # before the schema is gone through: a long one is refused at once
            return replace(grammar, text=json.dumps(closed(schema), ensure_ascii=False))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"the schema is not JSON: {error}") from None
        except RecursionError:
            raise ValueError("the schema is nested too deeply") from None

    @classmethod
    def choice(cls, texts: list[str]) -> "Grammar":
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError("a choice is a list of texts, none of them empty")
        return cls("choice", json.dumps(texts, ensure_ascii=False))


MIXING = {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "patternProperties"}


def closed(schema: dict) -> dict:
    """The schema, in which objects that list properties have no others, wherever it leaves that open.

    What matches it matches the schema too, and a small model comes to an end: it would go on to invent properties. Not
    done where an object's properties stand in more than one schema, as with allOf: each would forbid the others'.
    """
    if any("allOf" in part or ("properties" in part and MIXING & part.keys()) for part in _subschemas(schema)):
        return schema
    schema = json.loads(json.dumps(schema))
    for part in _subschemas(schema):
        if isinstance(part.get("properties"), dict) and "minProperties" not in part:
            part.setdefault("additionalProperties", False)
    return schema


def _subschemas(schema):
    """All schemas in a schema, itself first. Values (enum, const, default) are none."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in list(schema.items()):
        if key in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
            value = list(value.values()) if isinstance(value, dict) else []
        elif key in ("enum", "const", "default", "examples"):
            continue
        for part in value if isinstance(value, list) else [value]:
            yield from _subschemas(part)


def calls(tools: list[dict], tags: tuple[int, int], most: int, answer: Grammar | None = None) -> Grammar:
    """One to `most` calls of tools ({"name", "parameters"?, "strict"?}), written as the model has learned to.

    tags: the tokens <tool_call> and </tool_call>. answer: a "json" grammar; the model may answer it instead of calling.
    A tool that is not strict may have keywords that llguidance does not know: they are passed over.
    """
    more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
    rules = ["start: calls" + (" | answer" if answer else ""), f"calls: call{more}"]
    rules += [f'call: <[{tags[0]}]> "\\n" body "\\n" <[{tags[1]}]>', *_bodies(tools)]
    if answer:
        rules.append(f"answer: %json {_styled(json.loads(answer.text), answer.lenient)}")
    return Grammar("calls", "\n".join(rules))


def one_call(tools: list[dict], tags: tuple[int, int]) -> Grammar:
    """The inside of each call the model begins by itself, up to its end; it is free to begin none."""
    return Grammar("calls", "\n".join([f'start: "\\n" body "\\n" <[{tags[1]}]>', *_bodies(tools)]), begins=tags[0])


def _bodies(tools: list[dict]) -> list[str]:
    """A rule a tool, and not one schema of all: the references in a schema begin at its own root."""
    rules = ["body: " + " | ".join(f"body_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        parameters = closed({"type": "object"} | (tool.get("parameters") or {}))
        name = json.dumps(tool["name"], ensure_ascii=False)
        head = json.dumps(f'{{"name": {name}, "arguments": ', ensure_ascii=False)
        schema = _styled(parameters, lenient=not tool.get("strict"))
        rules.append(f'body_{i}: {head} arguments_{i} "}}"\narguments_{i}: %json {schema}')
    return rules


def _styled(schema: dict, lenient: bool) -> str:
    return json.dumps(schema | {"x-guidance": JSON_STYLE | {"lenient": lenient}}, ensure_ascii=False)


JSON_OBJECT = Grammar("json", '{"type": "object"}')


@cache
def library():
    """llguidance; ValueError that says how to get it."""
    try:
        import llguidance
    except ImportError:
        raise ValueError(MISSING) from None
    return llguidance


def compiled(grammar: Grammar, tokenizer=None):
    """-> a matcher at its beginning (llguidance's LLMatcher). tokenizer: its LLTokenizer; None: of single bytes.

    Raises ValueError, in llguidance's words, for what it cannot do and for what nothing matches.
    """
    lib = library()
    matcher = lib.LLMatcher(
        tokenizer or lib.LLTokenizer("byte"), _source(lib, grammar), log_level=0, limits=lib.LLParserLimits(**LIMITS)
    )
    fault = matcher.get_error()
    if not fault:
        matcher.compute_bitmask()
        fault = matcher.get_error() or ("nothing matches it" if matcher.is_stopped() else "")
    if fault:
        # A fault of a regex is several lines, of which the last says what is wrong.
        lines = [line for line in fault.splitlines() if line.startswith("error: ")] or fault.strip().splitlines()
        fault = "nothing matches it" if fault.startswith("NoExtension") else lines[0].removeprefix("error: ")
        raise ValueError(f"{grammar.name} cannot be held: {fault[:200]}")
    matcher.reset()
    return matcher


def _source(lib, grammar: Grammar) -> str:
    """The grammar as llguidance takes it."""
    try:
        if grammar.kind == "json":
            style = JSON_STYLE | {"lenient": grammar.lenient}
            return lib.LLMatcher.grammar_from_json_schema(grammar.text, overrides=style)
        return lib.grammar_from("lark" if grammar.kind == "calls" else grammar.kind, grammar.text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{grammar.name} cannot be read: {str(error)[:200]}") from None


# ------------------------------------------------------------------------------------------- untrusted grammars
def refusal(grammar: Grammar) -> str:
    """Why the grammar cannot be held, "" where it can. Compiles it in a process that may take so long and so much."""
    library()
    request = json.dumps({"kind": grammar.kind, "text": grammar.text, "lenient": grammar.lenient})
    program = [sys.executable, "-m", "inference.grammar"]
    try:
        done = subprocess.run(
            program, input=request.encode(), capture_output=True, timeout=CHECK_SECONDS,
            cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{grammar.name} takes more than {CHECK_SECONDS:g} seconds to prepare; ask for a simpler one"
    if done.returncode:  # out of memory, or out of stack
        return f"{grammar.name} takes too much memory to prepare; ask for a simpler one"
    return done.stdout.decode()


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    except (ImportError, ValueError, OSError):  # Windows has no such limits, macOS not this one: the time is bounded
        pass
    try:
        compiled(Grammar(**json.load(sys.stdin)))
    except ValueError as error:
        print(error, end="")


if __name__ == "__main__":
    main()
