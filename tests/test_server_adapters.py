"""An adapter is a model of the server: listed, chosen by `model`, in one batch with the others, else refused."""

import threading
from argparse import Namespace

import httpx2 as httpx
import openai
import pytest
import torch
from serve import HELLO, learned_model, serve, user, wait_until
from stage import load
from test_lora import stirred

from common.errors import UserError
from inference.engine import Engine
from inference.open_model import open_engine
from inference.sampling import SamplingParams
from model.lora import add_lora, load_lora, merge_lora, save_lora
from model.peft_folder import load_peft, save_peft
from model.weights import load_model, save_weights

NAMES = ("poet", "clerk")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The learned model's file, two adapters' files and a peft folder for it."""
    folder = tmp_path_factory.mktemp("lora")
    model, tokenizer = learned_model()
    save_weights(folder / "chat.pth", model, tokenizer, {"stage": "full_sft", "seq_len": 64})
    for i, name in enumerate(NAMES):
        stirred(add_lora(model, 2 + i, 12, name=name), seed=i)
        save_lora(folder / f"{name}.pth", model, {"came_from": str(folder / "chat.pth")})
    stirred(add_lora(model, 2, 12, targets=("q_proj", "o_proj"), name="peft"), seed=5)
    save_peft(folder / "theirs", model)
    return folder


def opened(files, *adapters, rope_scaling=None):
    args = Namespace(preset=None, tokenizer=None, rope_scaling=rope_scaling, device="cpu", dtype="float32")
    return open_engine(args, files / "chat.pth", adapters=adapters)[0]


@pytest.fixture(scope="module")
def live(files):
    with serve(opened(files, *(files / f"{name}.pth" for name in NAMES), files / "theirs")) as server:
        yield server
        wait_until(server.idle)


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=live.url, api_key="any", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def expected(files):
    """What the merged models say to 你好; under "tiny" the base model."""
    params, said = SamplingParams(temperature=0, max_tokens=30), {}
    for name in ("tiny", *NAMES, "theirs"):
        model, tokenizer, _ = load_model(files / "chat.pth")
        if name == "theirs":
            merge_lora(load_peft(model, files / name))
        elif name != "tiny":
            merge_lora(load_lora(model, files / f"{name}.pth"))
        said[name] = Engine(model, tokenizer).generate([user("你好")], params)[0].text
    assert said["tiny"] == HELLO and len(set(said.values())) == 4
    return said


def ask(client, model, **fields):
    messages = user("你好")
    fields = {"temperature": 0, "max_tokens": 30, **fields}
    return client.chat.completions.create(model=model, messages=messages, **fields)


def test_adapters_are_listed_as_models(client, live):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["tiny", "minimind", "poet", "clerk", "theirs"]
    parents = {name: (card.model_extra or {}).get("parent") for name, card in cards.items()}
    assert parents == {"tiny": None, "minimind": None, "poet": "tiny", "clerk": "tiny", "theirs": "tiny"}
    assert client.models.retrieve("clerk").id == "clerk"


def test_a_request_is_answered_by_the_model_it_names(client, expected):
    for name in ("poet", "tiny", "clerk", "minimind", "poet", "theirs", "tiny"):
        answer = ask(client, name)
        assert answer.choices[0].message.content == expected["tiny" if name == "minimind" else name]
        assert answer.model == name
    parts = list(ask(client, "clerk", stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == expected["clerk"]
    assert {p.model for p in parts} == {"clerk"}
    answer = client.responses.create(model="poet", input="你好", temperature=0, max_output_tokens=30)
    assert answer.output_text == expected["poet"]
    prompt = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    ids = httpx.post(f"{str(client.base_url)[:-3]}tokenize", json={"prompt": prompt, "add_special_tokens": False})
    texts = client.completions.create(model="clerk", prompt=ids.json()["tokens"], temperature=0, max_tokens=30)
    assert texts.choices[0].text == expected["clerk"]
    with pytest.raises(openai.NotFoundError, match="no model 'cook' here; .*poet, clerk, theirs"):
        ask(client, "cook")


def test_requests_of_different_models_share_a_batch(client, live, expected):
    names, said, before = ["poet", "tiny", "clerk", "tiny"] * 2, {}, live.scheduler.stats()

    def run(i):
        said[i] = ask(client, names[i]).choices[0].message.content

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [said[i] for i in range(len(names))] == [expected[name] for name in names]
    after = live.scheduler.stats()
    assert after["steps"] - before["steps"] < 0.7 * (after["new_tokens"] - before["new_tokens"])


def test_an_adapter_that_does_not_fit_is_refused_at_the_start(files, tmp_path, monkeypatch):
    model, _, _ = load_model(files / "chat.pth")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    save_lora(tmp_path / "other.pth", add_lora(model, 2), {"came_from": "out/dpo_512.pth"})
    with pytest.raises(ValueError, match="other.pth was trained on other weights of this shape .*: out/dpo_512.pth"):
        opened(files, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no adapter at nowhere.pth"):
        opened(files, "nowhere.pth")
    with pytest.raises(ValueError, match="chat.pth is not an adapter"):
        opened(files, files / "chat.pth")
    with pytest.raises(ValueError, match="name 'poet' is taken"):
        opened(files, files / "poet.pth", files / "poet.pth")
    with pytest.raises(ValueError, match="the model and an adapter are both called poet"):
        load("scripts/serve_openai_api.py").create_app(Namespace(engine=opened(files, files / "poet.pth")), ["poet"])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the program's handlers would outlive the test
    with pytest.raises(UserError, match="other.pth was trained on other weights"):
        flags = ["--weight", files / "chat.pth", "--lora", tmp_path / "other.pth", "--port", 0, "--device", "cpu"]
        load("scripts/serve_openai_api.py").main(list(map(str, flags)))
    longer = opened(files, files / "poet.pth", rope_scaling=("yarn", 2.0))  # the stretched model is the same base
    assert longer.adapters.names == ["poet"] and longer.context == 1024
