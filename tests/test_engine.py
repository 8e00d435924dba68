"""The engine against the plain model: cached equals uncached, a batch equals each alone, a stream equals the whole."""

import math

import pytest
import torch

from inference.batch import Batch, StaticCache
from inference.cpu_kernels import MIN_ROWS, has_packed, prepacked
from inference.engine import Engine, SamplingParams
from inference.stream_text import TextStream
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_document, load_tokenizer

SHAPES = {
    "dense": {},
    "qk_norm": {"qk_norm": True, "n_kv_heads": 4},
    "moe": {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_hidden_dim": 64},
    "moe_top1": {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_shared_experts": 0,
                 "moe_hidden_dim": 64, "qk_norm": True},
}  # fmt: skip
GREEDY = {"temperature": 0, "ignore_eos": True}


def small_model(shape="dense", seed=0, **overrides):
    """Random weights, wide enough apart that the best logit is clear."""
    torch.manual_seed(seed)
    fields = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128, "max_seq_len": 256}
    config = LMConfig(**(fields | SHAPES[shape] | {"initializer_range": 0.2} | overrides))
    return MiniMindForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(small_model(), tokenizer)


def random_prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, 6400, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def plain_greedy(model, prompt, n):
    """No cache, no batch: the whole text through the model at every step. Also the gap between the two best logits."""
    ids, gaps = list(prompt), []
    for _ in range(n):
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        gaps.append((best.values[0] - best.values[1]).item())
        ids.append(best.indices[0].item())
    return ids[len(prompt) :], gaps


def assert_same(tokens, expected, gaps):
    """Equal, or the first difference stands where the two best logits lie within 1e-4 of each other."""
    differing = [i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b]
    assert not differing or gaps[differing[0]] < 1e-4, f"differs at {differing[0]}, gap {gaps[differing[0]]}"


# --------------------------------------------------------------------------------------------------- the packed copy
@pytest.mark.parametrize("shape", SHAPES)
def test_prepacked_copy_computes_the_same(shape):
    model = small_model(shape)
    twin = prepacked(model)
    ids = torch.randint(0, 6400, (3, 20))
    with torch.no_grad():
        expected, got = model(ids).logits, twin(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head, torch.nn.Linear)  # the original is as it was


@pytest.mark.skipif(not has_packed(), reason="this torch has no packed matrix product")
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_do_not_influence_each_other(shape):
    twin = prepacked(small_model(shape))
    ids = torch.randint(0, 6400, (16, 1))
    with torch.no_grad():
        together = twin(ids, use_cache=False).logits
        for n in (1, 2, 3, MIN_ROWS, 7):
            assert torch.equal(twin(ids[:n], use_cache=False).logits, together[:n])


# ------------------------------------------------------------------------------------------------------- the cache
def test_cache_keeps_rows_apart_and_grows():
    cache, generator = StaticCache(rows=3, capacity=2), torch.Generator().manual_seed(0)

    def put(rows, positions):
        k = torch.rand(len(positions), 1, len(positions[0]), 2, generator=generator)
        mask = cache.look(rows, torch.tensor(positions), 1 + max(map(max, positions)))
        return k, mask, *cache.update(k, -k, 0)

    k, mask, keys, values = put(slice(0, 2), [[0, 1, 2], [-1, 0, 1]])
    assert cache.capacity >= 3
    assert torch.equal(keys[0], k[0]) and torch.equal(keys[1, :, :2], k[1, :, 1:]) and not keys[1, :, 2:].any()
    assert torch.equal(values, -keys)
    assert (mask[1, 0] == 0).tolist() == [[True, False, False], [True, False, False], [True, True, False]]
    cache.copy_row(0, 2, 3)
    cache.reserve(100)
    k2, mask, keys, _ = put(slice(2, 3), [[3]])
    assert torch.equal(keys[0, :, :3], k[0]) and torch.equal(keys[0, :, 3:], k2[0]) and not mask.any()


# ------------------------------------------------------------------------------------------------------ generation
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_of_unequal_prompts_equals_the_uncached_model(shape, tokenizer):
    model = small_model(shape)
    prompts = random_prompts(1, 3, 17, 5, 40)
    results = Engine(model, tokenizer, max_batch=3).generate(prompts, SamplingParams(max_tokens=20, **GREEDY))
    for prompt, result in zip(prompts, results, strict=True):
        expected, gaps = plain_greedy(model, prompt, 20)
        assert_same(result.token_ids, expected, gaps)
        assert (result.finish_reason, result.prompt_tokens, result.completion_tokens) == ("length", len(prompt), 20)


def test_equals_transformers_generate(engine):
    (prompt,) = random_prompts(9)
    ids = engine.source.generate(torch.tensor([prompt]), max_new_tokens=30, min_new_tokens=30, do_sample=False)
    expected, gaps = plain_greedy(engine.source, prompt, 30)
    assert_same(ids[0, 9:].tolist(), expected, gaps)
    params = SamplingParams(max_tokens=30, logit_bias=dict.fromkeys(engine.end_tokens, -1000000000.0), **GREEDY)
    assert engine.generate([prompt], params)[0].token_ids == ids[0, 9:].tolist()


def test_a_batch_equals_each_alone_whatever_the_neighbours(engine):
    prompts = random_prompts(4, 30, 11, 2, 19, 8)
    params = [
        SamplingParams(max_tokens=5 + 4 * i, temperature=0.8 * (i % 3), top_p=0.9, top_k=40, seed=i, ignore_eos=True,
                       repetition_penalty=1 + 0.1 * (i % 2), frequency_penalty=0.1 * (i % 2), logprobs=i % 2)
        for i in range(6)
    ]  # fmt: skip
    together = engine.generate(prompts, params)
    for prompt, p, result in zip(prompts, params, together, strict=True):
        (alone,) = engine.generate([prompt], p)
        assert (alone.text, alone.token_ids) == (result.text, result.token_ids)
        assert [x.logprob for x in alone.logprobs] == pytest.approx([x.logprob for x in result.logprobs], abs=1e-4)


def test_a_stream_equals_the_whole(engine):
    (prompt,) = random_prompts(6)
    params = SamplingParams(max_tokens=60, temperature=1.5, seed=3, ignore_eos=True, logprobs=2)
    pieces = list(engine.stream(prompt, params))
    (whole,) = engine.generate([prompt], params)
    assert "".join(p.text for p in pieces) == whole.text == engine.tokenizer.decode(whole.token_ids, True)
    assert [t for p in pieces for t in p.token_ids] == whole.token_ids
    assert [lp for p in pieces for lp in p.logprobs] == whole.logprobs
    assert [p.finish_reason for p in pieces[:-1]] == [None] * 59 and pieces[-1].finish_reason == "length"


def test_n_samples_come_from_one_prefill_and_differ(engine):
    prompts = random_prompts(12, 7)
    params = SamplingParams(max_tokens=8, seed=5, n=4, ignore_eos=True, temperature=2)
    results = engine.generate(prompts, params)
    assert [r.index for r in results] == [0, 1, 2, 3] * 2
    assert len({tuple(r.token_ids) for r in results}) == 8
    assert engine.generate(prompts[:1], SamplingParams(max_tokens=8, seed=5, ignore_eos=True, temperature=2))[
        0
    ].token_ids == results[0].token_ids  # fmt: skip
    greedy = engine.generate(prompts, SamplingParams(max_tokens=8, n=3, **GREEDY))
    for row in range(2):
        expected, gaps = plain_greedy(engine.source, prompts[row], 8)
        for result in greedy[3 * row : 3 * row + 3]:
            assert_same(result.token_ids, expected, gaps)
    assert engine.speed.prompt_tokens == 19


def test_long_prompts_are_read_in_chunks(tokenizer, monkeypatch):
    import inference.batch

    engine = Engine(small_model(), tokenizer)
    prompts = random_prompts(50, 10, 33)
    expected = engine.generate(prompts, SamplingParams(max_tokens=10, **GREEDY))
    monkeypatch.setattr(inference.batch, "CHUNK", 16)
    got = engine.generate(prompts, SamplingParams(max_tokens=10, **GREEDY))
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]


def test_end_tokens_and_the_limit_of_the_context(engine):
    (prompt,) = random_prompts(5)
    free = engine.generate([prompt], SamplingParams(max_tokens=9, **GREEDY))[0].token_ids
    end = free[4]
    stopped = engine.generate([prompt], SamplingParams(stop_token_ids=[end], max_tokens=9, **GREEDY))[0]
    first = free.index(end)
    assert stopped.token_ids == free[: first + 1] and stopped.finish_reason == "stop"
    assert stopped.text == engine.tokenizer.decode(free[:first], True)

    (full,) = engine.generate(random_prompts(250), SamplingParams(**GREEDY))
    assert (full.completion_tokens, full.finish_reason) == (6, "length")
    with pytest.raises(ValueError, match="256 tokens.*context of 256"):
        engine.generate(random_prompts(256))
    for wrong in ([], [6400], [-1], [1.5], [None]):
        with pytest.raises(ValueError):
            engine.generate([wrong])


def test_logprobs_are_the_models_own(engine):
    (prompt,) = random_prompts(7)
    params = SamplingParams(max_tokens=6, logprobs=3, temperature=0.5, seed=1, repetition_penalty=1.3, ignore_eos=True)
    (result,) = engine.generate([prompt], params)
    with torch.no_grad():
        log_p = engine.source(torch.tensor([prompt + result.token_ids])).logits[0].log_softmax(-1)
    for i, (token, got) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        place = log_p[len(prompt) - 1 + i]
        assert got.token == token and got.logprob == pytest.approx(place[token].item(), abs=1e-4)
        best = place.topk(3)
        assert [t for t, _ in got.top] == best.indices.tolist()
        assert [x for _, x in got.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    (score,) = engine.score([prompt], [result.token_ids])
    assert score.tokens == pytest.approx([x.logprob for x in result.logprobs], abs=1e-4)


def test_prompts_of_every_kind(engine):
    params = SamplingParams(max_tokens=4, **GREEDY)
    messages = [{"role": "user", "content": "你好"}]
    results = engine.generate(["从前", messages, engine.encode("从前"), engine.encode(messages)], params)
    assert results[0].token_ids == results[2].token_ids and results[1].token_ids == results[3].token_ids
    decode = engine.tokenizer.decode
    assert decode(engine.encode("从前")) == "<|im_start|>从前"
    assert decode(engine.encode(messages)) == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"


# --------------------------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize("shape", ["dense", "moe"])
def test_scores_equal_a_plain_forward_pass(shape, tokenizer):
    model = small_model(shape)
    engine = Engine(model, tokenizer, max_batch=3)
    common, tails = random_prompts(30)[0], random_prompts(1, 4, 9, 2, 6, seed=2)
    prompts = [common + tail for tail in tails] + random_prompts(3, 20, seed=3)
    pairs = [(p, c) for p in prompts for c in ([50], [60], [70, 80, 90])]
    scores = engine.score([p for p, _ in pairs], [c for _, c in pairs])
    for (prompt, continuation), score in zip(pairs, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(continuation).unsqueeze(-1)).flatten()
        assert score.tokens == pytest.approx(expected.tolist(), abs=2e-4)
        assert score.total == pytest.approx(sum(score.tokens))
        assert score.is_greedy == (logits.argmax(-1).tolist() == continuation)
    greedy = engine.generate([common], SamplingParams(max_tokens=3, **GREEDY))[0].token_ids
    assert engine.score([common], [greedy])[0].is_greedy
    with pytest.raises(ValueError, match="250 \\+ 7 tokens"):
        engine.score(random_prompts(250), random_prompts(7))


def test_bits_per_byte_of_documents(engine, tokenizer):
    """By hand: the loss of each piece of a document, the end token among its targets, over the bytes of the text."""
    texts = ["很久以前，山里住着一只小狐狸。" * 3, "short", "水"]
    nats = 0.0
    for text in texts:
        ids = encode_document(tokenizer, text)
        for start in range(0, len(ids) - 1, 10):
            piece = torch.tensor([ids[start : start + 11]])
            with torch.no_grad():
                logits = engine.source(piece[:, :-1], use_cache=False).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
    n_bytes = sum(len(text.encode()) for text in texts)
    assert engine.bits_per_byte(iter(texts), 10) == (pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5), n_bytes)
    with pytest.raises(ValueError, match="no text"):
        engine.bits_per_byte([])
    with pytest.raises(ValueError, match="at least 1 token"):
        engine.bits_per_byte(texts, 0)


@pytest.mark.parametrize("shape", ["dense", "qk_norm"])
def test_steps_of_one_shape_give_the_same_tokens(shape, tokenizer, monkeypatch):
    """What --compile does on CUDA, traced here without a compiler; requests join, leave and outgrow the capacity."""
    traced = []
    options = {"backend": lambda graph, inputs: traced.append(graph) or graph.forward, "fullgraph": True}
    model = small_model(shape)
    plain, static = Engine(model, tokenizer), Engine(model, tokenizer)
    static.model = plain.model = model  # the packed copy's products are opaque to the tracer
    monkeypatch.setattr(static, "batch", lambda slots: Batch(model, 3, capacity=32, compiled=options))
    prompts = random_prompts(5, 20, 9, 40, 3, 12)
    params = [SamplingParams(max_tokens=n, **GREEDY) for n in (4, 9, 30, 12, 2, 7)]
    expected, got = plain.generate(prompts, params), static.generate(prompts, params)
    for a, b, prompt in zip(expected, got, prompts, strict=True):
        assert_same(b.token_ids, *plain_greedy(model, prompt, len(a.token_ids)))
    assert len(traced) == 2  # capacities 32 and 64, however many sequences run


def test_compiled_steps_are_for_cuda(engine):
    with pytest.raises(ValueError, match="CUDA only"):
        engine.batch(4, compile=True)


# ------------------------------------------------------------------------------------------------------------ text
@pytest.mark.parametrize(
    "text", ["简体中文，标点。", "a👩‍👩‍👧‍👦b 🇨🇳", "\ufffd自己的替换符\ufffd", "mixed 汉字 and ASCII"]
)
def test_stream_never_splits_a_character(text, tokenizer):
    ids = [t for byte in text.encode() for t in tokenizer.convert_tokens_to_ids([chr_of_byte(byte)])]  # byte by byte
    stream = TextStream(tokenizer)
    pieces = [stream.feed(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def chr_of_byte(byte: int) -> str:
    """GPT-2's printable stand-in for a byte, as byte-level vocabularies write it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))


def test_stream_of_any_tokens_is_the_whole_text(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(0, 300, (20,), generator=generator).tolist()  # mostly single bytes: invalid UTF-8 galore
        stream = TextStream(tokenizer)
        text = "".join([stream.feed(t) for t in ids] + [stream.finish()])
        assert text == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (["world"], "Hello, "),
        (["o, w", "rld"], "Hell"),
        (["lo", "ell"], "H"),
        (["xyz"], "Hello, world!"),
        (["!!"], "Hello, world!"),
    ],
)
def test_stop_strings_across_token_borders(stop, kept, tokenizer):
    for text_tokens in (tokenizer.encode("Hello, world!"), tokenizer.convert_tokens_to_ids(list("Hello,Ġworld!"))):
        stream, said = TextStream(tokenizer, stop), ""
        for token in text_tokens:
            said += stream.feed(token)
            assert kept.startswith(said)
            if stream.stopped:
                break
        assert said + stream.finish() == kept and stream.stopped == (kept != "Hello, world!")


def test_stop_string_ends_a_generation(engine):
    (prompt,) = random_prompts(8)
    free = engine.generate([prompt], SamplingParams(max_tokens=40, **GREEDY))[0]
    stop = free.text[10:13]
    stopped = engine.generate([prompt], SamplingParams(max_tokens=40, stop=stop, **GREEDY))[0]
    assert stopped.finish_reason == "stop" and stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
