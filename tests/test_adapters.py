"""Several adapters in one batch: each row as by the model this adapter alone was merged into, base rows untouched."""

import copy

import pytest
import torch
from test_engine import GREEDY, assert_same, plain_greedy, random_prompts, small_model
from test_lora import stirred

import inference.batch
from inference.adapters import Update
from inference.batch import Batch
from inference.continuations import answer_questions
from inference.engine import Engine, SamplingParams
from inference.scheduler import Scheduler
from model.lora import PROJECTIONS, add_lora, merge_lora, use_lora
from model.tokenizer import load_tokenizer

# Ranks differ, layers differ, and one adapter is for what only some models have.
KINDS = {
    "dense": [(4, PROJECTIONS), (3, ("q_proj", "down_proj")), (1, ("up_proj", "lm_head"))],
    "moe": [(4, (*PROJECTIONS, "experts")), (2, ("k_proj", "mlp.gate", "experts")), (3, PROJECTIONS)],
    "moe_top1": [(2, ("experts",)), (3, ("q_proj", "v_proj"))],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def adapted_model(shape="dense", n_layers=2):
    """A model with the adapters a0, a1, ..., none of them active."""
    model = small_model(shape, n_layers=n_layers)
    for i, (rank, targets) in enumerate(KINDS[shape]):
        stirred(add_lora(model, rank, 2 * rank, targets=targets, name=f"a{i}"), seed=i)
    return use_lora(model, None)


def merged(model, name):
    """The model with this adapter in its weights; None: the model without any."""
    return merge_lora(use_lora(copy.deepcopy(model), name))


def names_of(model):
    return [None, *model.lora_configs]


def asked(adapter, max_tokens=8, **fields):
    return SamplingParams(max_tokens=max_tokens, adapter=adapter, **GREEDY | fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # packed on a CPU, and not
@pytest.mark.parametrize("shape", KINDS)
def test_logits_of_mixed_rows_are_those_of_the_merged_models(shape, dtype, tokenizer):
    model = adapted_model(shape).to(dtype)
    engine, rows = Engine(model, tokenizer), [*names_of(model), None, "a0"]
    ids = torch.randint(0, 6400, (len(rows), 9))
    with torch.no_grad(), engine.adapters.rows(rows):
        got = engine.model(ids).logits
    base = model(ids).logits
    for i, name in enumerate(rows):
        expected = merged(model, name)(ids[i : i + 1]).logits[0]
        torch.testing.assert_close(got[i], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert (name is None) == bool((expected - base[i]).abs().max() < 1e-4)


@pytest.mark.parametrize("shape", KINDS)
def test_a_batch_of_all_adapters_answers_as_the_merged_models(shape, tokenizer):
    model = adapted_model(shape)
    prompts = [prompt for prompt in random_prompts(7, 30) for _ in names_of(model)]
    names = names_of(model) * 2
    done = Engine(model, tokenizer).generate(prompts, [asked(name) for name in names])
    for prompt, name, one in zip(prompts, names, done, strict=True):
        assert_same(one.token_ids, *plain_greedy(merged(model, name), prompt, 8))
    assert len({tuple(one.token_ids) for one in done[: len(names_of(model))]}) == len(names_of(model))


def test_rows_without_an_adapter_are_the_base_models_bit_for_bit(tokenizer):
    model = adapted_model()
    engine, ids = Engine(model, tokenizer), torch.randint(0, 6400, (8, 5))
    with torch.no_grad():
        alone = engine.model(ids).logits
        with engine.adapters.rows([None, "a0"] * 4):
            mixed = engine.model(ids).logits
    assert torch.equal(mixed[::2], alone[::2]) and not torch.equal(mixed[1], alone[1])


def test_a_pass_without_adapters_computes_none(tokenizer):
    engine, (prompt,), calls = Engine(adapted_model(), tokenizer), random_prompts(5), []
    updates = [module for module in engine.model.modules() if isinstance(module, Update)]
    for update in updates:
        update.register_forward_hook(lambda *_: calls.append(1))
    engine.generate([prompt], asked(None, 4))
    assert not calls
    engine.generate([prompt, prompt], [asked("a1", 4), asked(None, 4)])
    assert len(calls) == 4 * len(updates)


def test_nothing_of_one_adapter_is_left_for_the_next_request(tokenizer, monkeypatch):
    """The same prompt, by one adapter after the other, in the same row of the same cache; long ones, in parts."""
    monkeypatch.setattr(inference.batch, "CHUNK", 16)
    model = adapted_model()
    engine, (prompt,) = Engine(model, tokenizer), random_prompts(40)
    with Scheduler(engine, slots=3) as scheduler:
        for name in [*names_of(model), *reversed(names_of(model))]:
            (one,) = scheduler.submit(prompt, asked(name)).result()
            assert_same(one.token_ids, *plain_greedy(merged(model, name), prompt, 8))
        # Together: rows move when a neighbour leaves, and samples of one prompt share what was read.
        names = ["a0", None, "a1", "a2", "a0", None]
        handles = [scheduler.submit(prompt, asked(name, 2 + 3 * i, n=1 + i % 2)) for i, name in enumerate(names)]
        for i, (name, handle) in enumerate(zip(names, handles, strict=True)):
            for one in handle.result():
                assert_same(one.token_ids, *plain_greedy(merged(model, name), prompt, 2 + 3 * i))


def test_scores_are_the_adapters(tokenizer):
    """What prompts have in common is read once, by the adapter that is asked for."""
    model = adapted_model()
    engine, common = Engine(model, tokenizer), random_prompts(30)[0]
    prompts, tails = [common + tail for tail in random_prompts(2, 5, 3)], random_prompts(3, 1, 4)
    for name in names_of(model):
        expected = Engine(merged(model, name), tokenizer).score(prompts, tails)
        for one, wanted in zip(engine.score(prompts, tails, name), expected, strict=True):
            assert one.tokens == pytest.approx(wanted.tokens, abs=2e-4)


def test_prompt_logprobs_are_the_adapters(tokenizer):
    model = adapted_model()
    (prompt,) = random_prompts(12)
    (piece,) = Engine(model, tokenizer).stream(prompt, asked("a1", 0, prompt_logprobs=0))
    (score,) = Engine(merged(model, "a1"), tokenizer).score([prompt[:1]], [prompt[1:]])
    assert [x.logprob for x in piece.prompt_logprobs] == pytest.approx(score.tokens, abs=2e-4)


def test_a_model_with_an_active_adapter_answers_by_it(tokenizer):
    """As a model does that is being trained. On a CPU packed matrices take the place of the layers with the adapter."""
    model = use_lora(adapted_model(), "a0")
    expected = answer_questions(merged(model, "a0"), tokenizer, ["你好", "1+1"])
    state = torch.get_rng_state()
    assert answer_questions(model, tokenizer, ["你好", "1+1"]) == expected
    assert torch.equal(torch.get_rng_state(), state)
    engine, ids = Engine(model, tokenizer), torch.arange(20, 40).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(engine.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-3)


def test_an_adapter_of_attention_leaves_packed_blocks_whole(tokenizer):
    model = add_lora(small_model(), 2, targets=("q_proj", "v_proj"))
    blocks = {type(layer.mlp).__name__ for layer in Engine(model, tokenizer).model.model.layers}
    assert blocks == {type(layer.mlp).__name__ for layer in Engine(small_model(), tokenizer).model.model.layers}


def test_an_unknown_adapter_and_one_that_is_not_finite_are_refused(tokenizer):
    model = adapted_model()
    engine, (prompt,) = Engine(model, tokenizer), random_prompts(4)
    for ask in (lambda: engine.generate([prompt], asked("a7")), lambda: engine.score([prompt], [prompt], "a7")):
        with pytest.raises(ValueError, match="no adapter 'a7'; there is a0, a1, a2"):
            ask()
    with pytest.raises(ValueError, match="no adapter 'a0'; there is none"):
        Engine(merged(model, None), tokenizer).generate([prompt], asked("a0"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.adapters["a1"]["weight"].B[0, 0] = float("inf")
    with pytest.raises(ValueError, match="adapter 'a1' has numbers that are not finite in torch.float32"):
        Engine(model, tokenizer)


def test_compiled_steps_choose_adapters_by_row(tokenizer, monkeypatch):
    """Two graphs for each capacity, with adapters and without, whichever adapters the rows have."""
    traced = []
    options = {"backend": lambda graph, inputs: traced.append(graph) or graph.forward, "fullgraph": True}
    # In float64 nothing is packed: the packed products are opaque to the tracer.
    engine = Engine(adapted_model(n_layers=1).double(), tokenizer)
    prompts, names = random_prompts(5, 9, 3, 20), ["a0", None, "a2", "a1"]  # the longest is the last to be read
    expected = engine.generate(prompts, [asked(name) for name in names])
    batch = Batch(engine.model, 3, capacity=64, compiled=options, adapters=engine.adapters)
    monkeypatch.setattr(engine, "batch", lambda slots: batch)
    got = engine.generate(prompts, [asked(name) for name in names])
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    assert len(traced) == 1
    engine.generate(prompts[:1], asked(None))
    assert len(traced) == 2
