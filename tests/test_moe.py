"""Mixture of experts: against a loop over tokens, against numbers worked by hand, one way of computing against the
other."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.expert_loop import ExpertLoop, experts_in_turn, experts_kind, experts_together, grouped_linear
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.moe import Experts, MoEFeedForward, balance_loss, route

SHAPES = {  # top-1 with and without normalisation, top-k, many small experts, several shared or none
    "top2": {},
    "top1": {"num_experts_per_tok": 1, "n_shared_experts": 0},
    "top1_plain": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "top3_plain": {"num_experts_per_tok": 3, "norm_topk_prob": False, "n_shared_experts": 2},
    "fine": {"n_routed_experts": 32, "num_experts_per_tok": 8, "moe_hidden_dim": 8, "n_shared_experts": 1},
    "all": {"n_routed_experts": 3, "num_experts_per_tok": 3},
}


def block(**fields):
    """An expert block of width 16 whose routing is far from uniform."""
    torch.manual_seed(0)
    shape = {"dim": 16, "n_heads": 2, "hidden_dim": 24, "use_moe": True, "aux_loss_alpha": 0.0} | fields
    module = MoEFeedForward(LMConfig(**shape))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.train()


def naive(module, x):
    """One token at a time, one expert at a time, straight from the definition."""
    config, rows = module.config, []
    for token in x.reshape(-1, x.shape[-1]):
        score = (module.gate.weight @ token).softmax(0)
        chosen = score.argsort(descending=True)[: config.num_experts_per_tok]
        total = score[chosen].sum() if config.norm_topk_prob else 1.0
        if config.norm_topk_prob and config.num_experts_per_tok == 1:
            total = total.detach()  # value 1, with a gradient: see `route`
        out = torch.zeros_like(token)
        for e in chosen:
            gate, up = (module.experts.gate_up_proj[e] @ token).chunk(2)
            out = out + score[e] / total * (module.experts.down_proj[e] @ (F.silu(gate) * up))
        for i in range(config.n_shared_experts):
            part = slice(i * config.moe_hidden_dim, (i + 1) * config.moe_hidden_dim)
            inner = F.silu(module.shared_experts.gate_proj.weight[part] @ token)
            inner = inner * (module.shared_experts.up_proj.weight[part] @ token)
            out = out + module.shared_experts.down_proj.weight[:, part] @ inner
        rows.append(out)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_a_loop_over_tokens(shape):
    module = block(**SHAPES[shape])
    x = torch.randn(2, 9, 16)
    direction = torch.randn_like(x)
    found, wanted = [], []
    for forward, results in ((lambda x: module(x)[0], found), (lambda x: naive(module, x), wanted)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        out.backward(direction)
        results += [out.detach(), leaf.grad, *(parameter.grad for parameter in module.parameters())]
    names = ["output", "input", *(name for name, _ in module.named_parameters())]
    for name, a, b in zip(names, found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item()), name
    assert found[names.index("gate.weight")].abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_in_double_precision(frozen):
    """torch's own check of a hand-written backward pass, by finite differences; frozen experts pass the others on."""
    torch.manual_seed(0)
    counts, token = [3, 0, 2], torch.tensor([0, 1, 3, 0, 2])
    x, weight, gate_up, down = (
        torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((4, 6), (5,), (3, 8, 6), (3, 6, 4))
    )
    if frozen:
        gate_up, down = gate_up.detach(), down.detach()
    assert torch.autograd.gradcheck(lambda *args: ExpertLoop.apply(args[0], token, args[1], counts, *args[2:]),
                                    (x, weight, gate_up, down))  # fmt: skip


def test_top_1_keeps_the_value_1_and_a_live_router():
    """d(score / score.detach()) = d(log score): softmax's gradient, worked by hand for two experts."""
    logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)  # scores 1/4, 3/4
    weight, chosen = route(logits.softmax(-1), 1, normalise=True)
    assert weight.tolist() == [[1.0]] and chosen.tolist() == [[1]]
    weight.sum().backward()
    assert logits.grad.tolist()[0] == pytest.approx([-0.25, 0.25])


def test_weights_of_a_token_by_hand():
    scores = torch.tensor([[0.1, 0.6, 0.3]])
    pairs = [dict(zip(chosen.tolist()[0], weight.tolist()[0])) for weight, chosen in
             (route(scores, 2, True), route(scores, 2, False))]  # fmt: skip
    assert pairs[0] == {1: pytest.approx(2 / 3), 2: pytest.approx(1 / 3)}
    assert pairs[1] == {1: pytest.approx(0.6), 2: pytest.approx(0.3)}


# ----------------------------------------------------------------------------------- two fast ways and the plain loop
@pytest.mark.parametrize("way", [experts_in_turn, experts_together])
@pytest.mark.parametrize("counts", [[4, 0, 7, 5], [0, 0, 16, 0], [16, 0, 0, 0], [4, 4, 4, 4], [0, 0, 0, 0]])
def test_the_fast_ways_equal_the_plain_loop(counts, way):
    """In values and all gradients. grouped_mm runs on the CPU too, though nobody uses it there. Groups may be empty."""
    torch.manual_seed(0)
    M, experts = sum(counts), Experts(4, 16, 12)
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    x, weight = torch.randn(8, 16, requires_grad=True), torch.rand(M, requires_grad=True)
    token, counts, direction = torch.randint(8, (M,)), torch.tensor(counts), torch.randn(8, 16)
    learned = (x, weight, experts.gate_up_proj, experts.down_proj)
    results = []
    for out in (way(x, token, weight, counts, *learned[2:]), experts.plain_loop(x, token, weight, counts)):
        results.append([out.detach(), *torch.autograd.grad(out, learned, direction)])
    for fast, plain in zip(*results):
        assert torch.allclose(fast, plain, rtol=1e-4, atol=1e-4)
    assert not any(gradient[counts == 0].any() for gradient in results[0][3:])  # zeros where there is no token


def test_grouped_linear_is_a_matrix_product_a_group():
    torch.manual_seed(0)
    x, weight, counts = torch.randn(10, 8), torch.randn(3, 4, 8), torch.tensor([6, 0, 4])
    wanted = torch.cat([F.linear(x[:6], weight[0]), F.linear(x[6:], weight[2])])
    assert torch.allclose(grouped_linear(x, weight, counts), wanted, atol=1e-5)


def test_a_cpu_takes_the_loop():
    for dtype in (torch.float32, torch.bfloat16):
        assert experts_kind(torch.device("cpu"), dtype, (4, 32, 16)) == "loop"


def test_half_precision_by_autocast_reaches_the_experts():
    module = block(moe_hidden_dim=32)
    x = torch.randn(1, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(x)[0]
    exact = module(x)[0]
    assert torch.allclose(rough.float(), exact, atol=0.05 * exact.abs().max().item()) and not torch.equal(rough, exact)


# --------------------------------------------------------------------------------------------------------- balance loss
def test_uniform_routing_gives_one():
    scores = torch.full((8, 4), 0.25)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    assert balance_loss(scores, chosen, torch.zeros(8, dtype=torch.long)).item() == pytest.approx(1.0)


def test_all_tokens_to_one_expert_of_four_give_four_times_its_score():
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 5)
    assert balance_loss(scores, torch.zeros(5, 1, dtype=torch.long), torch.zeros(5, dtype=torch.long)).item() == (
        pytest.approx(4 * 0.7)
    )


# Two documents of 3 and 1 tokens and one place of padding, E = 2, K = 1.
SCORES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8], [0.5, 0.5]])
CHOSEN = torch.tensor([[0], [0], [1], [1], [0]])
# First document:  f = 2 (2/3, 1/3), P = (1.8, 1.2) / 3 = (0.6, 0.4): 4/3 0.6 + 2/3 0.4 = 16/15
# Second document: f = 2 (0, 1),     P = (0.2, 0.8):                   1.6
# Mean over the 4 tokens: (3 16/15 + 1.6) / 4 = 1.2. All as one: f = 2 (1/2, 1/2): sum P = 1.


def test_a_skewed_example_by_hand():
    by_document = balance_loss(SCORES, CHOSEN, torch.tensor([0, 0, 0, 1, -1]))
    assert by_document.item() == pytest.approx(1.2)
    as_one = balance_loss(SCORES, CHOSEN, torch.tensor([0, 0, 0, 0, -1]))
    assert as_one.item() == pytest.approx(1.0)


def test_what_stands_in_padding_does_not_matter():
    changed = SCORES.clone()
    changed[4] = torch.tensor([1.0, 0.0])
    documents = torch.tensor([0, 0, 0, 1, -1])
    assert balance_loss(changed, CHOSEN, documents) == balance_loss(SCORES, CHOSEN, documents)
    scores = SCORES.clone().requires_grad_()
    balance_loss(scores, CHOSEN, documents).backward()
    # d/dP: length x f / 4 tokens, so f / 4 for each token of the document; nothing for padding
    wanted = torch.tensor([[4 / 3, 2 / 3]] * 3 + [[0.0, 2.0], [0.0, 0.0]]) / 4
    assert torch.allclose(scores.grad, wanted)
    nothing = balance_loss(SCORES, CHOSEN, torch.full((5,), -1))
    assert nothing.item() == 0.0


SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 48, "vocab_size": 100, "use_moe": True}


def model(**fields):
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(**(SMALL | {"initializer_range": 0.3} | fields)))


def ids(*shape, seed=1):
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(seed))


def test_the_models_balance_loss_is_alpha_per_layer_where_routing_is_uniform():
    even = model(aux_loss_alpha=0.1)
    for layer in even.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # equal scores: P = 1/E, and sum f = E whatever the choice
    out = even.train()(ids(2, 8), labels=ids(2, 8))
    assert out.aux_loss.item() == pytest.approx(0.1 * 2, rel=1e-5)
    assert out.loss.item() - out.aux_loss.item() == pytest.approx(even.eval()(ids(2, 8), labels=ids(2, 8)).loss.item())


def test_no_balance_loss_outside_training_or_with_weight_zero():
    assert model().eval()(ids(1, 5)).aux_loss is None
    assert model(aux_loss_alpha=0.0).train()(ids(1, 5)).aux_loss is None
    assert model(use_moe=False).train()(ids(1, 5)).aux_loss is None


def packed(lengths, width, seed):
    """A row of documents, padded to width, with its segment numbers, and the documents."""
    documents = [ids(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths, start=1)], dim=1)
    gap = (0, width - sum(lengths))
    return F.pad(torch.cat(documents, dim=1), gap), F.pad(segments, gap), documents


@pytest.mark.parametrize("layers", [1, 2])
def test_per_document_loss_of_packed_rows_is_the_mean_over_tokens(layers):
    """Equal to each document alone weighted by its length, equal however the rows are cut into micro-batches, and equal
    for a padded batch in which each document has its own row."""
    net = model(n_layers=layers, aux_loss_alpha=1.0, seq_aux=True).train()
    rows = [packed([5, 3, 6], 16, 10), packed([11], 16, 20), packed([2, 2], 16, 30), packed([16], 16, 40)]
    x, segments = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    documents = [document for row in rows for document in row[2]]
    whole = net(x, segment_ids=segments).aux_loss

    tokens = torch.tensor([document.shape[1] for document in documents])
    alone = torch.stack([net(document).aux_loss for document in documents])
    assert whole.item() == pytest.approx(((alone * tokens).sum() / tokens.sum()).item(), rel=1e-5)

    for cut in ([1, 1, 1, 1], [2, 2], [1, 3]):
        real = [(part > 0).sum() for part in segments.split(cut)]
        parts = [net(a, segment_ids=b).aux_loss for a, b in zip(x.split(cut), segments.split(cut))]
        mean = sum(loss * n for loss, n in zip(parts, real)) / sum(real)
        assert mean.item() == pytest.approx(whole.item(), rel=1e-5)

    padded = torch.cat([F.pad(document, (0, 16 - document.shape[1])) for document in documents])
    assert net(padded, attention_mask=(padded != 0).long()).aux_loss.item() == pytest.approx(whole.item(), rel=1e-5)


def test_without_masks_each_row_is_a_document():
    net = model(aux_loss_alpha=1.0).train()
    x = ids(3, 12)
    alone = [net(row).aux_loss.item() for row in x.split(1)]
    assert net(x).aux_loss.item() == pytest.approx(sum(alone) / 3, rel=1e-5)


def test_gradients_of_the_balance_loss_do_not_depend_on_the_cut():
    net = model(aux_loss_alpha=1.0).train()
    rows = [packed([5, 3, 6], 16, 10), packed([11], 16, 20)]
    x, segments = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    net(x, segment_ids=segments).aux_loss.backward()
    wanted = net.model.layers[0].mlp.gate.weight.grad.clone()
    net.zero_grad()
    for a, b in zip(x.split(1), segments.split(1)):
        (net(a, segment_ids=b).aux_loss * (b > 0).sum() / (segments > 0).sum()).backward()
    assert torch.allclose(net.model.layers[0].mlp.gate.weight.grad, wanted, rtol=1e-4, atol=1e-7)


def test_batch_form_sees_one_document():
    net = model(n_layers=1, aux_loss_alpha=1.0, seq_aux=False).train()
    x, segments, _ = packed([5, 3, 6], 16, 10)
    with torch.no_grad():
        hidden = {}
        hook = net.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, out: hidden.update(logits=out))
        found = net(x, segment_ids=segments).aux_loss.item()
        hook.remove()
    scores = hidden["logits"].softmax(-1)[:14]  # the real tokens
    shares = F.one_hot(scores.topk(2).indices, 4).sum((0, 1)) / (14 * 2)
    assert found == pytest.approx((4 * shares * scores.mean(0)).sum().item(), rel=1e-5)
    net.config.seq_aux = True
    assert net(x, segment_ids=segments).aux_loss.item() != pytest.approx(found, rel=1e-4)
