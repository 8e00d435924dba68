"""Preferences: losses by hand and against trl, packed pairs equal to single ones, true means, a fixed reference."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import (
    STAGES,
    catch_gradients,
    chat_weights,
    load,
    run_flags,
    write_chats,
    write_pairs,
)

from common.errors import UserError
from data.packing import pair_items
from data.row_shapes import as_pair
from data.rows import load_rows
from model.model import MiniMindForCausalLM
from model.tokenizer import render
from model.weights import load_model
from model.weights_file import fingerprint
from trainer.checkpoint import check_recipe
from trainer.engine import TrainingEngine
from trainer.loop import evaluate, take_step
from trainer.losses import dpo_loss, lm_loss, orpo_loss, simpo_loss
from trainer.preference import Reference, answers_of, bound_to_its_start, paired_bootstrap, preference_report
from trainer.setup import prepare
from trainer.stage_flags import parse
from trainer.world import World

WORLD = World(0, 1, torch.device("cpu"), torch.float32)
STAGE = load(STAGES["dpo"])


# ------------------------------------------------------------------------------------------------------ the losses
def tensors(*values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def test_dpo_and_ipo_by_hand():
    numbers = tensors(-10.0, -12.0, -11.0, -11.0)  # policy 2 nats for chosen, reference undecided: h = 2
    assert dpo_loss(*numbers, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    swapped = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.e)
    assert dpo_loss(*numbers, beta=0.5, label_smoothing=0.1).item() == pytest.approx(swapped)
    assert dpo_loss(*numbers, beta=0.5, kind="ipo").item() == pytest.approx((2 - 1) ** 2)
    assert dpo_loss(*tensors(-3.0, -9.0, -3.0, -9.0), beta=0.1).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="sigmoid or ipo"):
        dpo_loss(*numbers, beta=0.5, kind="x")


def test_simpo_and_orpo_by_hand():
    assert simpo_loss(*tensors(-1.0, -2.0), 2.0, 0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    half, fifth = math.log(1 / 2), math.log(1 / 5)  # odds 1 and 1/4: their ratio is 4
    loss = orpo_loss(*tensors(half, fifth), beta=0.1).item()
    assert loss == pytest.approx(math.log(2) - 0.1 * math.log(4 / 5))


# ------------------------------------------------------------------------------------------------------- the rows
@given(st.lists(st.tuples(st.integers(2, 80), st.integers(5, 80), st.integers(5, 80)), min_size=1), st.integers(16, 90))
@settings(max_examples=200, deadline=None)
def test_pairs_fit_the_row_and_lose_the_front_of_the_prompt_first(pairs, longest):
    lengths = np.array([[prompt + a, prompt + b] for prompt, a, b in pairs]).flatten()
    answers = np.repeat([prompt for prompt, _, _ in pairs], 2)
    items, prompts_cut, answers_cut = pair_items(lengths, answers, longest)
    sizes = items.lengths.reshape(-1, 2)
    start, end = items.start.reshape(-1, 2), items.end.reshape(-1, 2)
    assert (sizes.sum(axis=1) <= longest).all() and (start[:, 0] == start[:, 1]).all()
    for (prompt, a, b), (cut, _), (one, two), size in zip(pairs, start, end, sizes):
        fits, answers_fit = 2 * prompt + a + b <= longest, a + b <= longest
        assert fits == (cut == 0 and one == prompt + a and two == prompt + b)
        if answers_fit:
            assert one == prompt + a and two == prompt + b and (fits or sum(size) >= longest - 1)
        else:
            assert cut == prompt and sum(size) == longest
    assert prompts_cut == sum(2 * p + a + b > longest for p, a, b in pairs)
    assert answers_cut == sum(a + b > longest for _, a, b in pairs)


def begin(tmp_path, *more):
    flags = [*run_flags("dpo", tmp_path, steps=6), "--out_dir", tmp_path / "o", "--dropout", 0, *more]
    args = parse(STAGE.parser(), list(map(str, flags)))
    run = bound_to_its_start(prepare(args, sample="dpo.jsonl"))
    reference = Reference(run)
    rows = load_rows("pair", run.data_files, run.tokenizer, args, WORLD)
    reference.ready(rows, WORLD)
    return args, run, rows, reference


def alone(model, tokenizer, messages) -> tuple[float, int]:
    """Log-probability of the last answer and its tokens, computed on this conversation by itself."""
    ids, mask = render(tokenizer, messages)
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    learned = [i for i in range(1, len(ids)) if mask[i]]
    return sum(log_p[i - 1, ids[i]].item() for i in learned), len(learned)


def test_packed_answers_have_the_log_probabilities_of_single_ones(tmp_path):
    args, run, rows, _ = begin(tmp_path)
    with torch.no_grad():
        found, counts = answers_of(run.model, rows[0], WORLD, 3)
        for document in rows[0].documents[::2]:
            row = json.loads((tmp_path / "dpo.jsonl").read_text().splitlines()[document // 2])
            for offset, key in enumerate(("chosen", "rejected")):
                expected, tokens = alone(run.model, run.tokenizer, row[key])
                assert found[document + offset] == pytest.approx(expected, rel=1e-5)
                assert counts[document + offset] == tokens
    assert (rows[0].documents[1::2] == rows[0].documents[::2] + 1).all()
    assert not set(rows[0].documents) & set(rows[1].documents)


def test_dropout_is_the_flags_where_a_run_starts_from_weights_that_had_none(tmp_path):
    ids = torch.arange(20, 40)[None]
    for share, same in ((0.3, False), (0, True)):
        _, run, _, _ = begin(tmp_path, "--dropout", share)
        model = run.model.train()
        assert torch.equal(model(ids).logits, model(ids).logits) == same


def gradients(tmp_path, batch_size, accumulation, *more):
    args, run, rows, reference = begin(tmp_path, *more)
    with torch.no_grad():  # a policy that is no longer the reference
        run.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    engine = TrainingEngine(run.model, args, WORLD)
    caught = catch_gradients(engine)
    micro = [rows[0].batch(range(i * batch_size, (i + 1) * batch_size)) for i in range(accumulation)]
    numbers, _ = take_step(engine, micro, STAGE.preference_loss(args, reference), 1.0, 0)
    return caught, numbers, (args, run, rows, reference)


def test_a_step_does_not_depend_on_how_it_was_dealt_out_nor_on_where_the_reference_is_kept(tmp_path):
    expected, numbers, _ = gradients(tmp_path, 4, 1)
    assert len(numbers) == 6 and abs(numbers["kl"]) > 1e-3
    for batch_size, accumulation, *more in ((2, 2), (1, 4), (4, 1, "--reference", "live")):
        found, other, _ = gradients(tmp_path, batch_size, accumulation, *more)
        for name, value in numbers.items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_sft_part_is_the_chosen_answers_mean_cross_entropy(tmp_path):
    """Gradients with and without it differ by those of a loss computed on each chosen conversation by itself."""
    without, numbers, _ = gradients(tmp_path, 4, 1, "--sft_weight", 0)
    with_it, others, (_, run, rows, _) = gradients(tmp_path, 4, 1, "--sft_weight", 0.5)
    assert others == pytest.approx(numbers)  # it is not part of the printed loss
    run.model.zero_grad()
    chosen = [d for d in rows[0].batch(range(4))["documents"].flatten().tolist()[::2] if d >= 0]
    for document in chosen:
        row = json.loads((tmp_path / "dpo.jsonl").read_text().splitlines()[document // 2])
        ids, mask = (torch.tensor([x]) for x in render(run.tokenizer, row["chosen"]))
        nats, count = lm_loss(run.model(ids).logits, torch.where(mask > 0, ids, -100))
        (0.5 * nats / count / len(chosen)).backward()
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(with_it[name] - without[name], parameter.grad, rtol=2e-3, atol=2e-6, msg=name)


def test_printed_numbers_are_means_over_pairs(tmp_path):
    """Accuracy, margin and KL of a validation, from the log-probabilities of every single answer."""
    _, _, (args, run, rows, reference) = gradients(tmp_path, 4, 1)
    loss_fn = STAGE.preference_loss(args, reference)
    found = evaluate(TrainingEngine(run.model, args, WORLD), rows[1], loss_fn, 3, None)
    policy, counts = answers_of(run.model, rows[1], WORLD, 2)
    policy, ref, counts = (x[rows[1].documents] for x in (policy, rows[1].per_document["reference"], counts))
    chosen, rejected = (policy - ref)[::2], (policy - ref)[1::2]
    h = args.beta * (chosen - rejected)
    means = policy / counts
    expected = {
        "val_loss": np.log1p(np.exp(-h)).mean(), "val_margin": h.mean(), "val_kl": -(chosen + rejected).mean() / 2,
        "val_accuracy": (policy[::2] > policy[1::2]).mean(),
        "val_accuracy_per_token": (means[::2] > means[1::2]).mean(),
    }  # fmt: skip
    assert {k: v for k, v in found.items() if k != "val_bits_per_byte"} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    report = reference.report(rows[1], WORLD)(TrainingEngine(run.model, args, WORLD))
    assert report["accuracy"] == pytest.approx(expected["val_accuracy"])
    assert report["accuracy_per_token"] == pytest.approx(expected["val_accuracy_per_token"])


def test_the_report_by_hand():
    before = np.array([-4.0, -3, -4, -3, -4, -3, -1, -5])  # right: no, no, no, yes
    after = np.array([-2.0, -3, -2, -3, -2, -3, -1, -5])  # right: all
    counts = np.array([1.0, 3, 2, 2, 4, 1, 1, 5])
    report = preference_report(before, after, counts)
    assert (report["accuracy_before"], report["accuracy"], report["heldout_pairs"]) == (0.25, 1.0, 4)
    # per token before: -4 < -1; -2 < -1.5; -1 > -3; -1 = -1. After: -2 < -1; -1 > -1.5; -0.5 > -3; -1 = -1
    assert (report["accuracy_per_token_before"], report["accuracy_per_token"]) == (0.25, 0.5)
    assert report["longer_answer_accuracy"] == (0 + 0.5 + 1 + 0) / 4
    low, high = report["accuracy_gain_interval"]
    assert 0 <= low <= 0.5 and high == 1


def test_the_bootstrap_interval():
    zeros, ones = np.zeros(50), np.ones(50)
    assert paired_bootstrap(zeros, zeros) == [0, 0] and paired_bootstrap(zeros, ones) == [1, 1]
    half = np.arange(400) % 2
    low, high = paired_bootstrap(np.zeros(400), half)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.01)  # of a mean of 400 coins


# -------------------------------------------------------------------------------------------------------- the stage
def run_dpo(tmp_path, *more) -> dict:
    return STAGE.main([*run_flags("dpo", tmp_path), "--out_dir", str(tmp_path / "o"), *map(str, more)])


def test_a_run_prefers_what_it_was_shown_and_reports_it(tmp_path):
    held_out = write_pairs(tmp_path / "v.jsonl", n=40)
    result = run_dpo(tmp_path, "--learning_rate", 3e-3, "--val_path", held_out, "--max_steps", 15)
    assert result["heldout_pairs"] == 40 and result["val_bits_per_byte"] is None
    assert result["accuracy"] == pytest.approx(result["val_accuracy"])
    assert result["accuracy_gain_interval"][0] > 0 and result["accuracy_before"] < result["accuracy"]
    log = [json.loads(line) for line in (tmp_path / "o" / "dpo_32.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.01) and abs(log[0]["kl"]) < 0.1
    assert len(list((tmp_path / "o" / "cache").glob("reference-*.npy"))) == 2  # training and validation rows
    assert load_model(result["weights"])[2]["stage"] == "dpo"


def test_at_the_first_step_policy_and_reference_agree(tmp_path):
    run_dpo(tmp_path, "--dropout", 0, "--max_steps", 1, "--learning_rate", 1e-9)
    first = json.loads((tmp_path / "o" / "dpo_32.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_the_other_losses_run(loss, tmp_path):
    assert math.isfinite(run_dpo(tmp_path, "--loss", loss, "--max_steps", 1)["loss"])


def test_experts_learn_preferences_too(tmp_path):
    chat_weights(tmp_path, use_moe=True)
    result = run_dpo(tmp_path, "--max_steps", 2)
    first = json.loads((tmp_path / "o" / "dpo_32_moe.jsonl").read_text().splitlines()[0])
    assert result["weights"].endswith("dpo_32_moe.pth") and first["balance"] > 0


def pair(prompts, answers):
    return {key: [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
            for key, p, a in zip(("chosen", "rejected"), prompts, answers)}  # fmt: skip


def scored(row):
    """Each message with a note that no model reads."""
    return {key: [message | {"score": key} for message in messages] for key, messages in row.items()}


def test_a_note_beside_a_message_does_not_part_a_pair():
    assert as_pair(scored(pair("aa", "xy")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair("ab", "xy"), "d.jsonl:1: the prompts of chosen and rejected differ"),
        (pair("aa", "xx"), "d.jsonl:1: chosen and rejected are the same answer"),
        (scored(pair("aa", "xx")), "d.jsonl:1: chosen and rejected are the same answer"),
        (pair("aa", ["x", "x\n"]), "d.jsonl:1: chosen and rejected are the same answer"),
        ({k: v * 2 for k, v in pair("aa", "xy").items()}, "d.jsonl:1: the prompts of chosen and rejected differ"),
        ({k: v + v[:1] for k, v in pair("aa", "xy").items()}, "d.jsonl:1: .* must each end with an answer"),
        ({k: v[1:] for k, v in pair("aa", "xy").items()}, "d.jsonl:1: .* the answers stand without their prompt"),
        ({"chosen": []}, 'd.jsonl:1: no keys "chosen" and "rejected"'),
    ],
)
def test_wrong_pairs(row, message, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        run_dpo(tmp_path, "--data_path", tmp_path / "d.jsonl")
    assert not list((tmp_path / "o").glob("*.pth"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", 0], "--beta must be above 0"),
        (["--label_smoothing", 0.7], "--label_smoothing must lie in"),
        (["--label_smoothing", 0.1, "--loss", "ipo"], "belongs to --loss sigmoid"),
        (["--val_path", "nowhere.jsonl"], "no such data file: nowhere.jsonl"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_dpo(tmp_path, *flags)


def test_missing_weights_and_data_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="no keys"):
        run_dpo(tmp_path, "--data_path", write_chats(tmp_path / "c.jsonl"))
    with pytest.raises(UserError, match="no weights at nowhere/x.pth"):
        run_dpo(tmp_path, "--from_weight", "nowhere/x.pth")


def resumed(run, recipe):
    """The run as it is when a state with this recipe is resumed; its own weights are not there yet."""
    fresh = replace(run, state={"record": {"recipe": recipe}}, model=MiniMindForCausalLM(run.model.config), fixed={})
    return bound_to_its_start(fresh)


def test_a_run_needs_the_reference_it_began_with(tmp_path):
    """Its cached numbers are enough to go on; where they are gone, the weights must be what they were."""
    _, run, rows, reference = begin(tmp_path)
    again = Reference(resumed(run, run.recipe(rows[0], 4)))
    again.ready(rows, WORLD)
    chat_weights(tmp_path, seed=3)
    again.ready(rows, WORLD)
    cached = list((tmp_path / "o" / "cache").glob("reference-*.npy"))
    cached[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"reference-.*\.npy is damaged"):
        again.ready(rows, WORLD)
    for file in cached:
        file.unlink()
    with pytest.raises(UserError, match="is no longer what this run began with"):
        again.ready(rows, WORLD)


def test_the_recipe_holds_what_reference_says_beside_the_references_fingerprint(tmp_path):
    """Or a run with a cached reference goes on with a live one."""
    _, run, rows, _ = begin(tmp_path, "--reference", "live")
    recipe = run.recipe(rows[0], 4)
    assert recipe["reference"] == "live" and fingerprint(run.model) in recipe.values()
    run.args.reference = "cached"
    with pytest.raises(UserError, match="settings: reference was live, is now cached; --overwrite"):
        check_recipe(recipe, resumed(run, recipe).recipe(rows[0], 4), "x.pth")


# ------------------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow  # trl takes longer to import than to run
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
def test_the_loss_is_trls(loss, tmp_path):
    """trl's trainer on the same tokens, one pair a padded row: the loss of our packed rows to 1e-6."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    flags = ["--loss", "ipo" if loss == "ipo" else "sigmoid", "--per_token", loss == "sigmoid_norm"]
    _, numbers, (args, run, rows, _) = gradients(tmp_path, 4, 1, *flags)
    batch = rows[0].batch(range(4))
    answers = {}
    for ids, labels, segments, documents in zip(
        *(batch[k] for k in ("input_ids", "labels", "segment_ids", "documents"))
    ):
        for place, document in enumerate(documents.tolist()):
            where = segments == place + 1
            if document >= 0:
                answers[document] = (ids[where], (labels[where] != -100).long())
    ordered = [d for d in sorted(answers) if d % 2 == 0] + [d for d in sorted(answers) if d % 2]
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {
        "input_ids": pad([answers[d][0] for d in ordered], True),
        "completion_mask": pad([answers[d][1] for d in ordered], True),
        "attention_mask": pad([torch.ones_like(answers[d][0]) for d in ordered], True),
    }
    config = trl.DPOConfig(
        tmp_path / "trl", beta=args.beta, loss_type=[loss], use_cpu=True, bf16=False, report_to="none"
    )
    message = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    data = datasets.Dataset.from_dict({"prompt": [message[0]], "chosen": [message[1]], "rejected": [message[1]]})
    trainer = trl.DPOTrainer(run.model, ref_model=load_model(tmp_path / "full_sft_32.pth")[0], args=config,
                             processing_class=run.tokenizer, train_dataset=data)  # fmt: skip
    run.model.train()
    theirs = trainer._compute_loss(run.model, inputs, False)
    assert numbers["loss"] == pytest.approx(theirs.item(), abs=1e-6, rel=2e-6)
