"""What is shown of a model is what it computes: tokens, probabilities, attention, layers, experts, adapters."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stage import chat_weights
from transformers import AutoModelForCausalLM

from common.errors import UserError
from export.transformers_folder import write_transformers_folder
from inference.engine import Engine
from inference.sampling import Sampler, SamplingParams, choose
from inspection.changes import (
    adapter_changes,
    divergence,
    open_adapter,
    preference,
    side_by_side,
)
from inspection.embeddings import embedding_map, neighbours
from inspection.layers import experts, logit_lens, norms
from inspection.next_token import distribution, next_tokens, watch, what_if
from inspection.tokens import merges_of_text, merges_of_token, own_model, pieces, read, shown, visible_tokens
from inspection.trace import Catcher, trace
from model.LMConfig import LMConfig
from model.lora import add_lora, merge_lora, save_lora
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_text, load_tokenizer
from model.vocabulary import train_tokenizer
from model.weights import load_model

TOKENIZER = load_tokenizer()
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 256,
         "initializer_range": 0.3}  # fmt: skip
KINDS = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "granite": {"use_moe": True, "moe_hidden_dim": 24, "n_shared_experts": 1},
    "qwen3_moe": {"use_moe": True, "qk_norm": True, "n_shared_experts": 0, "moe_hidden_dim": 24},
}
TEXT = "春天来了，我们去看一看。Hello, 12+34=46?"
SPELLED_IN_BYTES = "龘我"  # the first is no token, so its bytes are


def build(kind="llama", seed=0, **changes) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    return MiniMindForCausalLM(LMConfig(**(SHAPE | KINDS[kind] | changes))).eval()


def engine(kind="llama", **changes) -> Engine:
    return Engine(build(kind, **changes), TOKENIZER)


def close(a, b, rtol=1e-5) -> None:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape
    assert (a - b).abs().max() <= rtol * b.abs().max()


# ------------------------------------------------------------------------------------------------- against transformers
@pytest.mark.parametrize("kind", KINDS)
def test_attention_layers_and_logits_are_those_of_transformers(kind, tmp_path):
    ours = build(kind)
    write_transformers_folder(tmp_path, ours, TOKENIZER, {}, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = read(Engine(ours, TOKENIZER), TEXT)
    traced = trace(ours, ids)
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    close(traced.logits, out.logits[0])
    close(traced.attention, torch.cat(out.attentions))
    assert traced.attention.shape == (2, 4, len(ids), len(ids))
    close(traced.residuals[:-1], torch.cat(out.hidden_states[:-1]))
    close(ours.model.norm(traced.residuals[-1]).detach(), out.hidden_states[-1][0])  # they give it after the norm
    if traced.router is not None:
        their_router = theirs(torch.tensor([ids]), output_router_logits=True).router_logits
        if their_router is None:  # transformers 5.17 gives none for this architecture
            assert kind == "granite"
        else:
            close(traced.router, torch.stack([layer.detach().softmax(-1) for layer in their_router]), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- the trace
def test_documents_of_a_row_do_not_look_at_each_other():
    model = build()
    a, b = read(Engine(model, TOKENIZER), "春天来了"), read(Engine(model, TOKENIZER), "花儿开")
    packed = trace(model, a + b, [1] * len(a) + [2] * len(b))
    n = len(a)
    assert packed.attention[:, :, n:, :n].abs().max() == 0
    for alone, part in ((trace(model, a), slice(0, n)), (trace(model, b), slice(n, None))):
        close(packed.attention[:, :, part, part], alone.attention)
        close(packed.logits[part], alone.logits)


def test_the_stream_is_the_sum_of_what_the_blocks_add():
    traced = trace(build("granite"), list(range(20, 50)))
    close(traced.residuals[:-1] + traced.attended + traced.fed, traced.residuals[1:])
    sizes = norms(traced)
    assert sizes.residual.shape == (3, 30) and sizes.fed.shape == (2, 30)
    close(sizes.attended, traced.attended.square().sum(-1).sqrt())


def test_a_look_leaves_nothing_behind_also_where_it_fails():
    model = build().train()
    before = trace(model, [5, 6, 7]).logits
    with pytest.raises(IndexError):
        trace(model, [5, 10**6])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(trace(model, [5, 6, 7]).logits, before)


def test_two_at_once_see_what_is_their_own():
    model = build()
    with Catcher(model) as mine:
        other = threading.Thread(target=model, args=(torch.tensor([[1, 2, 3]]),))
        other.start()
        other.join()
        assert mine.attention == [] and mine.residuals == []
        model(torch.tensor([[1, 2]]))
    assert len(mine.attention) == 2 and mine.residuals[0].shape == (1, 2, 32)


# ------------------------------------------------------------------------------------------------ what comes next
def test_the_best_tokens_and_what_the_text_was_worth():
    e = engine()
    ids = read(e, TEXT)
    found = next_tokens(trace(e.source, ids), n=7)
    with torch.no_grad():
        log_p = e.source(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found.best.shape == found.probability.shape == found.drawn.shape == (len(ids), 7)
    assert np.array_equal(found.best[:, 0], log_p.argmax(-1).numpy())
    close(found.probability, log_p.exp().topk(7).values)
    close(found.drawn, found.probability)  # temperature 1 and no filter: what the model has
    close(found.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-4)
    scored = e.score([ids[:1]], [ids[1:]])[0].tokens
    close(found.came[:-1].astype(float), np.array(scored), rtol=1e-4)
    assert np.isnan(found.came[-1]) and found.came_rank[-1] == -1
    best = [t for t in range(len(ids) - 1) if found.best[t, 0] == ids[t + 1]]
    assert [t for t in range(len(ids) - 1) if found.came_rank[t] == 0] == best


@pytest.mark.parametrize("params", [{"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}, {"min_p": 0.1}])
def test_the_bars_are_what_the_sampler_draws_from(params):
    """A sampler that is asked ten thousand times draws each token about as often as the bar says."""
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 2
    chances = distribution(logits, SamplingParams(**params))[0]
    n = 10_000
    sampler = Sampler(SamplingParams(seed=3, **params), [], 0, 12)
    drawn = torch.tensor(choose(logits.expand(n, -1), [sampler] * n)).bincount(minlength=12) / n
    assert (drawn - chances).abs().max() < 0.02
    assert torch.equal(drawn > 0, chances > 0) and chances.sum().item() == pytest.approx(1)
    assert distribution(logits, SamplingParams(temperature=0))[0].tolist() == F.one_hot(logits.argmax(), 12).tolist()


def test_what_if_another_token_stood_there():
    e = engine()
    ids = read(e, TEXT)
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    other = int(next_tokens(trace(e.source, ids)).best[3, 1])
    assert what_if(e, ids, 4, other, params).token_ids == e.generate([[*ids[:4], other]], params)[0].token_ids
    with pytest.raises(UserError, match="place 0 has no rivals; places run from 1 to"):
        what_if(e, ids, 0, other, params)
    with pytest.raises(UserError, match="token id 6400 does not exist"):
        what_if(e, ids, 1, 6400, params)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_rows_of_new_tokens_are_those_of_the_whole_text(kind):
    e = engine(kind)
    ids = read(e, TEXT)
    told = list(watch(e, TEXT, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)))
    answer = [token.piece.token_ids[0] for token in told]
    assert answer == e.generate([ids], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))[0].token_ids
    whole = trace(e.source, ids + answer).attention
    for i, token in enumerate(told):
        before = len(ids) + i
        close(token.attention, whole[:, :, before - 1, :before], rtol=1e-4)
    assert not any(module._forward_hooks for module in e.model.modules())


def test_a_reader_that_leaves_takes_the_hooks_along():
    e = engine()
    looking = watch(e, TEXT, SamplingParams(max_tokens=6))
    next(looking)
    looking.close()
    assert not any(module._forward_hooks for module in e.model.modules())


# ------------------------------------------------------------------------------------------------------------- layers
def test_the_last_layers_lens_is_the_models_answer():
    model = build()
    traced = trace(model, list(range(30, 50)))
    lens, said = logit_lens(model, traced, n=4), next_tokens(traced, n=4)
    assert lens.best.shape == (3, 20, 4)
    assert np.array_equal(lens.best[-1], said.best)
    close(lens.probability[-1], said.probability)
    close(lens.came[:, :-1][-1], said.came[:-1])
    # The embedding alone: its own product with the head.
    alone = model.lm_head(model.model.norm(model.model.embed_tokens(torch.tensor(traced.ids)))).detach()
    assert np.array_equal(lens.best[0][:, 0], alone.argmax(-1).numpy())


def test_which_experts_each_token_went_to():
    model = build("granite", n_routed_experts=4, num_experts_per_tok=2)
    ids = list(range(40, 70))
    traced = trace(model, ids)
    found = experts(model, traced)
    assert found.chosen.shape == found.weight.shape == (2, 30, 2) and found.load.shape == (2, 4)
    scores = traced.router[1, 7]
    best = scores.topk(2)
    assert found.chosen[1, 7].tolist() == best.indices.tolist()
    close(found.weight[1, 7], best.values / best.values.sum())
    assert found.load.sum(-1) == pytest.approx(1)
    assert found.load[0, 3] == pytest.approx((found.chosen[0] == 3).sum() / 60)
    with pytest.raises(UserError, match="no experts: it is dense"):
        experts(build(), trace(build(), ids))


# ------------------------------------------------------------------------------------------------------------- tokens
def test_pieces_show_their_bytes_and_the_characters_they_share():
    text = f"我们{SPELLED_IN_BYTES} ok"
    ids = encode_text(TOKENIZER, text)
    found = pieces(TOKENIZER, [1, *ids])
    assert found[0].special and found[0].text == "<|im_start|>"
    assert b"".join(piece.bytes for piece in found[1:]).decode() == text
    parts = [piece for piece in found if not piece.whole]
    assert len(parts) >= 2 and all("\\x" in piece.text for piece in parts)
    together = {}
    for piece in found[1:]:
        together[piece.group] = together.get(piece.group, b"") + piece.bytes
    assert "".join(raw.decode() for raw in together.values()) == text  # each group is whole characters
    assert shown(b"\xe6\x88") == "\\xe6\\x88"


def test_merges_lead_from_bytes_to_the_token():
    made = 0
    for token in (300, 1500, 6399, *encode_text(TOKENIZER, "春天来了，Hello world")):
        steps = merges_of_token(TOKENIZER, token)
        (piece,) = pieces(TOKENIZER, [token])
        assert len(steps) == len(piece.bytes) - 1
        assert not steps or steps[-1].after == (piece.bytes,)
        assert all(step.left + step.right in step.after for step in steps)
        made += bool(steps)
    assert made
    assert merges_of_token(TOKENIZER, 1) == []
    with pytest.raises(UserError, match="token id 6400 does not exist; ids run from 0 to 6399"):
        merges_of_token(TOKENIZER, 6400)


@pytest.mark.parametrize("text", [TEXT, SPELLED_IN_BYTES, "internationalisation  \n\n x"])
def test_merges_of_a_text_end_in_its_tokens(text):
    raw, cut = [], TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    for (piece, _), steps in zip(cut, merges_of_text(TOKENIZER, text), strict=True):
        assert [step.rank for step in steps] == sorted(step.rank for step in steps)
        alone = TOKENIZER.convert_tokens_to_ids(piece)  # a piece of one byte needs no merge
        raw += steps[-1].after if steps else [pieces(TOKENIZER, [alone])[0].bytes]
    assert raw == [piece.bytes for piece in pieces(TOKENIZER, encode_text(TOKENIZER, text))]


# --------------------------------------------------------------------------------------------------------- embeddings
def test_neighbours_are_those_of_the_largest_cosine():
    model = build()
    table = model.model.embed_tokens.weight.detach()
    with torch.no_grad():
        table[77] = table[500] * 3 + 0.01  # almost the same direction
    found = neighbours(model, 500, n=5)
    assert found[0].token == 77 and found[0].cosine > 0.99
    assert [x.cosine for x in found] == sorted((x.cosine for x in found), reverse=True)
    assert found[1].cosine == pytest.approx(F.cosine_similarity(table[500], table[found[1].token], dim=0).item())


def test_the_map_keeps_distances_where_two_axes_hold_them():
    model, tokens = build(), visible_tokens(TOKENIZER, 50)
    assert len(tokens) == 50 and all(piece.whole and not piece.special for piece in pieces(TOKENIZER, tokens))
    flat = torch.randn(50, 2)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens] = flat @ torch.linalg.qr(torch.randn(32, 2))[0].T + 5
    found = embedding_map(model, tokens)
    assert found.explained == pytest.approx(1, abs=1e-4)
    close(torch.cdist(torch.tensor(found.points), torch.tensor(found.points)), torch.cdist(flat, flat), rtol=1e-3)
    assert np.array_equal(embedding_map(model, tokens).points, found.points)


# ------------------------------------------------------------------------------------------------- what training did
def test_the_size_of_an_adapters_change_is_what_merging_it_changes(tmp_path):
    base = load_model(chat_weights(tmp_path))[0]
    adapted = add_lora(load_model(tmp_path / "full_sft_32.pth")[0], rank=4, alpha=8, targets=("q_proj", "down_proj"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    save_lora(tmp_path / "x_32.pth", adapted, {"came_from": str(tmp_path / "full_sft_32.pth")})
    found = adapter_changes(open_adapter(tmp_path / "x_32.pth"))
    assert [(c.layer, c.projection) for c in found] == [
        (layer, name) for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    merged = dict(merge_lora(adapted).named_parameters())
    for change in found:
        name = f"model.layers.{change.layer}.{change.projection}.weight"
        before = base.get_parameter(name)
        assert change.relative == pytest.approx(((merged[name] - before).norm() / before.norm()).item(), rel=1e-4)
    with pytest.raises(UserError, match="no adapter is active"):
        adapter_changes(base)
    (tmp_path / "full_sft_32.pth").unlink()
    with pytest.raises(UserError, match="which are not there"):
        open_adapter(tmp_path / "x_32.pth")


def test_each_expert_of_an_adapter_counts():
    model = add_lora(build("qwen3_moe"), targets=("experts",))
    assert [(c.layer, c.projection, c.added) for c in adapter_changes(model)] == [
        (layer, f"mlp.experts.{stack}", 0.0) for layer in (0, 1) for stack in ("gate_up_proj", "down_proj")
    ]


def test_a_pair_token_by_token_under_two_models():
    policy, reference = engine(), engine(seed=1)
    asked = [{"role": "user", "content": "一加一？"}]
    chosen, rejected = ([*asked, {"role": "assistant", "content": text}] for text in ("等于二。", "我不知道"))
    found = preference(policy, reference, chosen, rejected)
    for messages, answer in ((chosen, found.chosen), (rejected, found.rejected)):
        text = messages[-1]["content"]
        assert TOKENIZER.decode(answer.ids) == f"{text}<|im_end|>"
        prompt = read(policy, asked)
        assert answer.policy.tolist() == pytest.approx(policy.score([prompt], [answer.ids])[0].tokens)
        assert answer.reference.sum() == pytest.approx(reference.score([prompt], [answer.ids])[0].total)
    assert found.margin == pytest.approx(found.chosen.gained - found.rejected.gained)
    with pytest.raises(UserError, match="must be the assistant's"):
        preference(policy, reference, asked, rejected)


def test_two_checkpoints_side_by_side():
    one, two = engine(), engine(seed=1)
    found = side_by_side(one, two, lambda e: trace(own_model(e), read(e, TEXT)))
    assert found.note == "" and found.first.ids == found.second.ids
    kl = divergence(found.first, found.second)
    assert kl.shape == (len(found.first.ids),) and (kl > 0).all()
    assert np.abs(divergence(found.first, found.first)).max() < 1e-6
    small = train_tokenizer([TEXT] * 3, 300)
    other = Engine(build(vocab_size=300), small)
    found = side_by_side(one, other, lambda e: trace(own_model(e), read(e, TEXT)))
    assert found.note.startswith("the tokenizers differ (6400 and 300 entries)")
    with pytest.raises(UserError, match="did not read the same tokens"):
        divergence(found.first, found.second)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("text, words", [
    ("", "there is no text to look at"), ("  \n", "there is no text to look at"), ([], "there is no text to look at"),
    ("好" * 2000, r"the text has \d+ tokens, and 256 at most"), ([5, 6400], "token id 6400 does not exist"),
    ([{"role": "nobody", "content": "x"}], "role"), ("\ud800", "Unicode"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_refused_in_one_line(text, words):
    with pytest.raises(UserError, match=words) as refused:
        read(engine(), text)
    assert "\n" not in str(refused.value)


def test_a_chat_is_read_to_its_end():
    e, asked = engine(), [{"role": "user", "content": "你好"}]
    assert TOKENIZER.decode(read(e, asked)).endswith("<|im_start|>assistant\n")
    assert TOKENIZER.decode(read(e, [*asked, {"role": "assistant", "content": "好"}])).endswith("好<|im_end|>\n")


def test_another_projects_model_cannot_be_looked_into(tmp_path):
    write_transformers_folder(tmp_path, build(), TOKENIZER, {}, "x")
    foreign = Engine(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), TOKENIZER)
    with pytest.raises(UserError, match="LlamaForCausalLM is not a model of this project"):
        own_model(foreign)
