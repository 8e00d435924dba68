"""--sample_prompts: the texts of each validation, written once; the run learns what it would have learned without."""

import json

import pytest
import torch
from stage import STAGES, chat_weights, history, load, run_flags, weights_of, with_loss, write_prompts

from common.errors import RunFailed, UserError
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.weights import load_model


def samples(weights) -> list[dict]:
    path = weights.with_name(f"{weights.stem}_samples.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(stage, folder, out, *more):
    """A short run with dropout -> its weights file."""
    script = load(STAGES[stage])
    script.main([*run_flags(stage, folder, steps=6), "--out_dir", str(folder / out), *map(str, more)])
    return folder / out / weights_of(stage)


FAST = ("pretrain", "lora")  # a base model and an adapter; the other stages run the same lines
OTHERS = [pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES if stage not in (*FAST, "grpo")]


@pytest.mark.parametrize("stage", [*FAST, *OTHERS])
def test_a_run_with_samples_learns_what_it_learns_without(stage, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.txt")
    plain, watched = run(stage, tmp_path, "plain"), run(stage, tmp_path, "watched", "--sample_prompts", prompts)
    one, two = (torch.load(path, weights_only=True)["model"] for path in (plain, watched))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert history(plain) == history(watched)
    found = samples(watched)
    assert [(row["step"], row["prompt"]) for row in found] == [(s, p) for s in (5, 6) for p in ("春天", "第3篇")]
    model, tokenizer, _ = load_model(watched)
    prompt = "春天" if stage == "pretrain" else [{"role": "user", "content": "春天"}]
    answer = Engine(model, tokenizer).generate([prompt], SamplingParams(temperature=0, max_tokens=64))[0]
    ended = answer.finish_reason == "stop"
    assert found[2]["text"] == tokenizer.decode(answer.token_ids[:-1] if ended else answer.token_ids)
    assert not plain.with_name(f"{plain.stem}_samples.jsonl").exists()


@pytest.mark.slow
def test_grpo_writes_samples_at_each_of_its_validations(tmp_path):
    plain = run("grpo", tmp_path, "plain")
    watched = run("grpo", tmp_path, "watched", "--sample_prompts", write_prompts(tmp_path / "p.txt"))
    one, two = (torch.load(path, weights_only=True)["model"] for path in (plain, watched))
    assert all(torch.equal(one[name], two[name]) for name in one) and history(plain) == history(watched)
    assert [row["step"] for row in samples(watched) if "reward" not in row] == [0, 0, 5, 5, 6, 6]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    more = ["--sample_prompts", write_prompts(tmp_path / "p.txt"), "--eval_interval", "1"]
    whole = run("pretrain", tmp_path, "whole", *more)

    def dies(loss_fn):
        calls = []

        def dying(model, batch):
            calls.append(model.training)
            if sum(calls) == 11:  # two micro-batches a step: in the sixth, and the last save was at the fourth
                raise MemoryError("of the test")
            return loss_fn(model, batch)

        return dying

    flags = [*run_flags("pretrain", tmp_path, steps=6), *map(str, more), "--out_dir", str(tmp_path / "broken")]
    with pytest.raises(RunFailed, match="of the test|out of memory"):
        with_loss(load(STAGES["pretrain"]), dies).main(flags)
    broken = tmp_path / "broken" / "pretrain_32.pth"
    assert [row["step"] for row in samples(broken)][-1] == 5
    with open(broken.with_name("pretrain_32_samples.jsonl"), "ab") as file:
        file.write(b'{"step": 5, "prom')  # a crash in the middle of a line
    load(STAGES["pretrain"]).main([*flags, "--resume"])
    assert samples(broken) == samples(whole)
    assert [row["step"] for row in samples(whole)] == [s for s in range(1, 7) for _ in range(2)]


def test_a_run_that_starts_anew_leaves_no_samples_of_the_one_before(tmp_path):
    weights = run("pretrain", tmp_path, "o", "--sample_prompts", write_prompts(tmp_path / "p.txt"))
    assert samples(weights)
    run("pretrain", tmp_path, "o", "--overwrite")
    assert not weights.with_name("pretrain_32_samples.jsonl").exists()


@pytest.mark.parametrize("content, words", [
    (None, "cannot read .*p.txt: No such file"), (b"\n \n", "p.txt is empty; write one prompt a line"),
    (b"\xff\xfe", "p.txt is not UTF-8"), ("好\n".encode() + "好" .encode() * 1000, "p.txt:2 is longer than half of"),
])  # fmt: skip
def test_prompts_that_cannot_be_used_are_refused_before_anything_is_written(content, words, tmp_path):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    base = chat_weights(tmp_path / "base", max_seq_len=512)
    flags = [*run_flags("full_sft", tmp_path), "--sample_prompts", str(tmp_path / "p.txt")]
    flags += ["--from_weight", str(base), "--out_dir", str(tmp_path / "o")]
    with pytest.raises(UserError, match=words):
        load(STAGES["full_sft"]).main(flags)
    assert not (tmp_path / "o" / "full_sft_32.pth").exists() and not list(tmp_path.glob("o/*_run.json"))
