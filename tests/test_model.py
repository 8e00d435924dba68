"""The decoder against transformers' Llama and Qwen3 with the same random weights, and against itself: with and without
a cache, padding, packing, checkpointing. Two layers of each preset's width: more would repeat them."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.attention import (
    DocumentLengths,
    RMSNorm,
    document_ends,
    inverse_frequencies,
    packed_mask,
    packed_positions,
)
from model.compat import CACHE, checkpoint_activations
from model.LMConfig import PRESETS, LMConfig
from model.model import MiniMindForCausalLM

DENSE = [name for name, shape in PRESETS.items() if not shape.get("use_moe")]
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 200}
MOE = {"use_moe": True, "moe_hidden_dim": 48}


def shaken(model, seed=0):
    """Random weights that leave nothing hidden: attention far from uniform, norms away from 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    return model.eval()


def small(**fields):
    return shaken(MiniMindForCausalLM(LMConfig(**(SMALL | fields))))


def reference(config):
    """transformers' class for this shape, with attention spelled out rather than through the kernel that ours uses."""
    fields = {
        "hidden_size": config.dim, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size, "rms_norm_eps": config.norm_eps, "max_position_embeddings": config.max_seq_len,
        "rope_parameters": dict(config.rope_parameters), "tie_word_embeddings": config.tie_word_embeddings,
        "attn_implementation": "eager", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**fields)) if config.qk_norm else LlamaForCausalLM(LlamaConfig(**fields))
    return model.eval()


def ids(*shape, vocab_size=200, seed=1):
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def difference(a, b):
    """Largest difference relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ------------------------------------------------------------------------------------------- parity, dense shapes
@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_logits_of_every_dense_preset_equal_transformers(name):
    model = shaken(MiniMindForCausalLM(LMConfig.from_preset(name, n_layers=2)))
    other = reference(model.config)
    other.load_state_dict(model.state_dict())  # strict: no key missing, none left over
    x = ids(2, 24, vocab_size=6400)
    wanted = other(x).logits
    assert difference(model(x).logits, wanted) < 1e-5

    for side, real in (("right", slice(0, 17)), ("left", slice(7, 24))):
        mask = torch.zeros_like(x)
        mask[0], mask[1, real] = 1, 1
        ours, theirs = model(x, attention_mask=mask).logits, other(x, attention_mask=mask).logits
        assert difference(ours[mask.bool()], theirs[mask.bool()]) < 1e-5, side

    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in x.split([9, 8, 1, 1, 5], dim=1)]
    assert difference(torch.cat(pieces, dim=1), wanted) < 1e-5

    twin = MiniMindForCausalLM(model.config).eval()
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x).logits, model(x).logits)


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": False}, {"head_dim": 24}, {"n_kv_heads": 4},
                                    {"n_kv_heads": 1, "qk_norm": True}])  # fmt: skip
@torch.no_grad()
def test_logits_equal_transformers_off_the_presets(fields):
    model = small(**fields)
    other = reference(model.config)
    other.load_state_dict(model.state_dict())
    assert difference(model(ids(2, 9)).logits, other(ids(2, 9)).logits) < 1e-5


def test_loss_and_gradients_equal_transformers():
    model = small()
    other = reference(model.config)
    other.load_state_dict(model.state_dict())
    x, labels = ids(2, 16), ids(2, 16)
    labels[0, :5], labels[1, 9:] = -100, -100
    ours, theirs = model(x, labels=labels), other(x, labels=labels)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    ours.loss.backward(), theirs.loss.backward()
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert difference(parameter.grad, wanted[name].grad) < 1e-4, name
    learned = F.cross_entropy(ours.logits[:, :-1].reshape(-1, 200), labels[:, 1:].reshape(-1), reduction="sum")
    assert model(x, labels=labels, num_items_in_batch=7).loss.item() == pytest.approx(learned.item() / 7, rel=1e-5)


@torch.no_grad()
def test_logits_to_keep():
    model, x = small(), ids(2, 9)
    full = model(x).logits
    assert difference(model(x, logits_to_keep=1).logits, full[:, -1:]) < 1e-6
    assert difference(model(x, logits_to_keep=torch.tensor([2, 5])).logits, full[:, [2, 5]]) < 1e-6
    assert model(x).loss is None and getattr(model(x, use_cache=False), CACHE) is None


# ------------------------------------------------------------------------------------------- rows longer than trained
@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2,
     "attention_factor": 1.0},
])  # fmt: skip
@torch.no_grad()
def test_longer_context_equals_transformers(rope):
    model = small(rope_parameters=rope, max_seq_len=128, dim=256, rope_theta=1e4)
    other = reference(model.config)
    other.load_state_dict(model.state_dict())
    frequency, factor = inverse_frequencies(model.config)
    assert torch.allclose(frequency, other.model.rotary_emb.inv_freq, rtol=1e-6)
    assert factor == pytest.approx(other.model.rotary_emb.attention_scaling)
    x = ids(1, 150)
    assert difference(model(x).logits, other(x).logits) < 1e-5
    plain = small(max_seq_len=128, dim=256, rope_theta=1e4)
    assert difference(model(x).logits, plain(x).logits) > 1e-2  # the parameters do change something


def test_linear_interpolation_is_a_position_divided():
    plain, linear = (LMConfig(rope_parameters=rope) for rope in (None, {"rope_type": "linear", "factor": 4.0}))
    assert torch.allclose(inverse_frequencies(plain)[0] * 3, inverse_frequencies(linear)[0] * 12)


# --------------------------------------------------------------------------------------------------------- generate()
@torch.no_grad()
def test_generate_equals_transformers():
    model = small()
    other = reference(model.config)
    other.load_state_dict(model.state_dict())
    x = ids(2, 7)
    limit = {"max_new_tokens": 12, "eos_token_id": None}
    wanted = other.generate(x, do_sample=False, **limit)
    assert wanted.shape == (2, 19)
    for use_cache in (True, False):
        assert torch.equal(model.generate(x, do_sample=False, use_cache=use_cache, **limit), wanted)
    beams = {"num_beams": 3, "do_sample": False, **limit}
    assert torch.equal(model.generate(x, **beams), other.generate(x, **beams))
    drawn = []
    for one in (model, other):
        torch.manual_seed(5)
        drawn.append(one.generate(x, do_sample=True, temperature=0.8, top_k=30, top_p=0.9, **limit))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, MOE, MOE | {"num_experts_per_tok": 1}])
@torch.no_grad()
def test_a_left_padded_batch_generates_what_each_row_does_alone(fields):
    model = small(**fields)
    prompts = [ids(1, n, seed=n) for n in (3, 8, 5)]
    limit = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(prompt, **limit)[0, prompt.shape[1] :] for prompt in prompts]
    batch = torch.cat([F.pad(prompt, (8 - prompt.shape[1], 0)) for prompt in prompts])
    together = model.generate(batch, attention_mask=(batch != 0).long(), **limit)[:, 8:]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_generate_stops_at_the_end_token():
    model = small()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(200, 64))  # all logits equal: the first token, 0, is chosen
    assert model.generate(ids(1, 4), max_new_tokens=9, do_sample=False, eos_token_id=0).tolist()[0][4:] == [0]


# ----------------------------------------------------------------------------------------------------- files, buffers
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "tie_word_embeddings": False}, MOE])
@torch.no_grad()
def test_save_pretrained_gives_the_same_model_back(fields, tmp_path):
    """transformers 5 builds a model without memory and fills in what the file has: a buffer that is not saved, such
    as a table of rotary angles, would hold whatever was there."""
    model = small(**fields)
    assert list(model.buffers()) == []
    model.save_pretrained(tmp_path)
    twin = MiniMindForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(twin(ids(2, 9)).logits, model(ids(2, 9)).logits)
    tied = twin.lm_head.weight.data_ptr() == twin.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


def test_fresh_weights_are_drawn_as_documented():
    model = MiniMindForCausalLM(LMConfig(dim=192, n_layers=6, n_heads=6, use_moe=True, vocab_size=500))
    for name, parameter in model.named_parameters():
        narrow = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
        if parameter.dim() == 1:
            assert torch.all(parameter == 1), name
        else:
            wanted = 0.02 / math.sqrt(2 * 6) if narrow else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.1), name


# --------------------------------------------------------------------------------------------------------- training
def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, MOE])
def test_gradient_checkpointing_gives_equal_gradients(fields):
    model = small(**fields).train()
    inputs = {"input_ids": ids(2, 16), "labels": ids(2, 16)}
    loss, wanted = gradients(model, **inputs)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    checkpointed, found = gradients(model, **inputs)
    assert len(calls) == 2 and checkpointed == loss  # computed forward and again in the backward pass
    for name, gradient in wanted.items():
        assert difference(found[name], gradient) < 1e-6, name


def test_dropout_acts_in_training_only():
    model, x = small(dropout=0.5), ids(1, 9)
    still = model(x).logits
    assert torch.equal(model(x).logits, still)
    model.train()
    assert difference(model(x).logits, still) > 0.01


LENGTHS = [[5, 1, 7], [9, 2]]  # documents of two rows of 16: the rest is padding


def packed_batch():
    x, segments, labels = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long), None
    documents = []
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths, start=1):
            document = ids(1, length, seed=10 * row + number)
            x[row, at : at + length], segments[row, at : at + length] = document, number
            documents.append((row, at, document))
            at += length
    labels = torch.where(segments > 0, x, -100)
    labels[packed_positions(segments) == 0] = -100  # a document's first token is nobody's to predict
    return x, segments, labels, documents


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, MOE, MOE | {"num_experts_per_tok": 1}])
def test_packed_rows_equal_unpacked_documents(fields):
    model = small(**fields)
    x, segments, labels, documents = packed_batch()
    learned = (labels != -100).sum()
    packed = model(x, segment_ids=segments).logits
    for row, at, document in documents:
        alone = model(document).logits[0]
        assert difference(packed[row, at : at + document.shape[1]], alone) < 1e-5

    loss, found = gradients(model, input_ids=x, segment_ids=segments, labels=labels, num_items_in_batch=learned)
    model.zero_grad()
    total = 0.0
    for _, _, document in documents:
        alone = model(document).logits[0, :-1]
        part = F.cross_entropy(alone, document[0, 1:], reduction="sum") / learned
        part.backward()
        total += part.item()
    assert loss == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert difference(found[name], parameter.grad) < 1e-5, name


def test_positions_and_lengths_of_packed_rows():
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
    assert packed_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    ends = document_ends(segments)
    assert ends.tolist() == [0, 3, 5, 6, 8, 9, 16] and ends.dtype == torch.int32
    assert document_ends(segments, size=9).tolist() == [0, 3, 5, 6, 8, 9, 16, 16, 16]  # two empty documents
    assert DocumentLengths.of(segments, ends, torch.bfloat16, 64) is None  # no GPU here: the mask serves
    # Both describe the same attention: flattened, a query looks at keys of its own stretch, up to itself.
    stretch = torch.bucketize(torch.arange(16), ends[1:], right=True)
    wanted = torch.block_diag(*packed_mask(segments)[:, 0].float()).bool()
    assert torch.equal((stretch[:, None] == stretch[None, :]).tril(), wanted)


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_used_as_it_is():
    model, (x, segments, _, _) = small(), packed_batch()
    ready = model(x, attention_mask=packed_mask(segments), position_ids=packed_positions(segments)).logits
    assert torch.equal(ready, model(x, segment_ids=segments).logits)


@pytest.mark.parametrize("fields", [{}, MOE])
def test_bfloat16_autocast_stays_near(fields):
    model = small(**fields)
    x, segments, labels, _ = packed_batch()
    inputs = {"input_ids": x, "segment_ids": segments, "labels": labels}
    exact, wanted = gradients(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough, found = gradients(model, **inputs)
    assert rough != exact and rough == pytest.approx(exact, rel=0.05)
    gradient = found["model.layers.0.self_attn.q_proj.weight"]
    assert gradient.dtype == torch.float32
    assert difference(gradient, wanted["model.layers.0.self_attn.q_proj.weight"]) < 0.3


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=2.0)
    norm.weight.data = torch.tensor([1.0, 3.0])
    assert norm(torch.tensor([3.0, 5.0])).tolist() == pytest.approx([3 / 19**0.5, 15 / 19**0.5])  # (9 + 25) / 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize("fields, backend", [({}, "inductor"), (MOE, "aot_eager")])
def test_compiled_equals_eager(fields, backend):
    model = small(n_layers=1, **fields).train()
    x, segments, labels, _ = packed_batch()
    inputs = {"input_ids": x, "segment_ids": segments, "labels": labels}
    loss, wanted = gradients(model, **inputs)
    model.compile(backend=backend)
    compiled_loss, found = gradients(model, **inputs)
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in wanted.items():
        assert difference(found[name], gradient) < 1e-4, name


# ------------------------------------------------------------------------------------------------ names of keywords
@torch.no_grad()
def test_the_cache_has_both_of_its_names_and_the_same_answer():
    model, x = small(), ids(2, 12)
    wanted = model(x).logits
    for name in ("cache", "past_key_values"):
        keep = {name: DynamicCache(config=model.config)}
        pieces = [model(piece, use_cache=True, **keep).logits for piece in x.split([7, 1, 4], dim=1)]
        assert difference(torch.cat(pieces, dim=1), wanted) < 1e-5, name


@torch.no_grad()
def test_a_keyword_that_would_change_the_answer_is_refused():
    model, x = small(), ids(1, 5)
    for part in (model, model.model):
        with pytest.raises(TypeError, match="unexpected keyword argument 'past_keys'"):
            part(x, past_keys=DynamicCache(config=model.config))
        with pytest.raises(TypeError, match="output_attentions=True"):
            part(x, output_attentions=True)
        part(x, return_dict=True, output_attentions=False, cache_position=torch.arange(5))
