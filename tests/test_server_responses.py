"""POST /v1/responses through the official client: texts, calls, thinking, events, forms, refusals."""

import json

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel, Field
from serve import ADD, CALLS, HELLO, learned_model, serve, user, wait_until

from inference.engine import Engine

FUNCTION = {"type": "function", **ADD["function"]}


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
    return client.responses.create(**{"model": "tiny", "input": content, "temperature": 0, **fields})


def test_a_text_and_its_counts(client, engine):
    answer = ask(client)
    assert answer.output_text == HELLO and answer.status == "completed" and answer.object == "response"
    assert [item.type for item in answer.output] == ["message"] and answer.output[0].status == "completed"
    chat = client.chat.completions.create(model="tiny", messages=user("你好"), temperature=0).usage
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (chat.prompt_tokens, chat.completion_tokens)
    cut = ask(client, max_output_tokens=5)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert HELLO.startswith(cut.output_text) and cut.usage.output_tokens == 5


def test_the_input_becomes_the_conversation_it_is(client, engine):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "1+"}, {"type": "input_text", "text": "2, 3+4"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed",
         "content": [{"type": "output_text", "text": "I add.", "annotations": []}]},
        *({"type": "function_call", "call_id": str(i), "name": "add", "arguments": json.dumps(call["arguments"])}
          for i, call in enumerate(CALLS)),
        *({"type": "function_call_output", "call_id": str(i), "output": str(n)} for i, n in enumerate((3, 7))),
    ]  # fmt: skip
    messages = [
        {"role": "system", "content": "Be kind."}, *user("1+2, 3+4"),
        {"role": "assistant", "reasoning_content": "Hm.", "content": "I add.", "tool_calls": CALLS},
        {"role": "tool", "content": "3"}, {"role": "tool", "content": "7"},
    ]  # fmt: skip
    answer = ask(client, items, instructions="Be kind.", tools=[FUNCTION], max_output_tokens=1)
    assert answer.usage.input_tokens == len(engine.encode(messages, [ADD]))
    last = [*user("hi"), {"role": "assistant", "content": "ho"}]  # history, not the beginning of the answer
    assert ask(client, last, max_output_tokens=1).usage.input_tokens == len(engine.encode(last))


def test_calls_and_thinking(client):
    answer = ask(client, "1+2, 3+4", tools=[FUNCTION])
    assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
    calls = answer.output[1:]
    assert [{"name": c.name, "arguments": json.loads(c.arguments)} for c in calls] == CALLS
    assert len({call.call_id for call in calls}) == 2
    again = [*user("1+2, 3+4"), *(item.model_dump(exclude_none=True) for item in answer.output)]
    again += [{"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls]
    assert ask(client, again, tools=[FUNCTION], max_output_tokens=3).output
    chosen = {"type": "function", "name": "add"}
    other = FUNCTION | {"name": "other"}
    among = {"type": "allowed_tools", "mode": "required", "tools": [chosen]}
    for choice, tools in (("required", [FUNCTION]), (chosen, [other, FUNCTION]), (among, [other, FUNCTION])):
        forced = ask(client, "你好", tools=tools, tool_choice=choice, max_output_tokens=200)
        assert forced.output[0].type == "function_call" and forced.output[0].name == "add"
    thought = ask(client, "1+2")
    assert [item.type for item in thought.output] == ["reasoning", "message"]
    assert thought.output[0].content[0].text == "One and two." and thought.output_text == "It is 3."


@pytest.mark.parametrize(("content", "tools"), [("你好", []), ("1+2, 3+4", [FUNCTION]), ("1+2", [])])
def test_the_events_of_a_stream_add_up_to_the_whole(client, content, tools):
    whole = ask(client, content, tools=tools)
    events = list(ask(client, content, tools=tools, stream=True))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    plain = {"id", "call_id"}
    told = [item.model_dump(exclude=plain) for item in events[-1].response.output]
    assert told == [item.model_dump(exclude=plain) for item in whole.output]
    assert events[-1].response.usage == whole.usage and events[0].response.output == []
    done = [e for e in events if e.type == "response.output_item.done"]
    assert [e.item.model_dump(exclude=plain) for e in done] == told and [e.output_index for e in done] == [
        *range(len(told))
    ]
    for i, item in enumerate(told):
        deltas = "".join(e.delta for e in events if e.type.endswith(".delta") and e.output_index == i)
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    with client.responses.stream(model="tiny", input=content, temperature=0, tools=tools) as stream:
        assert stream.get_final_response().output_text == whole.output_text


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=130)


def test_answers_that_have_a_form(client):
    parsed = client.responses.parse(
        model="tiny", input="你好", text_format=Person, temperature=1, max_output_tokens=300
    )
    assert 0 <= parsed.output_parsed.age <= 130
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    assert json.loads(ask(client, text=form).output_text)["a"] in (1, 2)


def test_what_needs_a_store_is_refused_by_name(client, live):
    wrong = [
        {"previous_response_id": "resp_1"}, {"conversation": "c"}, {"background": True}, {"top_logprobs": 3},
        {"truncation": "auto"}, {"include": ["message.output_text.logprobs"]}, {"prompt": {"id": "p"}},
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(fields))} is not supported"):
            ask(client, **fields)
    for fields, words in (
        ({"tools": [{"type": "web_search"}]}, "a tool of type 'web_search' is not supported"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "web_search"}}, "'web_search' cannot be chosen"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format of type json_schema needs a schema"),
        ({"temperature": 9}, "temperature"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"), ({"input": []}, "input"),
        ({"input": user([{"type": "input_image", "image_url": "data:"}])}, "input_image"),
        ({"input": "好" * 3000}, "maximum context length is 1024"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=words):
            client.responses.create(**{"model": "tiny", "input": "hi", **fields})
    odd = [{"input": value} for value in (
        5, [5], [{"role": 5}], [{"type": ["x"]}], [{}], [{"type": "function_call"}],
        user([5]), [{"role": "assistant", "content": 5}], user([{"type": "input_text", "text": 5}]),
    )]  # fmt: skip
    odd += [{"input": "hi"} | fields for fields in (
        {"tools": [5]}, {"tools": [{"type": "function", "name": 5}]}, {"tool_choice": {"type": "x"}}, {"text": 5},
        {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [5]}},
        {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": {}}},
        {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "no",
                                              "tools": [{"type": "function", "name": "add"}]}},
    )]  # fmt: skip
    for body in odd:
        refused = httpx.post(f"{live.url}/responses", json={"model": "tiny"} | body)
        assert refused.status_code == 400 and refused.json()["error"]["message"], body


def test_a_failure_inside_a_stream_is_an_event(engine):
    with serve(engine) as live:
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=0)
        stream = ask(client, stream=True, extra_body={"ignore_eos": True})
        next(stream)
        live.scheduler.close()
        last = list(stream)[-1]
        assert last.type == "response.failed" and "shutting down" in last.response.error.message
