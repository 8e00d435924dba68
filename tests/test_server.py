"""The server through the official client and as two chat pages ask: answers, streams, tools, thinking, refusals."""

import json
import math
import threading

import httpx2 as httpx
import openai
import pytest
from serve import ADD, CALLS, HELLO, learned_model, serve, user, wait_until

from chat.sources import Remote, Settings
from chat.terminal import print_answer
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import AnswerReader
from serving.middleware import Limits

LONG = {"ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    return Engine(*learned_model())


@pytest.fixture(scope="module")
def live(engine):
    with serve(engine) as server:
        yield server
        wait_until(server.idle)  # no test left a slot taken


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=live.url, api_key="any", max_retries=0, timeout=60)


def ask(client, content="你好", **fields):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": user(content), "temperature": 0, "max_tokens": 200, **fields}
    )


def joined(chunks, field="content"):
    return "".join(getattr(c.choices[0].delta, field, None) or "" for c in chunks if c.choices)


# ---------------------------------------------------------------------------------------------------------- answers
def test_a_plain_answer_is_the_engines_and_its_counts_are_true(client, engine):
    expected = engine.generate([user("你好")], SamplingParams(temperature=0, max_tokens=200))[0]
    answer = ask(client)
    assert answer.choices[0].message.content == expected.text == HELLO
    assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len(engine.encode(user("你好")))
    assert answer.usage.completion_tokens == expected.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    cut = ask(client, max_tokens=5)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 5
    assert ask(client, temperature=1e-9).choices[0].message.content == HELLO  # nothing overflows


def test_a_stream_equals_the_whole(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == HELLO and chunks[0].choices[0].delta.role == "assistant"
    assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == [] and chunks[-1].usage == ask(client).usage
    assert all(c.usage is None for c in chunks[:-1])
    assert all(c.usage is None and c.choices for c in ask(client, stream=True))  # not asked for: no such chunk


def test_the_bytes_of_a_stream(live):
    body = {"model": "tiny", "messages": user("你好"), "temperature": 0, "stream": True}
    response = httpx.post(f"{live.url}/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_completions_continue_text(client, engine):
    params = SamplingParams(temperature=0, max_tokens=12)
    expected = [a.text for a in engine.generate(["从前", "One", [5, 6, 7]], params)]
    fields = {"model": "minimind", "temperature": 0, "max_tokens": 12}
    got = client.completions.create(prompt=["从前", "One"], **fields)
    assert [c.text for c in got.choices] == expected[:2] and [c.index for c in got.choices] == [0, 1]
    assert got.usage.prompt_tokens == sum(len(engine.encode(p)) for p in ("从前", "One")) and got.model == "minimind"
    assert client.completions.create(prompt=[5, 6, 7], **fields).choices[0].text == expected[2]
    assert client.completions.create(prompt=[[5, 6, 7]], **fields).choices[0].text == expected[2]
    stream = client.completions.create(prompt=["从前", "One"], stream=True, **fields)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected[:2]


def test_n_seed_and_stop(client, engine):
    hot = {"temperature": 2.0, "seed": 7, "max_tokens": 12, "extra_body": {"top_k": 50, **LONG}}
    first, again = ask(client, n=3, **hot), ask(client, n=3, **hot)
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices] and len(set(texts)) == 3
    params = SamplingParams(temperature=2.0, seed=7, max_tokens=12, n=3, top_k=50, ignore_eos=True)
    assert texts == [a.text for a in engine.generate([user("你好")], params)]
    assert first.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, stream=True, **hot):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    for stop in ("小模型", ["zzz", "小模型"]):
        stopped = ask(client, stop=stop).choices[0]
        assert stopped.message.content == "你好！我是一个" and stopped.finish_reason == "stop"
    assert joined(ask(client, stop="小模型", stream=True)) == "你好！我是一个"


def test_logprobs(client, engine):
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == HELLO  # the end token is no part of it
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].bytes == entry.bytes  # greedy: the token is the best one
        assert math.isclose(entry.top_logprobs[0].logprob, entry.logprob, abs_tol=1e-6)
    streamed = [c.choices[0].logprobs for c in ask(client, logprobs=True, top_logprobs=3, stream=True) if c.choices]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs.content] == content
    old = client.completions.create(model="tiny", prompt="One", temperature=0, max_tokens=5, logprobs=2).choices[0]
    expected = engine.generate(["One"], SamplingParams(temperature=0, max_tokens=5, logprobs=2))[0]
    assert old.logprobs.token_logprobs == pytest.approx([item.logprob for item in expected.logprobs])
    assert [len(top) for top in old.logprobs.top_logprobs] == [2] * 5 and old.logprobs.text_offset[0] == 0


def test_max_tokens_minus_one_or_absent_is_what_fits(client, engine):
    for fields in ({"max_tokens": -1}, {"max_tokens": None}, {"max_completion_tokens": -1}, {"max_tokens": 99999}):
        answer = ask(client, "1 " * 480, extra_body=LONG, **fields)
        assert answer.usage.total_tokens == engine.context and answer.choices[0].finish_reason == "length"
    assert ask(client, max_completion_tokens=3, max_tokens=9).usage.completion_tokens == 3


def test_biases_and_penalties_reach_the_sampler(client, engine):
    first = engine.generate([user("你好")], SamplingParams(temperature=0, max_tokens=1))[0].token_ids[0]
    answer = ask(client, logit_bias={str(first): -100})
    assert not answer.choices[0].message.content.startswith("你好")
    params = SamplingParams(temperature=0, max_tokens=30, presence_penalty=2, frequency_penalty=2, ignore_eos=True)
    got = ask(client, presence_penalty=2, frequency_penalty=2, max_tokens=30, extra_body=LONG)
    assert got.choices[0].message.content == engine.generate([user("你好")], params)[0].text
    params = SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.5, ignore_eos=True)
    whole = engine.generate([user("你好")], params)[0]
    for name in ("repetition_penalty", "repeat_penalty"):
        assert ask(client, max_tokens=30, extra_body=LONG | {name: 1.5}).choices[0].message.content == whole.text
    stopped = ask(client, extra_body={"stop_token_ids": [first]})
    assert stopped.choices[0].finish_reason == "stop" and stopped.usage.completion_tokens == 1


# ------------------------------------------------------------------------------------------------ tools and thinking
def arguments(calls):
    return [{"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in calls]


def test_tool_calls(client):
    choice = ask(client, "1+2, 3+4", tools=[ADD]).choices[0]
    assert choice.message.content == "I add." and choice.finish_reason == "tool_calls"
    assert arguments(choice.message.tool_calls) == CALLS
    assert len({call.id for call in choice.message.tool_calls}) == 2
    one = ask(client, "1+2, 3+4", tools=[ADD], parallel_tool_calls=False).choices[0]
    assert arguments(one.message.tool_calls) == CALLS[:1]
    chunks = list(ask(client, "1+2, 3+4", tools=[ADD], stream=True))
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
    assert joined(chunks) == "I add." and arguments(calls) == CALLS and [call.index for call in calls] == [0, 1]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    plain = ask(client, "1+2, 3+4", tools=[ADD], tool_choice="none").choices[0]
    assert plain.message.tool_calls is None and plain.finish_reason != "tool_calls"
    followed = [*user("1+2, 3+4"), choice.message.model_dump(exclude_none=True)]
    followed += [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in choice.message.tool_calls]
    assert client.chat.completions.create(model="tiny", messages=followed, tools=[ADD], max_tokens=3).choices


def test_a_call_that_must_be_made(client):
    """Whatever the model would rather say: a grammar leaves it nothing but calls."""
    named = {"type": "function", "function": {"name": "add"}}
    for choice in (named, "required"):
        answer = ask(client, "1+2, 3+4", tools=[ADD], tool_choice=choice).choices[0]
        first = arguments(answer.message.tool_calls)[0]
        assert first["name"] == "add" and first["arguments"].keys() <= {"a", "b"} and not answer.message.content
        assert answer.finish_reason == "tool_calls"
        calls = [
            call
            for chunk in ask(client, "1+2, 3+4", tools=[ADD], tool_choice=choice, stream=True)
            for call in chunk.choices[0].delta.tool_calls or []
        ]
        assert arguments(calls) == arguments(answer.message.tool_calls)


def test_a_choice_among_some_tools_is_that_of_a_request_with_only_these(client):
    named = {"type": "function", "function": {"name": "add"}}
    other = {"type": "function", "function": ADD["function"] | {"name": "other"}}
    for mode in ("auto", "required"):
        among = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}
        answer = ask(client, "1+2, 3+4", tools=[other, ADD], tool_choice=among)
        alone = ask(client, "1+2, 3+4", tools=[ADD], tool_choice=mode)
        assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
        assert arguments(answer.choices[0].message.tool_calls) == arguments(alone.choices[0].message.tool_calls)
    with pytest.raises(openai.BadRequestError, match="names 'add', which is not among the tools"):
        ask(client, tools=[other], tool_choice=among)


def test_the_terminal_client_prints_thinking_apart(live, capsys):
    settings = Settings(max_tokens=50, temperature=0, top_p=None)
    said = print_answer(Remote(live.url, "any", "tiny").stream(user("1+2"), settings))
    assert said == "It is 3."  # what goes into the history
    assert capsys.readouterr().out == "[thinks] One and two. [/thinks]\nIt is 3.\n"


def test_thinking(client):
    whole = ask(client, "1+2").choices[0].message
    assert whole.reasoning_content == "One and two." and whole.content == "It is 3."
    chunks = list(ask(client, "1+2", stream=True))
    assert joined(chunks, "reasoning_content") == "One and two." and joined(chunks) == "It is 3."
    for extra in ({"chat_template_kwargs": {"open_thinking": True}}, {"open_thinking": True}):
        opened = ask(client, "1+2", extra_body=extra)
        assert opened.choices[0].message.reasoning_content == "One and two."
        assert opened.choices[0].message.content == "It is 3."
    closed = ask(client, "1+2", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert not hasattr(closed.choices[0].message, "reasoning_content")
    assert closed.usage.prompt_tokens > ask(client, "1+2").usage.prompt_tokens  # the empty block


# ------------------------------------------------------------------------------------------- what chat pages send
def test_what_open_webui_sends(live):
    """GET /models, a streamed chat, and a task (a title) in one piece, with the fields its settings add."""
    assert [m["id"] for m in httpx.get(f"{live.url}/models").json()["data"]] == ["tiny", "minimind"]
    chat = {
        "stream": True, "model": "tiny", "messages": [{"role": "system", "content": "Be kind."}, *user("你好")],
        "stream_options": {"include_usage": True}, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
        "repeat_penalty": 1.1, "frequency_penalty": 0.1, "seed": 1, "stop": ["###"], "max_tokens": 20,
        "user": {"name": "A", "id": "1", "email": "a@b", "role": "admin"}, "logit_bias": {"50": 1},
        "reasoning_effort": "medium", "metadata": {"task": "x"}, "session_id": "s", "chat_id": "c", "files": None,
    }  # fmt: skip
    response = httpx.post(f"{live.url}/chat/completions", json=chat)
    assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
    title = {
        "model": "tiny", "messages": user("### Task:\nGenerate a title"), "stream": False,
        "max_completion_tokens": 1000, "metadata": {"task": "title_generation", "chat_id": "c"},
    }  # fmt: skip
    assert httpx.post(f"{live.url}/chat/completions", json=title, timeout=60).json()["choices"]
    image = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    refused = httpx.post(f"{live.url}/chat/completions", json=chat | {"messages": user(image)})
    assert refused.status_code == 400 and "text only" in refused.json()["error"]["message"]


def test_what_fastgpt_sends(live):
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    body = {
        "model": "tiny", "stream": True, "temperature": 0.01, "max_tokens": 20, "top_p": None, "stop": ["a", "b"],
        "stream_options": {"include_usage": True}, "tools": [ADD], "tool_choice": "auto", "parallel_tool_calls": True,
        "messages": [
            {"role": "system", "content": "S", "dataId": "1", "hideInUI": False},
            {"role": "user", "content": [{"type": "text", "text": "1+2"}]},
            {"role": "assistant", "content": "", "reasoning_text": "Hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "name": "add", "content": "3"},
        ],
    }  # fmt: skip
    response = httpx.post(f"{live.url}/chat/completions", json=body)
    assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
    probe = {"model": "tiny", "messages": user("hi"), "stream": True, "response_format": None, "stop": ""}
    assert httpx.post(f"{live.url}/chat/completions", json=probe | {"max_tokens": 3}).status_code == 200


# ---------------------------------------------------------------------------------------------- refusals and limits
def test_each_class_of_error(client, live, engine):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here") as caught:
        ask(client, model="gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings: no such address"):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'org/name' here"):
        client.models.retrieve("org/name")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, stop=[1])
    assert caught.value.param == "stop.0"
    assert client.models.retrieve("tiny").model_extra["max_model_len"] == engine.context
    with pytest.raises(
        openai.BadRequestError, match="maximum context length is 1024 tokens. However, your messages have 1508"
    ) as caught:
        ask(client, "好" * 3000)
    assert caught.value.code == "context_length_exceeded"
    assert httpx.get(f"{live.url}/chat/completions").status_code == 405
    assert httpx.get(f"{live.root}/").json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra_body": {"functions": [{"name": "f"}]}}, "use tools"),
        ({"extra_body": {"modalities": ["audio"]}}, "text only"),
        ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, "chat_template_kwargs.x"),
        ({"temperature": -1}, "temperature"), ({"top_p": -0.1}, "top_p"), ({"n": 5}, "only 4 answers"),
        ({"n": 0}, "n:"), ({"max_tokens": 0}, "at least 1"), ({"max_tokens": -2}, "max_tokens"),
        ({"top_logprobs": 3}, "needs logprobs"), ({"logit_bias": {"999999": 1}}, "999999"),
        ({"stop": [str(i) for i in range(1000)]}, "at most 16"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "no content"), ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among"),
        ({"extra_body": {"min_tokens": 5}}, "min_tokens"), ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_in_words(client, fields, words):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert words in caught.value.message


@pytest.mark.parametrize("fields", [{"tools": [ADD]}, {"max_completion_tokens": 5}, {"suffix": "x"}])
def test_completions_refuse_what_belongs_to_chats(client, fields):
    with pytest.raises(openai.BadRequestError, match="is not supported"):
        client.completions.create(model="tiny", prompt="a", extra_body=fields)


def test_a_key(engine):
    with serve(engine, api_key="geheim-钥匙") as live:
        with pytest.raises(openai.AuthenticationError, match="a wrong API key"):
            openai.OpenAI(base_url=live.url, api_key="wrong", max_retries=0).models.list()
        assert httpx.get(f"{live.url}/models").status_code == 401
        assert httpx.get(f"{live.root}/metrics").status_code == httpx.get(f"{live.root}/nowhere").status_code == 401
        right = {"Authorization": "Bearer geheim-钥匙".encode()}
        assert httpx.get(f"{live.url}/models", headers=right).status_code == 200
        assert httpx.get(f"{live.root}/health").json() == {"status": "ok"}


def test_a_full_queue_is_told_with_429(engine):
    with serve(engine, slots=1, queue=1) as live:
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=0)
        streams = [ask(client, stream=True, max_tokens=None, extra_body=LONG)]
        next(streams[0])  # it has the slot, so the second one waits
        streams.append(ask(client, stream=True, max_tokens=None, extra_body=LONG))
        wait_until(lambda: live.scheduler.stats()["waiting"] == 1)
        with pytest.raises(openai.RateLimitError, match="1 requests wait") as caught:
            ask(client)
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):  # several prompts: all or none, so the row is not kept
            client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=2)
        for stream in streams:
            stream.close()
        wait_until(live.idle)
        assert (
            ask(client).choices[0].message.content == HELLO and live.metrics()["minimind_requests_refused_total"] == 2
        )


def test_a_client_that_goes_away_frees_its_slot(engine):
    with serve(engine, slots=1) as live:
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=0, timeout=60)
        running = ask(client, stream=True, max_tokens=None, extra_body=LONG)
        next(running)
        waiting = ask(client, stream=True, max_tokens=None, extra_body=LONG)
        impatient = client.with_options(timeout=0.2)
        with pytest.raises(openai.APITimeoutError):
            ask(impatient, max_tokens=None, extra_body=LONG)  # not a stream, and still in the queue
        wait_until(lambda: live.scheduler.stats()["cancelled"] == 1)
        waiting.close()
        wait_until(lambda: live.scheduler.stats()["cancelled"] == 2)
        running.close()
        wait_until(live.idle)
        assert live.scheduler.stats()["new_tokens"] < 900  # of 1,000 that fit
        assert live.metrics()["minimind_requests_cancelled_total"] == 3


def test_an_answer_that_takes_too_long(engine):
    with serve(engine, limits=Limits(timeout=0.15)) as live:
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=2)
        with pytest.raises(openai.InternalServerError, match="longer than 0.15 seconds") as caught:
            ask(client, max_tokens=None, extra_body=LONG)
        assert caught.value.status_code == 504 and live.scheduler.stats()["requests"] == 1  # not tried again
        with pytest.raises(openai.APIError, match="longer than"):
            list(ask(client, max_tokens=None, stream=True, extra_body=LONG))
        wait_until(live.idle)


def test_closing_ends_the_requests_that_run(engine):
    with serve(engine) as live:
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=0)
        stream = ask(client, stream=True, max_tokens=None, extra_body=LONG)
        next(stream)
        live.scheduler.close()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            ask(client)
        assert httpx.get(f"{live.root}/health").status_code == 503


def test_a_fault_of_the_server_is_told_and_the_next_request_works(engine, monkeypatch):
    with serve(engine) as live:
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=0)

        def fail(*_, **__):
            raise MemoryError("no room")

        monkeypatch.setattr(live.scheduler.batch, "step", fail)
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            ask(client)
        assert ask(client).choices[0].message.content == HELLO
        monkeypatch.setattr(live.scheduler.batch, "step", fail)
        with pytest.raises(openai.APIError, match="its log says why"):
            list(ask(client, stream=True))


def test_many_clients_at_once_get_the_answers_of_a_run_alone(engine, live):
    questions = ["你好", "1+2", "1+2, 3+4", "什么", "Hello there", "a b c"] * 4
    alone = engine.generate([user(q) for q in questions[:6]], SamplingParams(temperature=0, max_tokens=40, stop=["\n"]))
    got = [None] * len(questions)

    def one(i):
        client = openai.OpenAI(base_url=live.url, api_key="any", max_retries=0)
        got[i] = joined(list(ask(client, questions[i], stream=True, max_tokens=40, stop=["\n"])))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [AnswerReader().feed(a.text, final=True) for a in alone]
    contents = ["".join(text for kind, text in parts if kind == "content") for parts in expected]
    assert got == contents * 4
    metrics = live.metrics()
    assert metrics["minimind_requests_waiting"] == 0 and metrics["minimind_first_token_seconds_count"] >= 24
    assert metrics["minimind_generated_tokens_total"] == live.scheduler.stats()["new_tokens"] > 0
