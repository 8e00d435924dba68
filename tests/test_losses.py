"""Losses and schedules by hand-worked numbers and against torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.losses import learned_bytes, lm_loss
from trainer.optimizers import Muon, learning_rate_factor, make_optimizers, orthogonalise


def test_lm_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [9.0, 9.0]]])  # p(1) = 3/4, then p(0) = 4/5
    total, count = lm_loss(logits, torch.tensor([[0, 1, 1]]))
    assert count == 2
    assert total.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5), rel=1e-6)
    total, count = lm_loss(logits, torch.tensor([[0, -100, 1]]))
    assert count == 1 and total.item() == pytest.approx(-math.log(1 / 5), rel=1e-6)
    total, count = lm_loss(logits, torch.tensor([[0, -100, -100]]))
    assert count == 0 and total.item() == 0


def test_learned_bytes():
    table = torch.tensor([0, 3, 5])
    assert learned_bytes(torch.tensor([[1, 2, -100, 1], [2, 0, 0, 2]]), table) == (5 + 3) + 5


def test_schedules_at_their_corners():
    cosine = [learning_rate_factor(s, 100, 10, "cosine") for s in range(100)]
    assert cosine[0] == 0.1 and cosine[9] == 1.0 and cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.55) and 0.1 < cosine[99] < 0.11
    assert all(a >= b for a, b in zip(cosine[10:], cosine[11:]))
    wsd = [learning_rate_factor(s, 100, 10, "wsd") for s in range(100)]
    assert wsd[9] == wsd[50] == wsd[80] == 1.0 and wsd[90] == 0.5 and wsd[99] == pytest.approx(1 / 20)
    assert learning_rate_factor(0, 1, 0, "cosine") == 1.0


def test_orthogonalise_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((32, 64), (64, 32), (48, 48), (3, 16, 40)):
        matrix = torch.randn(shape)
        values = torch.linalg.svdvals(orthogonalise(matrix))
        assert values.min() > 0.3 and values.max() < 1.3
        # the same left and right directions as the nearest orthogonal matrix
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        cosine = F.cosine_similarity(orthogonalise(matrix).flatten(-2), (u @ vh).flatten(-2), dim=-1)
        assert (cosine > 0.97).all()


def test_muon_equals_torchs_muon():
    """torch's runs its iteration in bfloat16, hence the tolerance; its match_rms_adamw is our scale."""
    torch.manual_seed(0)
    weight = torch.randn(24, 40)
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.01, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    step = (theirs - weight).abs().max()
    assert (ours - theirs).abs().max() < 0.03 * step


def test_a_stack_of_matrices_moves_as_each_alone():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 16))
    alone = [torch.nn.Parameter(m.clone()) for m in stack.data]
    stack.grad = torch.randn(3, 8, 16)
    for p, g in zip(alone, stack.grad):
        p.grad = g.clone()
    Muon([stack], lr=0.1).step()
    Muon(alone, lr=0.1).step()
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in alone]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_each_parameter_belongs_to_one_optimizer(kind, use_moe):
    from model.LMConfig import LMConfig
    from model.model import MiniMindForCausalLM

    model = MiniMindForCausalLM(LMConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=300, use_moe=use_moe))
    optimizers = make_optimizers(model, kind, 1e-3, 0.1)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert (group["weight_decay"] > 0) == all(p.ndim >= 2 for p in group["params"])
            if isinstance(optimizer, Muon):
                assert all(p is not model.lm_head.weight for p in group["params"])
