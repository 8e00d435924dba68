"""GRPO: loss and advantages by hand and against trl, ratios of what was sampled, a run that depends on nothing else."""

import copy
import json
import math
import os
import subprocess
from dataclasses import replace

import pytest
import torch
from stage import (
    ROOT,
    STAGES,
    catch_gradients,
    command,
    grpo_flags,
    history,
    load,
    reasoning_weights,
    run,
    write_questions,
)

from common.errors import UserError
from data.row_shapes import BadRow
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render
from model.weights import load_model
from trainer import grpo
from trainer.engine import TrainingEngine
from trainer.grpo import SampledAnswer
from trainer.loop import take_step
from trainer.losses import group_advantages, grpo_loss, token_log_probs
from trainer.plan import Plan
from trainer.preference import bound_to_its_start, frozen_copy, starting_model
from trainer.problems import (
    Problem,
    Problems,
    as_problem,
    fingerprints,
    load_problems,
    read_problems,
    split_problems,
)
from trainer.rewards import answer_block, exact_match, reward
from trainer.setup import prepare
from trainer.stage_flags import parse
from trainer.world import World

STAGE = load(STAGES["grpo"])
WORLD = World(0, 1, torch.device("cpu"), torch.float32)
TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reasoning")
    reasoning_weights(folder)
    return folder


def main(folder, out, *more) -> dict:
    return STAGE.main([*grpo_flags(folder), "--out_dir", str(out), *map(str, more)])


# ------------------------------------------------------------------------------------------------------ pure functions
def test_advantages_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, unbiased deviation sqrt(1/3). Equal rewards: nothing."""
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64))
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert found[0].tolist() == pytest.approx([a, -a, -a, a]) and found[1].abs().max() < 1e-12


def test_the_loss_by_hand():
    """Two answers of two tokens and one, clip 0.2, kl 0.5.

    Ratios 1.5 and 0.5 with advantage 2: min(3, 1.2 * 2) and min(1, 0.8 * 2), the first one clipped. Ratio 0.5 with
    advantage -1: min(-0.5, -0.8), clipped. d = reference / policy is 1/1.5, 2 and 4.
    """
    policy = torch.tensor([[1.5, 0.5], [0.5, 9.0]]).log()
    old = torch.zeros(2, 2)
    reference = torch.tensor([[1.0, 1.0], [2.0, 1.0]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    loss, count, numbers = grpo_loss(policy, old, reference, torch.tensor([2.0, -1.0]), mask, 0.2, 0.5)
    k3 = (1 / 1.5 + math.log(1.5) - 1) + (2 - math.log(2) - 1) + (4 - math.log(4) - 1)
    assert loss.item() == pytest.approx(-2.4 - 1.0 + 0.8 + 0.5 * k3, rel=1e-6)
    assert count == 3 and numbers["clip_share"] == 2 and numbers["kl"].item() == pytest.approx(k3, rel=1e-6)
    plain, _, numbers = grpo_loss(policy, old, None, torch.tensor([2.0, -1.0]), mask, 0.2, 0.5)
    assert plain.item() == pytest.approx(-2.6, rel=1e-6) and "kl" not in numbers


def test_a_clipped_token_has_no_gradient_and_the_first_update_is_the_policy_gradient():
    policy = torch.tensor([[0.5, -0.5], [0.5, -0.5]], requires_grad=True)
    mask, advantages = torch.ones(2, 2, dtype=torch.bool), torch.tensor([1.0, -1.0])
    (found,) = torch.autograd.grad(grpo_loss(policy, torch.zeros(2, 2), None, advantages, mask, 0.2, 0)[0], policy)
    expected = [[0.0, -math.exp(-0.5)], [math.exp(0.5), 0.0]]  # beyond the clip on the side of the advantage: nothing
    torch.testing.assert_close(found, torch.tensor(expected))
    (found,) = torch.autograd.grad(grpo_loss(policy, policy.detach(), None, advantages, mask, 0.2, 0)[0], policy)
    torch.testing.assert_close(found, -advantages[:, None].expand(2, 2))  # ratio 1: d(ratio) = d(log p)


def test_log_probs_are_of_the_tempered_distribution():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[0, -100, 3, 4, -100], [-100, 6, 6, 6, 6]])
    found = token_log_probs(logits, labels, 0.7)
    whole = (logits / 0.7).log_softmax(-1)
    for b in range(2):
        for t in range(4):
            target = labels[b, t + 1].item()
            assert found[b, t].item() == pytest.approx(whole[b, t, target].item() if target >= 0 else 0, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\na\n</think>\n<answer>\n12\n</answer>", "12"),
        (" <think></think><answer>1,200</answer>\n", "1,200"),
        ("<think>a</think><answer> </answer>", None),
        ("<think>a</think><answer>1</answer>。", None),
        ("a<think>a</think><answer>1</answer>", None),
        ("<answer>1</answer>", None),
        ("<think>a<answer>1</answer></think>", None),
        ("<think>a</think><answer>1</answer><answer>1</answer>", None),
        ("<think>a<think>b</think><answer>1</answer>", None),
        ("<think>a</think><answer>1", None),
        ("<think>a</think><answer>1<|im_start|></answer>", None),
        ("<think><|endoftext|>a</think><answer>1</answer>", None),
        ("<think>a</think><answer>1</answer><|reserved_3|>", None),
        ("<think>a</think><answer><s>1</answer>", None),
        ("<think>|x| < 3 <|</think><answer>a<b|c></answer>", "a<b|c>"),
        ("", None),
    ],
)
def test_the_form_of_an_answer(text, answer):
    assert answer_block(text) == answer


def test_rewards():
    good = "<think>x</think><answer>{}</answer>"
    assert reward(good.format(" 1200 "), "1,200", 0.2) == 1.2
    assert reward(good.format("１２００"), "1200", 0.2) == 1.2
    assert reward(good.format("12001"), "1200", 0.2) == reward(good.format("不是1200"), "1200", 0.2) == 0.2
    for said, known in (("10²", "102"), ("102", "10²"), ("①", "1"), ("1½", "11⁄2"), ("10₂", "102"), ("5", "-5"),
                        ("1 2", "12"), ("12, 345", "12345"), ("3\n4", "34")):  # fmt: skip
        assert reward(good.format(said), known, 0.2) == 0.2, said
    for said, known in (("−5", "-5"), ("-5", "−5"), ("－５", "-5"), ("（３，４）", "(3,4)"), ("10²", "10²"),
                        ("ＡＢ", "ab"), ("1\u3000200", "1200"), ("x = 1 , 2", "x=1,2"), ("1\n2", "1 2")):  # fmt: skip
        assert reward(good.format(said), known, 0.2) == 1.2, said
    assert reward("1200", "1200", 0.2) == 0 and not exact_match("1200", "1200")


# ----------------------------------------------------------------------------------------------------------- questions
def test_questions_come_as_pairs_or_from_worked_examples(tmp_path):
    worked = "<think>\n<answer>3</answer>?\n</think>\n<answer>\n2\n</answer>"
    chat = [{"role": "user", "content": "1+1=？"}, {"role": "assistant", "content": worked}]
    assert as_problem({"conversations": chat}) == (chat[:1], "2")
    assert as_problem({"question": "1+1=？", "answer": 2}) == (chat[:1], "2")
    assert as_problem({"question": "1+1=？", "answer": 2.0}) == (chat[:1], "2")  # as pandas writes it
    assert as_problem({"question": "1+1=？", "answer": 2.5}) == (chat[:1], "2.5")
    tools = [{"name": "f"}]
    first = {"role": "system", "content": "短", "tools": tools}
    assert as_problem({"question": "1+1=？", "answer": 2, "system": "短", "tools": tools}) == ([first, *chat[:1]], "2")
    assert as_problem({"conversations": chat, "system": "短", "tools": tools}) == ([first, *chat[:1]], "2")
    sample = read_problems([ROOT / "dataset/sample/reason.jsonl"], TOKENIZER, 128)
    assert len(sample) > 2000 and all(q.answer.isdigit() for q in sample)
    train, held_out = split_problems(sample, 0.2)
    assert not {tuple(q.prompt) for q in train} & {tuple(q.prompt) for q in held_out}
    assert abs(len(held_out) / len(sample) - 0.2) < 0.03 and len(train) + len(held_out) == len(sample)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "", "answer": "1"}, '"question" must be a string'),
        ({"question": "1/0", "answer": float("nan")}, '"answer" must be a string or a number'),
        ({"question": "a"}, '"answer" must be a string or a number'),
        ({"question": "a", "answer": True}, '"answer" must be'),
        ({"text": "a"}, 'no key "conversations"'),
        ({"conversations": [{"role": "assistant", "content": "<answer>1</answer>"}]}, "no answer to check against"),
        ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}]}, "no <answer>"),
    ],
)
def test_rows_that_cannot_be_checked(row, message, folder, tmp_path):
    with pytest.raises(BadRow, match=message):
        as_problem(row)
    file = write_questions(tmp_path / "q.jsonl")
    file.write_text(file.read_text("utf-8") + json.dumps(row) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"q.jsonl:82: .*{message}"):
        main(folder, tmp_path / "o", "--data_path", file)
    assert len(read_problems([file], TOKENIZER, 64, skip_bad_lines=True)) == 81


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group", 1], "--group must be at least 2"),
        (["--group", 3], "16 answers .* no whole number of groups of 3"),
        (["--temperature", 0], "--temperature must be above 0"),
        (["--clip", 1], r"--clip must lie in \(0, 1\)"),
        (["--inner_steps", 0], "--inner_steps must be at least 1"),
        (["--kl", -1], "--kl must be at least 0"),
        (["--format_reward", "nan"], "--format_reward must be a number, not nan"),
        (["--dropout", 0.1], "--dropout has no place here"),
        (["--max_new_tokens", 64], "--max_new_tokens must lie between 1 and --seq_len 64"),
        (["--max_new_tokens", 60], "questions.jsonl:1: the question has .* raise --seq_len"),
        (["--val_path", "no.jsonl"], "no such data file: no.jsonl"),
        (["--from_weight", "reason"], "no such file, and no reason_"),
    ],
)
def test_wrong_flags(flags, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        main(folder, tmp_path / "o", *flags)


def test_zero_3_is_refused(tmp_path):
    """Sampling wants whole weights on every process."""
    config, script = tmp_path / "three.json", load("train_grpo.py")
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match="three.json: ZeRO stage 3"):
        script.check(script.parser().parse_args(["--deepspeed", str(config)]))


def test_without_a_reasoning_model_the_command_to_run_first_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run `python train_distill_reason.py` first"):
        STAGE.main(["--out_dir", str(tmp_path / "o")])


# -------------------------------------------------------------------------------------------------------------- a step
def begin(folder, tmp_path, *more):
    args = parse(STAGE.parser(), [*grpo_flags(folder), "--out_dir", str(tmp_path / "o"), *map(str, more)])
    STAGE.check(args)
    run = prepare(args, before=("reason",), required=True)
    problems, held_out = load_problems(run.data_files, run.tokenizer, args)
    return args, run, problems, held_out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_learned_from_has_the_probabilities_it_was_sampled_with(temperature, folder, tmp_path):
    """Log-probabilities of the loss = those of the sampling, at its temperature; so the first ratio is 1."""
    args, run, problems, _ = begin(folder, tmp_path, "--temperature", temperature)
    asked = [problems[i] for i in (0, 8)]
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=3, logprobs=6400)
    said = Engine(run.model, run.tokenizer).generate([q.prompt for q in asked], params)
    answers = [
        SampledAnswer(i, q.prompt, c.token_ids, 0, False, False, False) for i, (q, c) in enumerate(zip(asked, said))
    ]
    engine = TrainingEngine(run.model, args, WORLD)
    (batch,) = grpo.deal(answers, 8, 1, WORLD.device)
    grpo.add_log_probs(engine, [batch], None, args)
    for row, answer in enumerate(sorted(answers, key=len)):
        model = torch.full((len(answer.tokens), 6400), -torch.inf)  # the engine's log-probabilities at temperature 1
        for t, place in enumerate(said[answer.index].logprobs):
            tokens, values = zip(*place.top)
            model[t, list(tokens)] = torch.tensor(values)
        sampled = (model / temperature).log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        learned = batch["old"][row, len(answer.prompt) - 1 : len(answer) - 1]
        torch.testing.assert_close(learned, sampled, rtol=1e-4, atol=2e-5)
    _, count, numbers, _ = grpo.policy_loss(args)(run.model, batch)
    assert numbers["clip_share"] == 0 and count == sum(len(a.tokens) for a in answers)


def some_answers(n=8):
    generator = torch.Generator().manual_seed(1)

    def tokens(length):
        return torch.randint(3, 6400, (length,), generator=generator).tolist()

    return [SampledAnswer(i, tokens(4 + i % 3), tokens(3 + 5 * i % 7), 0, True, True, False, (-1) ** i * (i + 1) / 4)
            for i in range(n)]  # fmt: skip


def gradients(args, use_moe, batch_size, accumulation):
    """Gradients and numbers of a step over some_answers(); policy, old policy and reference are three models."""
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, use_moe=use_moe, aux_loss_alpha=0.1)
    model = MiniMindForCausalLM(config).train()
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(4)
    engine = TrainingEngine(model, args, WORLD)
    batches = grpo.deal(some_answers(), batch_size, accumulation, WORLD.device)
    grpo.add_log_probs(engine, batches, reference, args)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(3)
    caught = catch_gradients(engine)
    numbers, _ = take_step(engine, batches, grpo.policy_loss(args), 1.0, 0)
    return caught, numbers, (model, reference, batches)


@pytest.mark.parametrize("use_moe", [False, True])
def test_gradients_do_not_depend_on_how_the_answers_are_dealt_out(use_moe, folder, tmp_path):
    args = begin(folder, tmp_path, "--clip", 0.01)[0]
    expected, numbers, _ = gradients(args, use_moe, 8, 1)
    assert numbers["kl"] > 1e-4 and 0 < numbers["clip_share"] < 1 and ("balance" in numbers) == use_moe
    for batch_size, accumulation in ((4, 2), (1, 8), (4, 3)):  # the last one: with an empty micro-batch
        found, other, _ = gradients(args, use_moe, batch_size, accumulation)
        for name, value in numbers.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_group_is_compared_as_a_whole():
    answers = [
        SampledAnswer(i, [1], [2], r, r > 0, r == 1, False) for i, r in enumerate((1, 0, 0, 1, 0.2, 0.2, 0.2, 0.2))
    ]
    numbers = grpo.compare(answers[::-1], 4, WORLD)
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert [x.advantage for x in answers] == pytest.approx([a, -a, -a, a, 0, 0, 0, 0])
    assert numbers == pytest.approx(
        {"reward": 0.35, "well_formed": 0.75, "right": 0.25, "truncated": 0, "length": 1, "learning_groups": 0.5}
    )


def a_model_that_says(tokens: list[int]) -> MiniMindForCausalLM:
    """After the prompt's last token the first of `tokens`, after each of them the next: layers add nothing, the head
    looks the last token up."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        layer = model.model.layers[0]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        last = render(TOKENIZER, [{"role": "user", "content": "1"}], add_generation_prompt=True)[0][-1]
        for before, token in zip([last, *tokens], tokens):
            model.lm_head.weight[token] = 1000 * model.model.embed_tokens.weight[before]
    return model


@pytest.mark.parametrize("marker", ["", "<|im_start|>", "<|endoftext|>", "<|reserved_0|>"])
@pytest.mark.parametrize("place", [0, 1, 4, 6])  # before all, in the thought, in the answer block, behind it
def test_what_is_judged_is_what_was_generated(marker, place, folder, tmp_path):
    """A special token anywhere, which the engine's text leaves out, costs the reward."""
    args, _, problems, _ = begin(folder, tmp_path)
    words = ["<think>", "x", "</think>", "<answer>", "7", "</answer>", "<|im_end|>"]
    words[place:place] = [marker] * bool(marker)
    tokens = TOKENIZER.convert_tokens_to_ids(words)
    asked = Problems([Problem(problems.problems[0].prompt, "7")], 8, 0)
    engine = TrainingEngine(a_model_that_says(tokens), args, WORLD)
    (answer,) = grpo.sample(engine, STAGE.sampler(TOKENIZER, 16), asked, [0], args)
    assert answer.tokens == tokens and not answer.truncated
    assert answer.reward == (0 if marker else 1.2) and answer.right == answer.well_formed == (not marker)
    held_out = grpo.evaluate(engine, STAGE.sampler(TOKENIZER, 16), asked.problems)[1]
    assert held_out == {"exact_match": not marker, "well_formed": not marker}


def test_answers_do_not_depend_on_the_process_that_gives_them(folder, tmp_path):
    """Two processes of 4 answers, one of 8, one of 2 x 4: the same answers at the same places of the run."""
    args, run, problems, _ = begin(folder, tmp_path)
    rollout, found = STAGE.sampler(run.tokenizer, 16), []
    for size, batch_size, accumulation in ((1, 8, 1), (2, 4, 1), (1, 4, 2), (4, 1, 2)):
        run = replace(run, batch_size=batch_size, accumulation_steps=accumulation)
        engine, answers = TrainingEngine(run.model, args, WORLD), []
        for rank in range(size):
            plan = Plan(run, problems, World(rank, size, WORLD.device, WORLD.dtype))
            answers += grpo.sample(engine, rollout, problems, grpo.step_indices(plan, 3), args)
        found.append(sorted((a.index, a.prompt, a.tokens) for a in answers))
        assert [index for index, *_ in found[-1]] == list(range(24, 32))
    assert found[0] == found[1] == found[2] == found[3]
    assert len({tuple(tokens) for _, _, tokens in found[0]}) > 1


def test_a_step_makes_what_was_better_than_its_group_likelier(folder, tmp_path):
    args, run, problems, _ = begin(folder, tmp_path, "--kl", 0, "--learning_rate", 1e-4)
    engine = TrainingEngine(run.model.train(), args, WORLD)
    answers = grpo.sample(engine, STAGE.sampler(run.tokenizer, 16), problems, list(range(32)), args)
    assert grpo.compare(answers, 8, WORLD)["learning_groups"] > 0
    batches = grpo.deal(answers, 16, 2, WORLD.device)
    grpo.add_log_probs(engine, batches, None, args)
    for _ in range(args.inner_steps):
        take_step(engine, batches, grpo.policy_loss(args), 1.0, 0)
    with torch.no_grad():
        gains = [grpo.log_probs(run.model, b, args.temperature)[1] - b["old"] for b in batches]
    changes = [(b["advantage"] * gain.sum(1)).sum().item() for b, gain in zip(batches, gains)]
    assert sum(changes) > 0.1


# --------------------------------------------------------------------------------------------------------------- a run
def numbers_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_says_what_it_did(folder, tmp_path):
    more = ["--max_steps", 5, "--eval_interval", 2, "--val_path", folder / "questions.jsonl"]
    result = main(folder, tmp_path, *more)
    assert result["stage"] == "grpo" and result["steps"] == 5 and result["heldout_questions"] == 81
    low, high = result["exact_match_gain_interval"]
    assert low <= result["exact_match_after"] - result["exact_match_before"] <= high
    assert 0 < result["learned_token_share"] < result["real_token_share"] <= 1
    log = numbers_of(tmp_path / "grpo_32.jsonl")
    assert log[0]["step"] == 0 and log[0]["exact_match"] == result["exact_match_before"]
    assert [r["step"] for r in log if "exact_match" in r] == [0, 2, 4, 5]
    steps = [r for r in log if "reward" in r]
    wanted = {"reward", "well_formed", "right", "truncated", "length", "learning_groups", "kl", "clip_share", "loss"}
    assert len(steps) == 5 and wanted <= steps[0].keys()
    for r in steps:
        assert r["reward"] == pytest.approx(r["right"] + 0.2 * r["well_formed"])
    examples = numbers_of(tmp_path / "grpo_32_samples.jsonl")
    assert [(r["step"], r["prompt"]) for r in examples[::8]] == [(r["step"], r["prompt"]) for r in examples[7::8]]
    assert [r["step"] for r in examples[::8]] == [1, 2, 4] and examples[0]["prompt"]
    assert all(r["reward"] == reward(r["text"], r["answer"], 0.2) or r["reward"] == 0 for r in examples)
    assert load_model(result["weights"])[2]["recipe"]["group"] == 8
    assert main(folder, tmp_path, *more, "--resume") == result


class Killed(Exception):
    pass


def test_a_run_that_dies_amid_a_step_goes_on_as_if_nothing_had_happened(folder, tmp_path):
    def go(out, *more, dies_at=None):
        args = parse(STAGE.parser(), [*grpo_flags(folder, 6), "--out_dir", str(out), *more])
        STAGE.check(args)
        run = prepare(args, before=("reason",), required=True)
        problems, held_out = load_problems(run.data_files, run.tokenizer, args)
        run = bound_to_its_start(run.using(**fingerprints(problems, held_out)))
        rollout, calls = STAGE.sampler(run.tokenizer, 16), []

        def dying(*arguments):
            calls.append(1)
            if len(calls) == dies_at:
                raise Killed
            return rollout(*arguments)

        reference = frozen_copy(starting_model(run))
        return grpo.train(run, problems, held_out, reference, dying, WORLD)

    whole = go(tmp_path / "whole")
    with pytest.raises(Killed):  # greedy answers, then a step a call; the one at 4 was saved
        go(tmp_path / "broken", dies_at=6)
    again = go(tmp_path / "broken", "--resume")
    one, two = (torch.load(tmp_path / d / "grpo_32.pth", weights_only=True)["model"] for d in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    base = load_model(folder / "reason_32.pth")[0].state_dict()
    assert any(not torch.equal(one[name], base[name]) for name in one)
    for name in ("grpo_32.jsonl", "grpo_32_samples.jsonl"):
        assert history(tmp_path / "whole" / name) == history(tmp_path / "broken" / name)
    drop = ("seconds", "tokens_per_second", "peak_memory_bytes", "weights")
    assert {k: v for k, v in whole.items() if k not in drop} == {k: v for k, v in again.items() if k not in drop}


def test_a_resumed_run_must_be_the_same_run(folder, tmp_path):
    main(folder, tmp_path, "--max_steps", 1)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"question": str(i), "answer": i}) + "\n" for i in range(20)))
    with pytest.raises(UserError) as caught:
        main(folder, tmp_path, "--max_steps", 1, "--resume", "--data_path", other, "--kl", 0.5, "--seed", 7)
    message = str(caught.value)
    assert all(part in message for part in ("questions was", "kl was 0.01, is now 0.5", "seed was 42, is now 7"))
    with pytest.raises(UserError, match="held_out was"):  # what was right before training is compared with it
        main(folder, tmp_path, "--max_steps", 1, "--resume", "--val_path", other)


# ---------------------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow  # trl takes longer to import than to run
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_loss_is_trls(kl, folder, tmp_path):
    """trl's trainer on the same tokens, ratios, advantages and reference: the loss, KL and clip share of ours."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    args = begin(folder, tmp_path, "--clip", 0.05, "--kl", kl, "--temperature", 0.8)[0]
    _, numbers, (model, reference, (batch,)) = gradients(args, False, 8, 1)
    answers = sorted(some_answers(), key=len)

    def padded(rows, left=False):
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, True, padding_side="left" if left else "right")

    def of_answers(values):
        return padded([row[len(a.prompt) - 1 : len(a) - 1].tolist() for row, a in zip(values, answers)])

    inputs = {
        "prompt_ids": padded([a.prompt for a in answers], left=True),
        "prompt_mask": padded([[1] * len(a.prompt) for a in answers], left=True),
        "completion_ids": padded([a.tokens for a in answers]),
        "completion_mask": padded([[1] * len(a.tokens) for a in answers]),
        "advantages": batch["advantage"], "old_per_token_logps": of_answers(batch["old"]),
        "ref_per_token_logps": of_answers(batch["reference"]),
    }  # fmt: skip
    config = trl.GRPOConfig(
        tmp_path / "trl", beta=0.0, epsilon=0.05, loss_type="bnpo", temperature=0.8,
        use_bias_correction_kl=False,  # the paper's KL, not multiplied by the ratio
        num_generations=8, use_cpu=True,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, bf16=False, report_to="none",
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"prompt": ["a"] * 8})
    trainer = trl.GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=data,
                              processing_class=load_tokenizer())  # fmt: skip
    trainer.beta, trainer.current_gradient_accumulation_steps = kl, 1  # after the start: it would fetch a reference
    model.train()
    theirs = trainer._compute_loss(model, inputs)
    assert numbers["loss"] == pytest.approx(theirs.item(), abs=1e-6, rel=1e-5)
    metrics = trainer._metrics["train"]
    assert numbers["clip_share"] == pytest.approx(metrics["clip_ratio/region_mean"][0]) and numbers["clip_share"] > 0
    if kl:
        assert numbers["kl"] == pytest.approx(metrics["kl"][0], rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_answers(folder, tmp_path):
    flags = [*grpo_flags(folder, 4), "--out_dir"]
    one = run(STAGES["grpo"], *flags, tmp_path / "one")
    assert one.returncode == 0, one.stderr
    torchrun = [command("x")[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = [tmp_path / "two", "--batch_size", "4"]
    two = subprocess.run([*torchrun, *command(STAGES["grpo"], *flags, *more)[1:]], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)  # fmt: skip
    assert two.returncode == 0, two.stderr
    logs = [history(tmp_path / d / "grpo_32.pth") for d in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 6
    for mine, others in zip(*logs):
        assert mine.keys() == others.keys()
        for name, value in mine.items():
            assert others[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
