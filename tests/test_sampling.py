"""Sampling: each function against transformers' own or numbers worked by hand; draws against the distribution."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.sampling import (
    Sampler,
    SamplingParams,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_counts,
    penalise_repetition,
)

LOGITS = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 3


def column(*values):
    return torch.tensor(values).unsqueeze(-1)


def rows_by_transformers(make, values, logits=LOGITS, ids=None):
    """transformers takes one value for the whole batch; so each row goes through on its own."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long) if ids is None else ids
    rows = [
        logits[i : i + 1].clone() if make(v) is None else make(v)(ids[i : i + 1], logits[i : i + 1].clone())
        for i, v in enumerate(values)
    ]
    return torch.cat(rows)


def test_top_k():
    expected = rows_by_transformers(lambda k: TopKLogitsWarper(k) if k else None, (1, 3, 50, 0, 5000))
    assert torch.equal(keep_top_k(LOGITS, [1, 3, 50, 0, 5000]), expected)


@pytest.mark.parametrize("scale", [1.0, 0.05])  # peaked: few tokens are kept; flat: nearly all, the slow way
def test_top_p(scale):
    logits, values = LOGITS * scale, (0.1, 0.5, 0.9, 0.999, 1.0)
    expected = rows_by_transformers(lambda p: TopPLogitsWarper(p) if p < 1 else None, values, logits)
    got = keep_top_p(logits, column(*values))
    assert (got.isfinite() != expected.isfinite()).sum() <= 2  # sums of opposite order round apart at the edge
    assert got[0].isfinite().any() and torch.equal(got[4], logits[4])


def test_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in ((0.4, 1), (0.6, 2), (0.79, 2), (0.9, 3), (1e-9, 1)):
        assert keep_top_p(logits, column(p)).isfinite().sum() == kept


def test_min_p():
    values = (0.01, 0.1, 0.5, 0.9, 0.0)
    expected = rows_by_transformers(lambda p: MinPLogitsWarper(p) if p else None, values)
    assert torch.equal(keep_min_p(LOGITS, column(*values)), expected)


def test_repetition_penalty_moves_both_signs_down():
    ids = torch.randint(0, 1000, (5, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 1000, dtype=torch.bool).scatter_(1, ids, True)
    values = (1.0, 1.1, 1.5, 2.0, 0.8)
    expected = rows_by_transformers(lambda p: RepetitionPenaltyLogitsProcessor(p), values, ids=ids)
    assert torch.allclose(penalise_repetition(LOGITS, seen, column(*values)), expected)
    by_hand = penalise_repetition(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]]), column(2.0))
    assert by_hand.tolist() == [[1.0, -4.0, 2.0]]


def test_presence_and_frequency_penalties_by_hand():
    counts = torch.tensor([[0.0, 1.0, 3.0]])
    got = penalise_counts(torch.zeros(1, 3), counts, presence=column(0.5), frequency=column(0.25))
    assert got.tolist() == [[0.0, -0.75, -1.25]]


def test_draw_inverts_the_distribution_function():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(6, -1)
    uniform = torch.tensor([[0.0], [0.19], [0.21], [0.69], [0.71], [1 - 1e-16]], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]  # token 1 has probability 0 and is never drawn


def test_frequencies_of_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.25, 0.2, 0.05])
    sampler = Sampler(SamplingParams(seed=1), [0], 0, 4)
    n = 4000
    counts = torch.zeros(4)
    for _ in range(n):
        counts[choose(p.log().unsqueeze(0), [sampler])[0]] += 1
    chi_square = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert chi_square < 16.27  # 0.1% of fair draws exceed this (3 degrees of freedom)


def test_rows_of_one_batch_keep_their_own_wishes():
    wishes = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logit_bias={7: 100.0}),
        SamplingParams(seed=4, top_k=5),
        SamplingParams(seed=4, top_p=0.5, min_p=0.1, temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3),
        SamplingParams(seed=9, temperature=3.0),
    ]
    together = choose(LOGITS, [Sampler(p, [1, 2], 0, 1000) for p in wishes])
    alone = [choose(LOGITS[i : i + 1], [Sampler(p, [1, 2], 0, 1000)])[0] for i, p in enumerate(wishes)]
    assert together == alone and together[1] == 7 and together[0] == LOGITS[0].argmax()
    assert together[2] in LOGITS[2].topk(5).indices


def test_penalties_follow_what_was_generated():
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=1.5), [0], 0, 3)
    logits, said = torch.tensor([[3.0, 2.0, 0.4]]), []
    for _ in range(6):
        (token,) = choose(logits, [sampler])
        sampler.accept(token)
        said.append(token)
    # after each: 3.0 -> 1.5 -> 0.0 for token 0, 2.0 -> 0.5 -> -1.0 for token 1, 0.4 for token 2
    assert said == [0, 1, 0, 1, 2, 0]


def test_seeds():
    def drawn(seed, sample=0):
        sampler = Sampler(SamplingParams(seed=seed), [0], sample, 1000)
        return [choose(torch.zeros(1, 1000), [sampler])[0] for _ in range(8)]

    assert drawn(1) == drawn(1) and len({tuple(drawn(*x)) for x in ((1, 0), (2, 0), (1, 1), (None, 0))}) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("temperature", -1), ("temperature", math.nan), ("top_k", -1), ("top_k", 1.5), ("top_p", 0),
     ("top_p", 1.1), ("min_p", 2), ("repetition_penalty", 0), ("n", 0), ("seed", "x"), ("logprobs", -1),
     ("stop", [""]), ("stop", [3]), ("logit_bias", {1: math.inf}), ("temperature", "hot"), ("n", True)],
)  # fmt: skip
def test_meaningless_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError, match="top_p .*; n "):
        SamplingParams(top_p=7, n=-1)
    with pytest.raises(ValueError, match="names token 6400"):
        SamplingParams(logit_bias={6400: 1.0}).check_tokens(6400)
