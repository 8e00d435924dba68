"""Answers that must have a form: what matches, what is refused, what neighbours and streams change (nothing)."""

import json
import random
import re
import subprocess
import sys
import threading
import time

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from serve import ADD, learned_model, serve, user, wait_until

from inference import grammar as grammars
from inference.engine import Engine
from inference.grammar import JSON_OBJECT, Grammar, calls, closed, one_call, refusal
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12},
                   "age": {"type": "integer", "minimum": 0, "maximum": 130},
                   "likes": {"type": "array", "items": {"enum": ["tea", "茶", "<|im_end|>"]}, "maxItems": 3}},
    "required": ["name", "age", "likes"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return Engine(*learned_model())


@pytest.fixture(scope="module")
def live(engine):
    with serve(engine) as server:
        yield server
        wait_until(server.idle)


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=live.url, api_key="any", max_retries=0, timeout=60)


def ask(client, content="你好", **fields):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": user(content), "temperature": 1, "seed": 3, "max_tokens": 200, **fields}
    )


def answers(engine, grammar, n=8, prompt=None, **fields):
    params = SamplingParams(**{"max_tokens": 200, "seed": 1, "n": n, "grammar": grammar, **fields})
    return engine.generate([prompt or user("你好")], params)


# ------------------------------------------------------------------------------------------------------- the engine
def test_every_kind_of_form(engine):
    for grammar, matches in (
        (Grammar.json(PERSON), lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
        (JSON_OBJECT, lambda text: isinstance(json.loads(text), dict)),
        (Grammar("regex", r"[a-c]{3}-[0-9]+!"), lambda text: re.fullmatch(r"[a-c]{3}-[0-9]+!", text)),
        (Grammar.choice(["yes", "no thanks", '好\n"\\😀']), lambda text: text in ("yes", "no thanks", '好\n"\\😀')),
        (Grammar("grammar", 'start: "x" NUM\nNUM: /[0-9]{2}/'), lambda text: re.fullmatch("x[0-9]{2}", text)),
        (Grammar("grammar", 'root ::= "a" [0-9] "b"'), lambda text: re.fullmatch("a[0-9]b", text)),
    ):
        ended = [answer for answer in answers(engine, grammar) if answer.finish_reason == "stop"]
        assert ended and all(matches(answer.text) for answer in ended), grammar
        assert all(answer.token_ids[-1] in engine.end_tokens for answer in ended)


def test_a_truncated_answer_says_so_and_an_end_token_that_does_not_end_is_no_way_out(engine):
    (cut,) = answers(engine, Grammar.json(PERSON), n=1, max_tokens=6)
    assert cut.finish_reason == "length" and cut.text.startswith('{"name": "')
    (whole,) = answers(engine, Grammar.choice(["yes"]), n=1, ignore_eos=True)  # nothing can follow: it ends
    assert whole.text == "yes" and whole.finish_reason == "stop"
    (stopped,) = answers(engine, Grammar.json(PERSON), n=1, stop=['"age"'])
    assert stopped.finish_reason == "stop" and stopped.text.endswith(", ")


def test_a_form_changes_nothing_for_the_neighbours_nor_they_for_it(engine):
    grammar = Grammar.json(PERSON)
    wishes = [SamplingParams(seed=i, max_tokens=60, grammar=grammar if i % 2 else None) for i in range(6)]
    together = engine.generate([user("你好")] * 6, wishes)
    assert [a.token_ids for a in together] == [engine.generate([user("你好")], w)[0].token_ids for w in wishes]
    streamed = "".join(piece.text for piece in engine.stream(user("你好"), wishes[1]))
    assert streamed == together[1].text


def test_thinking_is_free_and_the_form_begins_after_it(engine):
    """The model has learned to think about "1+2" and not to think about "你好"."""
    yes = Grammar.choice(["yes"])
    assert [a.text for a in answers(engine, yes, n=1, prompt=user("1+2"), temperature=0)] == [
        "<think>\nOne and two.\n</think>\n\nyes"
    ]
    assert answers(engine, yes, n=1)[0].text == "yes"
    for opened, text in ((True, "One and two.\n</think>\n\nyes"), (False, "yes")):
        thinking = Engine(engine.source, engine.tokenizer, enable_thinking=opened)
        assert answers(thinking, yes, n=1, prompt=user("1+2"), temperature=0)[0].text == text
    assert answers(engine, yes, n=1, prompt="1+2")[0].text == "yes"  # a text that goes on has no thoughts


def test_cancelled_like_any_other(engine):
    with Scheduler(engine, slots=2) as scheduler:
        endless = SamplingParams(grammar=Grammar("regex", "a{2000}"), n=2)
        handle = scheduler.submit(engine.encode(user("你好")), endless)
        next(iter(handle))
        handle.cancel()
        assert {answer.finish_reason for answer in handle.result()} == {"cancelled"}
        after = scheduler.submit(engine.encode(user("你好")), SamplingParams(grammar=Grammar.choice(["yes"])))
        assert after.result()[0].text == "yes"


def test_calls_are_written_as_the_model_has_learned_them(engine):
    vocabulary = engine.tokenizer.get_vocab()
    tags = vocabulary["<tool_call>"], vocabulary["</tool_call>"]
    tree = {"$defs": {"n": {"enum": ["</tool_call>", "b"]}}, "properties": {"x": {"$ref": "#/$defs/n"}},
            "required": ["x"], "additionalProperties": False}  # fmt: skip
    tools = [ADD["function"], {"name": 'say "it"', "parameters": tree, "strict": True}, {"name": "now"}]
    block = re.compile(r"<tool_call>\n(.*)\n</tool_call>")
    for answer in answers(engine, calls(tools, tags, 2)):
        if answer.finish_reason == "stop":
            found = block.findall(answer.text)
            assert "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in found) == answer.text
            assert len(found) <= 2 and all(json.loads(call)["name"] in ("add", 'say "it"', "now") for call in found)
    free = one_call([ADD["function"] | {"strict": True}], tags)  # the learned answer, text and calls, is left as it is
    prompt = engine.encode(user("1+2, 3+4"), [ADD])
    learned = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=200))[0]
    assert engine.generate([prompt], SamplingParams(temperature=0, max_tokens=200, grammar=free))[0] == learned


def test_objects_that_list_their_properties_are_closed_where_that_is_safe():
    listed = {"type": "object", "properties": {"a": {}}}
    assert closed(listed) == listed | {"additionalProperties": False}
    assert closed({"$defs": {"x": listed}, "items": listed})["$defs"]["x"]["additionalProperties"] is False
    for open_one in (listed | {"additionalProperties": True}, listed | {"minProperties": 2}, {"allOf": [listed]},
                     listed | {"anyOf": [listed]}, {"enum": [listed]}, {"type": "object"}):  # fmt: skip
        assert closed(open_one) == open_one
    named = {"type": "object", "properties": {"properties": {"type": "string"}}}  # a property of that name
    assert closed(named) == named | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (lambda: Grammar.json({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: Grammar.json({"type": "strng"}), "strng"),
        (lambda: Grammar.json("{"), "not JSON"),
        (lambda: Grammar.json(False), "is an object"),
        (lambda: Grammar.json({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (lambda: Grammar.json({"$ref": "#"}), "nothing matches"),
        (lambda: Grammar("regex", "(?=a)b"), "look-around"),
        (lambda: Grammar("regex", "("), "regex"),
        (lambda: Grammar("grammar", "start: nowhere"), "nowhere"),
        (lambda: Grammar.choice([]), "list of texts"),
        (lambda: Grammar("regex", "a" * 10000), "too long"),
        (lambda: Grammar.choice(["\ud800"]), "Unicode"),
    ],
)
def test_what_cannot_be_held_is_refused_in_words(engine, grammar, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        answers(engine, grammar())


def deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_hostile_grammars_take_a_bounded_time(monkeypatch):
    monkeypatch.setattr(grammars, "CHECK_SECONDS", 1.0)
    slow = [
        {"type": "integer", "multipleOf": 1000003},
        {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(3, 40)]},
        {"allOf": [{"anyOf": [{"properties": {f"k{i}": {"const": j}}} for j in range(4)]} for i in range(12)]},
        deep(150),
        deep(400),
    ]
    begin = time.monotonic()
    assert all(re.search("seconds|too large|recursion|memory", refusal(Grammar.json(schema))) for schema in slow)
    assert time.monotonic() - begin < 20  # the longest takes minutes where nothing stops it
    for schema in (deep(5000), {"enum": ["x" * 100] * 1000}):
        with pytest.raises(ValueError, match="too deeply|too long"):
            Grammar.json(schema)
    assert refusal(Grammar.json({"enum": [f"{i}" for i in range(3000)]})) == ""


def test_a_limit_of_the_parser_ends_the_answer_as_cut(engine):
    endless = {"$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}}}
    (answer,) = answers(engine, Grammar.json(endless | {"$ref": "#/$defs/a"}), n=1)
    assert answer.finish_reason == "length"


def test_without_the_library_one_line_says_what_to_install():
    code = "import sys; sys.modules['llguidance'] = None; from inference.grammar import *; compiled(JSON_OBJECT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("pip install llguidance")


# ------------------------------------------------------------------------------------------------------- the server
class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=130)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
        {"response_format": {"type": "json_object", "schema": PERSON}}, {"json_schema": PERSON},
        {"guided_json": PERSON}, {"guided_json": json.dumps(PERSON)}, {"structured_outputs": {"json": PERSON}},
    ],
)  # fmt: skip
def test_a_schema_in_every_spelling(client, fields):
    whole = ask(client, extra_body=fields, n=2)
    for choice in whole.choices:
        jsonschema.validate(json.loads(choice.message.content), PERSON)
    streamed = ["", ""]
    for chunk in ask(client, extra_body=fields, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-f]{4}"}, "[a-f]{4}"), ({"guided_choice": ["tea", "coffee"]}, "tea|coffee"),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"), ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"structured_outputs": {"regex": "[a-f]{4}"}}, "[a-f]{4}"),
        ({"structured_outputs": {"choice": ["tea"]}}, "tea"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}, "x[0-9]"),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 4}, r"\{.*"),
        ({"response_format": {"type": "text"}, "guided_regex": "", "structured_outputs": None}, "(?s).*"),
    ],
)  # fmt: skip
def test_the_other_spellings_in_chats_and_completions(client, fields, pattern):
    assert re.fullmatch(pattern, ask(client, extra_body=fields).choices[0].message.content)
    text = client.completions.create(model="tiny", prompt="你好", max_tokens=30, extra_body=fields).choices[0].text
    assert re.fullmatch(pattern, text)


def test_the_official_clients_parse(client):
    done = client.chat.completions.parse(model="tiny", messages=user("你好"), response_format=Person, temperature=0.5,
                                         seed=3, max_tokens=300)  # fmt: skip
    assert isinstance(done.choices[0].message.parsed, Person)
    called = client.chat.completions.parse(
        model="tiny", messages=user("你好"), tools=[openai.pydantic_function_tool(Person)], tool_choice="required",
        temperature=0.5, seed=3, max_tokens=400, parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = called.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Person) and called.choices[0].finish_reason == "tool_calls"


def test_thinking_stays_apart_from_the_form(client):
    answer = ask(client, "1+2", temperature=0, extra_body={"guided_choice": ["yes"]}).choices[0].message
    assert answer.content == "yes" and answer.reasoning_content == "One and two."
    opened = {"guided_choice": ["yes"], "chat_template_kwargs": {"enable_thinking": True}}
    answer = ask(client, "1+2", temperature=0, extra_body=opened).choices[0].message
    assert answer.content == "yes" and answer.reasoning_content == "One and two."
    called = ask(client, "1+2", temperature=0, tools=[ADD], tool_choice="required").choices[0].message
    assert called.tool_calls[0].function.name == "add"


def test_tools_and_a_form_in_one_request(client):
    strict = {"type": "function", "function": ADD["function"] | {"strict": True}}
    learned = ask(client, "1+2, 3+4", tools=[strict], temperature=0).choices[0].message
    assert learned.content == "I add." and len(learned.tool_calls) == 2  # free to talk, held where it calls
    fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}
    for seed in range(4):
        message = ask(client, tools=[ADD], extra_body=fields, seed=seed).choices[0].message
        assert message.tool_calls or jsonschema.validate(json.loads(message.content), PERSON) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "one form"),
        ({"guided_json": {"type": "array", "contains": {"const": 1}}}, "contains"),
        ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}}, "this JSON schema"),
        ({"guided_regex": "(?=a)"}, "look-around"), ({"guided_regex": "a" * 9000}, "too long"),
        ({"guided_choice": [1]}, "guided_choice"), ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "whitespace_pattern"),
        ({"guided_whitespace_pattern": " "}, "white space"), ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        ({"guided_regex": "a", "tools": [ADD]}, "tool_choice: none"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True,
                     "parameters": {"properties": {"a": {"not": {}}}}}}]}, "not"),
    ],
)  # fmt: skip
def test_refused_in_words_with_400(client, fields, words):
    with pytest.raises(openai.BadRequestError, match=re.escape(words)):
        ask(client, extra_body=fields)


def test_a_slow_schema_holds_up_nobody_and_is_tried_once(client, monkeypatch):
    monkeypatch.setattr(grammars, "CHECK_SECONDS", 1.5)
    slow, known, refused = {"type": "integer", "multipleOf": 1000003}, {"guided_choice": ["tea", "coffee"]}, []

    def hostile():
        with pytest.raises(openai.BadRequestError, match="more than 1.5 seconds") as caught:
            ask(client, extra_body={"guided_json": slow})
        refused.append(caught.value.code)

    ask(client, extra_body=known)
    thread = threading.Thread(target=hostile)
    thread.start()
    assert ask(client, extra_body=known).choices and not refused  # answered while the slow one is tried
    thread.join()
    assert refused == ["unsupported_form"]
    begin = time.monotonic()
    hostile()
    assert time.monotonic() - begin < 1


# -------------------------------------------------------------------------------------------- random bounded schemas
def random_schema(seed: int) -> dict:
    """A schema of bounded answers, from the keywords that programs send."""
    pick = random.Random(seed)

    def schema(depth):
        kinds = ["string", "integer", "number", "enum", "boolean", "null", "pattern", "date"]
        kind = pick.choice(kinds + ["object", "array", "anyOf", "object"] * (depth > 0))
        low = pick.randint(-50, 50)
        if kind == "string":
            return {"type": "string", "minLength": pick.randint(0, 3), "maxLength": pick.randint(3, 12)}
        if kind in ("integer", "number"):
            return {"type": kind, "minimum": low, "maximum": low + pick.randint(0, 1000)}
        if kind == "enum":
            return {"enum": pick.sample(["a", "茶", 1, 2.5, None, True, 'say "x"\n', "<|im_end|>"], pick.randint(1, 5))}
        if kind == "pattern":
            return {"type": "string", "pattern": pick.choice(["^[A-Z]{2}-[0-9]{1,4}$", "^(ab|c)d?$", "^[^a-z]{1,5}$"])}
        if kind == "date":
            return {"type": "string", "format": pick.choice(["date", "time", "uuid", "ipv4"])}
        if kind == "array":
            return {"type": "array", "items": schema(depth - 1), "minItems": pick.randint(0, 1), "maxItems": 3}
        if kind == "anyOf":
            return {"anyOf": [schema(depth - 1) for _ in range(pick.randint(2, 3))]}
        if kind == "object":
            names = pick.sample(["a", "b c", "名", "count", "x_1"], pick.randint(0, 4))
            properties = {name: schema(depth - 1) for name in names}
            return {"type": "object", "properties": properties, "required": names[: pick.randint(0, len(names))],
                    "additionalProperties": False}  # fmt: skip
        return {"type": kind}

    return schema(2)


def validated(engine, schemas) -> float:
    """Asserts that every finished answer validates; the share that finished."""
    wishes = [SamplingParams(seed=i, max_tokens=256, grammar=Grammar.json(s)) for i, s in enumerate(schemas)]
    done = engine.generate([user("你好")] * len(schemas), wishes)
    for schema, answer in zip(schemas, done, strict=True):
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), schema)
        else:
            assert answer.finish_reason == "length" and answer.completion_tokens == 256
    return sum(answer.finish_reason == "stop" for answer in done) / len(done)


def test_random_schemas(engine):
    assert validated(engine, [random_schema(i) for i in range(40)]) >= 0.8


@pytest.mark.slow
def test_a_thousand_random_schemas(engine):
    assert validated(engine, [random_schema(1000 + i) for i in range(1000)]) >= 0.8
