"""Fields that change the answer: each is honoured, or refused by its name."""

import json
import math
import random

import httpx2 as httpx
import openai
import pytest
import torch
from serve import ADD, HELLO, learned_model, serve, user, wait_until

from inference.bad_words import BadWords
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.tokenizer import encode_text, render

LONG = {"ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    return Engine(*learned_model())


@pytest.fixture(scope="module")
def live(engine):
    with serve(engine, docs=True) as server:
        yield server
        wait_until(server.idle)


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=live.url, api_key="any", max_retries=0, timeout=60)


def ask(client, content="你好", **fields):
    messages = content if isinstance(content, list) else user(content)
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 200, **fields}
    )


def post(live, path, body):
    return httpx.post(f"{live.root}{path}", json={"model": "tiny"} | body, timeout=60)


# ------------------------------------------------------------------------------------------------ sampling and stops
def test_seed_minus_one_is_no_seed(client):
    hot = {"temperature": 2.0, "max_tokens": 12, "extra_body": LONG}
    said = {ask(client, seed=-1, **hot).choices[0].message.content for _ in range(4)}
    assert len(said) == 4
    assert len({ask(client, seed=-2, **hot).choices[0].message.content for _ in range(4)}) == 1


def test_top_p_zero_is_the_best_token_and_n_predict_is_max_tokens(client, live):
    assert ask(client, temperature=2.0, top_p=0).choices[0].message.content == HELLO
    for path, prompt in (("/v1/chat/completions", {"messages": user("hi")}), ("/v1/completions", {"prompt": "hi"})):
        assert post(live, path, prompt | {"n_predict": 3} | LONG).json()["usage"]["completion_tokens"] == 3


def test_a_stop_string_can_be_part_of_the_answer(client, engine):
    kept = {"include_stop_str_in_output": True}
    assert ask(client, stop="小模型", extra_body=kept).choices[0].message.content == "你好！我是一个小模型"
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(client, stop="小模型", extra_body=kept, stream=True)]
    assert "".join(parts) == "你好！我是一个小模型"
    ids = encode_text(engine.tokenizer, HELLO)
    with_token = ask(client, extra_body={"stop_token_ids": [ids[2]], **kept}).choices[0].message.content
    without = ask(client, extra_body={"stop_token_ids": [ids[2]]}).choices[0].message.content
    assert with_token == without + engine.tokenizer.decode([ids[2]])


def test_nothing_but_allowed_tokens(client, engine):
    allowed = encode_text(engine.tokenizer, "0123456789")
    hot = {"temperature": 2.0, "max_tokens": 30, "n": 4}
    answers = ask(client, extra_body={"allowed_token_ids": allowed}, **hot).choices
    assert all(a.message.content.isdigit() and len(a.message.content) == 30 for a in answers)
    neighbour = ask(client)
    assert neighbour.choices[0].message.content == HELLO


def test_bad_words_do_not_stand_in_the_answer_however_they_are_spelled(client):
    words = ["a", "小", "模型", "e t", "的"]
    hot = {"temperature": 2.0, "max_tokens": 150, "n": 4, "extra_body": {"bad_words": words} | LONG}
    for seed in range(2):
        for choice in ask(client, seed=seed, **hot).choices:
            assert choice.message.content and not [word for word in words if word in choice.message.content]
    assert any("a" in c.message.content for c in ask(client, **hot | {"extra_body": LONG}).choices)
    assert ask(client, extra_body={"bad_words": ["小模型"]}).choices[0].message.content.startswith("你好！我是一个")


def test_bad_words_byte_by_byte():
    """Against a search in the whole text, for every token at every place of random answers."""
    rng = random.Random(0)
    pieces = [bytes(rng.choices(b"ab", k=rng.randint(0, 3))) for _ in range(20)]
    for words in (["a"], ["ab", "bba"], ["aaaa", "bab"]):
        state, text = BadWords(words, pieces), b""
        for _ in range(50):
            banned = {i for i, piece in enumerate(pieces) if any(w.encode() in text + piece for w in words)}
            assert set(state.banned()) == banned
            token = rng.choice([i for i in range(20) if i not in banned])
            state.accept(token)
            text += pieces[token]


# ------------------------------------------------------------------------------------------------------- the prompt
def test_an_assistant_message_at_the_end_is_continued(client, engine):
    begun = [*user("你好"), {"role": "assistant", "content": "你好！我是一个"}]
    by_template = engine.tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    assert render(engine.tokenizer, begun, continue_final_message=True)[0] == by_template
    explicit = {"continue_final_message": True, "add_generation_prompt": False}
    for extra in ({}, explicit):
        answer = ask(client, begun, extra_body=extra)
        assert answer.choices[0].message.content == HELLO.removeprefix("你好！我是一个")
        assert answer.usage.prompt_tokens == len(by_template)
    new_turn = len(engine.encode(begun))
    for extra in ({"add_generation_prompt": True}, {"continue_final_message": False}):
        assert ask(client, begun, extra_body=extra, max_tokens=1).usage.prompt_tokens == new_turn
    thinking = [*user("1+2"), {"role": "assistant", "content": "<think>\nOne"}]
    answer = ask(client, thinking).choices[0].message
    assert answer.reasoning_content.endswith("and two.") and answer.content == "It is 3."


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"continue_final_message": True}, "last message of the assistant"),
        ({"add_generation_prompt": False}, "add_generation_prompt: false"),
        ({"use_beam_search": True}, "use_beam_search is not supported"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds is not supported"),
        ({"chat_template": "{{ messages }}"}, "chat_template is not supported"),
        ({"prompt_logprobs": 1, "stream": True}, "leave stream out"),
        ({"allowed_token_ids": [5], "bad_words": ["a"]}, "cannot be held together"),
        ({"allowed_token_ids": [999999]}, "allowed_token_ids names token 999999"),
        ({"allowed_token_ids": []}, "allowed_token_ids"), ({"bad_words": [""]}, "bad_words"),
        ({"truncate_prompt_tokens": 5000}, "the context has 1024"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(live, fields, words):
    refused = post(live, "/v1/chat/completions", {"messages": user("hi")} | fields)
    assert refused.status_code == 400 and words in refused.json()["error"]["message"]


def test_an_assistants_message_without_content(client, engine):
    messages = [*user("hi"), {"role": "assistant", "content": None}, *user("你好")]
    empty = [*user("hi"), {"role": "assistant", "content": ""}, *user("你好")]
    assert ask(client, messages, max_tokens=1).usage.prompt_tokens == len(engine.encode(empty))


def test_a_prompt_is_cut_at_its_front(client, engine, live):
    ids = engine.encode("从前有座山，山里有座庙")
    cut = {"max_tokens": 5, "temperature": 0, "return_token_ids": True, "truncate_prompt_tokens": 4}
    choice = post(live, "/v1/completions", cut | {"prompt": "从前有座山，山里有座庙"}).json()["choices"][0]
    assert choice["prompt_token_ids"] == ids[-4:]
    assert choice["text"] == engine.generate([ids[-4:]], SamplingParams(temperature=0, max_tokens=5))[0].text
    fitting = {"max_tokens": 24, "truncate_prompt_tokens": -1}
    usage = post(live, "/v1/completions", fitting | {"prompt": "山里有座庙。" * 3000} | LONG).json()["usage"]
    assert usage == {"prompt_tokens": 1000, "completion_tokens": 24, "total_tokens": 1024}
    chat = post(live, "/v1/chat/completions", {"messages": user("好" * 3000), "truncate_prompt_tokens": 50})
    assert chat.json()["usage"]["prompt_tokens"] == 50


def test_token_ids_come_back(live, engine):
    expected = engine.generate([user("你好")], SamplingParams(temperature=0))[0].token_ids
    body = {"messages": user("你好"), "temperature": 0, "return_token_ids": True}
    whole = post(live, "/v1/chat/completions", body).json()
    assert whole["prompt_token_ids"] == engine.encode(user("你好"))
    assert whole["choices"][0]["token_ids"] == expected
    for path, prompt in (("/v1/chat/completions", {"messages": user("你好")}), ("/v1/completions", {"prompt": "你好"})):
        request = body | prompt | {"max_tokens": 12}
        whole = post(live, path, request).json()
        lines = post(live, path, request | {"stream": True}).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        choices = [choice for event in events for choice in event["choices"]]
        assert [i for c in choices for i in c.get("token_ids", [])] == whole["choices"][0]["token_ids"]
        named = [e["prompt_token_ids"] for e in events + choices if "prompt_token_ids" in e]
        assert named == [whole.get("prompt_token_ids") or whole["choices"][0]["prompt_token_ids"]]


# -------------------------------------------------------------------------------------------- log-probabilities read
def reference(engine, ids):
    """Log-probabilities of every next token, from one plain pass of the model."""
    with torch.no_grad():
        return engine.source(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("length", [7, 700])  # read in one part, in two
def test_echo_gives_the_prompts_own_log_probabilities(client, engine, length):
    ids = encode_text(engine.tokenizer, "你好！What can I do? 从前有座山😀" * 60)[:length]
    expected = reference(engine, ids)
    for max_tokens in (0, 1):
        fields = {"model": "tiny", "max_tokens": max_tokens, "temperature": 0, "logprobs": 2, "echo": True}
        got = client.completions.create(prompt=[ids, ids[:5]], **fields)
        for choice, own in zip(got.choices, (ids, ids[:5]), strict=True):
            n, logprobs = len(own), choice.logprobs
            assert len(logprobs.tokens) == len(logprobs.top_logprobs) == n + max_tokens
            assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
            right = [expected[i, own[i + 1]].item() for i in range(n - 1)]
            assert logprobs.token_logprobs[1:n] == pytest.approx(right, abs=1e-4)
            best = [sorted(top.values())[::-1] for top in logprobs.top_logprobs[1:n]]
            assert best == [pytest.approx(expected[i].topk(2).values.tolist(), abs=1e-4) for i in range(n - 1)]
            assert choice.text.startswith(engine.tokenizer.decode(own).rstrip("\ufffd"))
        assert got.usage.completion_tokens == 2 * max_tokens


def test_echo_of_a_text_and_of_a_stream(client):
    fields = {"model": "tiny", "prompt": "从前", "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(**fields).choices[0].text
    assert client.completions.create(**fields, echo=True).choices[0].text == "从前" + plain
    chunks = list(client.completions.create(**fields, echo=True, logprobs=1, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "从前" + plain
    whole = client.completions.create(**fields, echo=True, logprobs=1).choices[0].logprobs
    assert [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.tokens] == whole.tokens
    full = client.completions.create(model="tiny", prompt=[5] * 1024, max_tokens=0, echo=True, logprobs=0)
    assert full.usage.total_tokens == 1024  # a prompt that leaves no room can still be read


def test_partial_characters_and_where_tokens_begin(client, engine):
    text = "a😀好 b"
    ids = [i for character in text for i in encode_text(engine.tokenizer, character)]
    logprobs = client.completions.create(model="tiny", prompt=[ids], max_tokens=0, echo=True, logprobs=0).choices[0]
    tokens, offsets = logprobs.logprobs.tokens, logprobs.logprobs.text_offset
    assert logprobs.text == text and any(token.startswith("bytes:\\xf0") for token in tokens)
    raw = [engine.token_bytes[i] for i in ids]
    assert [t for t in tokens if not t.startswith("bytes:")] == [r.decode() for r in raw if _whole(r)]
    begins = [len(b"".join(raw[:i]).decode("utf-8", "ignore")) for i in range(len(raw))]
    assert offsets == begins


def _whole(raw):
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def test_prompt_logprobs(live, engine):
    ids = engine.encode(user("你好"))
    expected = reference(engine, ids)
    body = {"messages": user("你好"), "prompt_logprobs": 2, "max_tokens": 3, "temperature": 0}
    got = post(live, "/v1/chat/completions", body).json()["prompt_logprobs"]
    assert got[0] is None and len(got) == len(ids)
    for i, places in enumerate(got[1:]):
        own = places[str(ids[i + 1])]
        assert math.isclose(own["logprob"], expected[i, ids[i + 1]], abs_tol=1e-4)
        assert own["rank"] == 1 + (expected[i] > expected[i, ids[i + 1]]).sum()
        assert sorted(entry["rank"] for entry in places.values())[:2] == [1, 2]
    choice = post(live, "/v1/completions", {"prompt": ids, "prompt_logprobs": 0, "max_tokens": 1}).json()["choices"][0]
    assert [list(place) for place in choice["prompt_logprobs"][1:]] == [[str(i)] for i in ids[1:]]
    texts = [engine.tokenizer.decode([i]) for i in ids[1:]]
    assert [place[str(i)]["decoded_token"] for place, i in zip(choice["prompt_logprobs"][1:], ids[1:])] == texts


# ----------------------------------------------------------------------------------------------- tokens and addresses
def test_tokenize_and_detokenize(live, engine):
    text = "你好 <|im_end|> 😀"
    as_read = post(live, "/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert as_read["tokens"] == engine.encode(text) and as_read["max_model_len"] == engine.context
    assert as_read["count"] == len(as_read["tokens"]) == len(as_read["token_strs"])
    marked = post(live, "/tokenize", {"prompt": "<|im_end|>", "add_special_tokens": False}).json()
    assert marked["tokens"] == [engine.tokenizer.eos_token_id]
    assert post(live, "/detokenize", {"tokens": as_read["tokens"]}).json()["prompt"] == "<|im_start|>" + text
    chat = post(live, "/tokenize", {"messages": user("1+2"), "tools": [ADD]}).json()
    assert chat["tokens"] == engine.encode(user("1+2"), [ADD])
    assert (
        post(live, "/tokenize", {"prompt": "好" * 5000}).json()["count"] > engine.context
    )  # it is counted all the same
    info = httpx.get(f"{live.root}/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and info["chat_template"] == engine.tokenizer.chat_template
    wrong = [("/tokenize", body) for body in ({}, {"messages": [{"role": "x"}]}, {"prompt": "\ud800"})]
    for path, body in [*wrong, ("/detokenize", {"tokens": [999999]}), ("/detokenize", {"tokens": [-1]})]:
        content, kind = json.dumps(body), {"Content-Type": "application/json"}
        refused = httpx.post(f"{live.root}{path}", content=content, headers=kind)
        assert refused.status_code == 400, (path, body)


def test_addresses_as_clients_write_them(live, engine):
    body = {"model": "tiny", "messages": user("hi"), "max_tokens": 1}
    for path in ("/v1/chat/completions", "/chat/completions", "/v1//chat/completions", "//v1/chat/completions/"):
        assert httpx.post(live.root + path, json=body).status_code == 200
    assert httpx.get(f"{live.root}/models").json() == httpx.get(f"{live.root}/v1/models/").json()
    assert httpx.post(f"{live.root}/v1/chat/completion", json=body).status_code == 404
    stream = httpx.post(f"{live.url}/chat/completions", json=body | {"stream": True})
    assert stream.headers["x-accel-buffering"] == "no"


def test_the_key_and_the_documents(engine, live):
    assert "/v1/chat/completions" in httpx.get(f"{live.root}/openapi.json").json()["paths"]
    assert "swagger" in httpx.get(f"{live.root}/docs").text
    with serve(engine, api_key="a b") as closed:
        for header in ("bearer a b", "BEARER a b", "Bearer  a b"):
            assert httpx.get(f"{closed.url}/models", headers={"Authorization": header}).status_code == 200
        for header in ("a b", "Basic a b", "Bearer", "Bearer a", "Bearer a bc"):
            assert httpx.get(f"{closed.url}/models", headers={"Authorization": header}).status_code == 401
        for path in ("/openapi.json", "/docs", "/tokenizer_info", "/models"):
            assert httpx.get(closed.root + path).status_code == 401
    with serve(engine) as quiet:
        assert httpx.get(f"{quiet.root}/openapi.json").status_code == 404
    with serve(engine, api_key="secret", docs=True) as told:
        assert httpx.get(f"{told.root}/openapi.json").status_code == 200
