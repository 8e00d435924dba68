"""Distillation: divergences by hand and against torch, a teacher in pieces, any two shapes of one vocabulary."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from stage import STAGES, catch_gradients, chat_weights, load, run_flags, write_texts

from common.errors import UserError
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.vocabulary import train_tokenizer
from model.weights import load_model, save_weights
from trainer.engine import TrainingEngine
from trainer.loop import language_model, take_step
from trainer.losses import distillation_sums, kd_loss, lm_loss
from trainer.stage_flags import parse
from trainer.world import World

WORLD = World(0, 1, torch.device("cpu"), torch.float32)
STAGE = load(STAGES["full_dist"])
KINDS = ("forward", "reverse", "skewed")


# ------------------------------------------------------------------------------------------------------ the losses
def test_divergences_by_hand():
    teacher = torch.log(torch.tensor([[3 / 4, 1 / 4], [0.9, 0.1]]))
    student = torch.log(torch.tensor([[1 / 2, 1 / 2], [0.1, 0.9]]))
    mask = torch.tensor([True, False])
    expected = {
        "forward": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverse": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
        "skewed": 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375),  # against the mean of both
    }
    for kind, nats in expected.items():
        total, count = kd_loss(student, teacher, mask, 1.0, kind, skew=0.5)
        assert count == 1 and total.item() == pytest.approx(nats, rel=1e-5)
        # at T = 2 of logits twice as large the distributions are the same, and T^2 = 4
        assert kd_loss(2 * student, 2 * teacher, mask, 2.0, kind, skew=0.5)[0].item() == pytest.approx(
            4 * nats, rel=1e-5
        )
    with pytest.raises(ValueError, match="forward, reverse or skewed"):
        kd_loss(student, teacher, mask, kind="x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equal_models_do_not_diverge_and_forward_is_torchs(kind, temperature):
    torch.manual_seed(0)
    student, teacher, mask = 3 * torch.randn(2, 5, 11), 3 * torch.randn(2, 5, 11), torch.rand(2, 5) < 0.7
    assert kd_loss(student, student, mask, temperature, kind)[0].item() == pytest.approx(0, abs=1e-5)
    total, count = kd_loss(student, teacher, mask, temperature, kind)
    assert count == mask.sum() and total > 0
    if kind == "forward":
        p, q = ((x[mask] / temperature).log_softmax(-1) for x in (teacher, student))
        torch.testing.assert_close(total, temperature**2 * F.kl_div(q, p, reduction="sum", log_target=True))


def in_one_piece(student, hidden, head, labels, temperature, kind):
    mask = labels[:, 1:] != -100
    ce, _ = lm_loss(student, labels)
    return ce, kd_loss(student[:, :-1], head(hidden[:, :-1]), mask, temperature, kind)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_in_pieces_gives_the_same_sums_and_gradients(kind):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(6, 13), torch.randn(3, 9, 6)
    student = torch.randn(3, 9, 13, requires_grad=True)
    labels = torch.where(torch.rand(3, 9) < 0.6, torch.randint(0, 13, (3, 9)), -100)
    expected = in_one_piece(student, hidden, head, labels, 1.5, kind)
    (gradient,) = torch.autograd.grad(0.3 * expected[0] + 0.7 * expected[1], student)
    for chunk in (1, 4, 1000):
        *sums, count = distillation_sums(student, hidden, head, labels, 1.5, kind, chunk=chunk)
        torch.testing.assert_close(tuple(sums), expected, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(0.3 * sums[0] + 0.7 * sums[1], student)[0]
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)
        assert count == (labels[:, 1:] != -100).sum()
    nothing = distillation_sums(student, hidden, head, torch.full((3, 9), -100))
    assert [x.item() for x in nothing] == [0, 0, 0]
    assert not torch.autograd.grad(nothing[0], student)[0].any()


def test_only_a_piece_of_the_teacher_is_kept_for_the_backward_pass():
    """Numbers saved for it: the student's chosen logits once, the hidden rows, and nothing of (n, V) beside."""
    head, hidden = torch.nn.Linear(4, 500), torch.randn(2, 65, 4)
    student, labels = torch.randn(2, 65, 500, requires_grad=True), torch.randint(0, 500, (2, 65))
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    def numbers_saved(function, *rest):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = function(student, hidden, head, labels, 1.5, *rest)
        assert result[0].requires_grad
        return sum(saved.values())

    n = 2 * 64 * 500
    assert numbers_saved(in_one_piece, "forward") > 3 * n
    assert numbers_saved(distillation_sums, "forward", 0.1, 16) < 1.2 * n


# -------------------------------------------------------------------------------------------------------- the stage
def run_distill(tmp_path, *more) -> dict:
    return STAGE.main([*run_flags("full_dist", tmp_path, steps=2), "--out_dir", str(tmp_path / "o"), *map(str, more)])


def history(tmp_path, name="full_dist_32"):
    lines = (tmp_path / "o" / f"{name}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def test_the_bare_student_is_every_second_layer_of_the_teacher(tmp_path, capsys):
    base = chat_weights(tmp_path, n_layers=4)
    result = run_distill(tmp_path, "--learning_rate", 1e-9, "--weight_decay", 0)
    teacher, student = load_model(base)[0], load_model(result["weights"])[0]
    assert student.config.n_layers == 2 and "every second layer of the teacher" in capsys.readouterr().out
    for i, layer in enumerate(student.model.layers):
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter, dict(teacher.model.layers[2 * i].named_parameters())[name])
    torch.testing.assert_close(student.lm_head.weight, teacher.lm_head.weight)
    wanted = {"val_loss", "val_bits_per_byte", "val_ce", "val_kd", "loss", "tokens", "weights"}
    assert wanted <= set(result)
    assert result["val_loss"] == pytest.approx(0.5 * result["val_ce"] + 0.5 * result["val_kd"], rel=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(tmp_path):
    base = chat_weights(tmp_path)
    run_distill(tmp_path, "--from_weight", base, "--alpha", 0, "--dropout", 0)
    first = history(tmp_path)[0]
    assert first["kd"] == pytest.approx(0, abs=1e-5) and first["ce"] > 1 and first["grad_norm"] < 1e-4


@pytest.mark.parametrize(
    ("teacher", "student"),
    [({"use_moe": True}, ["--use_moe", "0"]), ({}, ["--use_moe", "1"]), ({"dim": 64, "n_layers": 3}, ["--dim", "32"])],
)
def test_dense_and_expert_models_teach_each_other(teacher, student, tmp_path):
    chat_weights(tmp_path, **teacher)
    shape = ["--preset", "tiny", "--dim", 32, "--n_layers", 1, "--n_heads", 2, "--n_kv_heads", 1, *student]
    result = run_distill(tmp_path, *shape, "--kl", "skewed")
    assert math.isfinite(result["loss"]) and ("_moe" in result["weights"]) == (student == ["--use_moe", "1"])
    if "_moe" in result["weights"]:
        assert history(tmp_path, "full_dist_32_moe")[0]["balance"] > 0


def begin(tmp_path, alpha):
    args = parse(STAGE.parser(), ["--device", "cpu", "--alpha", str(alpha)])
    student = load_model(chat_weights(tmp_path, seed=1, name="student_32.pth"))[0]
    teacher = load_model(chat_weights(tmp_path, seed=2, use_moe=True))[0].requires_grad_(False)
    torch.manual_seed(0)
    ids = torch.randint(16, 6400, (4, 24))
    batch = {"input_ids": ids, "labels": torch.where(torch.rand(ids.shape) < 0.5, ids, -100),
             "segment_ids": torch.ones_like(ids)}  # fmt: skip
    return args, student, teacher, batch


def micro_batches(batch, size):
    for i in range(0, 4, size):
        part = {name: tensor[i : i + size] for name, tensor in batch.items()}
        yield part | {"count": (part["labels"][:, 1:] != -100).sum(), "real_tokens": torch.tensor(24 * size)}


def gradients(args, student, loss_fn, micro):
    engine = TrainingEngine(student, args, WORLD)
    caught = catch_gradients(engine)
    numbers, _ = take_step(engine, list(micro), loss_fn, 1.0, 0)
    student.zero_grad(set_to_none=True)
    return caught, numbers


def test_alpha_one_is_plain_learning_and_micro_batches_do_not_matter(tmp_path):
    args, student, teacher, batch = begin(tmp_path, alpha=1)
    plain, numbers = gradients(args, student, language_model, micro_batches(batch, 4))
    found, other = gradients(args, student, STAGE.distillation(args, teacher), micro_batches(batch, 4))
    assert other["loss"] == pytest.approx(numbers["loss"], rel=1e-6) == pytest.approx(other["ce"], rel=1e-6)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-7, msg=name)
    args.alpha = 0.4
    whole, numbers = gradients(args, student, STAGE.distillation(args, teacher), micro_batches(batch, 4))
    parts, other = gradients(args, student, STAGE.distillation(args, teacher), micro_batches(batch, 1))
    assert other == pytest.approx(numbers, rel=1e-6)
    assert numbers["loss"] == pytest.approx(0.4 * numbers["ce"] + 0.6 * numbers["kd"], rel=1e-6)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=2e-4, atol=2e-7, msg=name)


def test_raw_text_can_be_the_data(tmp_path):
    result = run_distill(tmp_path, "--rows", "text", "--data_path", write_texts(tmp_path / "t.jsonl"))
    assert result["learned_token_share"] > 0.5 and result["val_bits_per_byte"] > 0


def test_another_vocabulary_is_refused(tmp_path):
    tokenizer = train_tokenizer(["另一个词表的老师"] * 3, 300)
    config = LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=len(tokenizer))
    save_weights(tmp_path / "other_32.pth", MiniMindForCausalLM(config), tokenizer, {})
    student = chat_weights(tmp_path)
    with pytest.raises(UserError, match="other_32.pth has another vocabulary than the student"):
        run_distill(tmp_path, "--teacher", tmp_path / "other_32.pth", "--from_weight", student)
    assert len(load_tokenizer()) != len(tokenizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "nowhere/big.pth"], "no weights at nowhere/big.pth"),
        (["--teacher", "grpo"], "--teacher grpo: no such file, and no grpo_"),
        (["--alpha", 1.5], r"--alpha must lie in \[0, 1\]"),
        (["--temperature", 0], "--temperature must be above 0"),
        (["--skew", 1], r"--skew must lie in \(0, 1\)"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_distill(tmp_path, *flags)


def test_without_a_teacher_the_command_to_run_first_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no weights of full_sft or dpo in o or out; run `python 3-full_sft.py` first"):
        STAGE.main(["--out_dir", "o"])
