"""The loop: what a step learns does not depend on how it was dealt out, and is what transformers learns."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from stage import (
    TINY,
    after_a_save,
    catch_gradients,
    command,
    history,
    last_json,
    load,
    popen,
    run,
    run_flags,
    weights_of,
    write_chats,
    write_texts,
)
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import RunFailed, UserError
from data.rows import load_rows
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import load_model
from trainer.announce import resume_command
from trainer.checkpoint import Files
from trainer.engine import TrainingEngine
from trainer.loop import check_alike, language_model, take_step, train
from trainer.plan import Plan, SaveTimes, StopSignals
from trainer.setup import prepare
from trainer.stage_flags import parse, stage_parser
from trainer.world import World

WORLD = World(0, 1, torch.device("cpu"), torch.float32)


def make_run(tmp_path, *flags, kind="text"):
    file = (write_texts if kind == "text" else write_chats)(tmp_path / f"{kind}.jsonl")
    argv = [*TINY, "--data_path", file, "--out_dir", tmp_path / "out", "--max_steps", 6, "--overwrite", *flags]
    args = parse(stage_parser("pretrain", "", from_weight="none"), list(map(str, argv)))
    run = prepare(args)
    return run, load_rows(kind, run.data_files, run.tokenizer, args, WORLD)


def gradients_of_a_step(run, rows, batch_size, accumulation, size=1):
    """Gradients of step 0 as left before the optimizer moves, summed over the micro-batches of `size` processes."""
    run = replace(run, batch_size=batch_size, accumulation_steps=accumulation)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(run.model.config)
    engine = TrainingEngine(model, run.args, WORLD)
    caught = catch_gradients(engine)
    plans = [Plan(run, rows[0], World(r, size, WORLD.device, WORLD.dtype)) for r in range(size)]
    micro = [rows[0].batch(plan.rows(0, i)) for plan in plans for i in range(accumulation)]
    numbers, tokens = take_step(engine, micro, language_model, 1.0, 0)
    return caught, numbers, tokens


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_gradients_do_not_depend_on_how_a_step_is_dealt_out(kind, use_moe, tmp_path):
    run, rows = make_run(tmp_path, "--use_moe", str(use_moe), kind=kind)
    expected, numbers, tokens = gradients_of_a_step(run, rows, 8, 1)
    for batch_size, accumulation, size in ((4, 2, 1), (1, 8, 1), (2, 2, 2)):
        found, other, n = gradients_of_a_step(run, rows, batch_size, accumulation, size)
        assert n == tokens and other["loss"] == pytest.approx(numbers["loss"], rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-7, msg=name)
    assert ("balance" in numbers) == use_moe


def test_ten_losses_equal_those_of_transformers_trained_the_same_way(tmp_path):
    """LlamaForCausalLM, torch's AdamW, one document a row with an ordinary mask: the same ten losses."""
    run, rows = make_run(tmp_path, "--learning_rate", "3e-3", "--max_steps", "10")
    args, config = run.args, run.model.config
    llama = LlamaForCausalLM(LlamaConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, intermediate_size=config.hidden_dim, vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=True, rope_parameters=dict(config.rope_parameters),
    )).train()  # fmt: skip
    llama.load_state_dict(run.model.state_dict())
    matrices = [p for p in llama.parameters() if p.ndim >= 2]
    vectors = [p for p in llama.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.learning_rate, betas=(0.9, 0.95))  # fmt: skip
    engine, plan = TrainingEngine(run.model, args, WORLD), Plan(run, rows[0], WORLD)
    for step in range(10):
        micro = [rows[0].batch(plan.rows(step, i)) for i in range(args.accumulation_steps)]
        ours, _ = take_step(engine, micro, language_model, 1.0, step)
        nats, count = 0.0, 0
        for batch in micro:
            for ids, labels, segments in zip(batch["input_ids"], batch["labels"], batch["segment_ids"]):
                for segment in range(1, int(segments.max()) + 1):
                    where = segments == segment
                    logits = llama(ids[where][None]).logits[0, :-1]
                    targets = labels[where][1:]
                    nats = nats + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                    count += int((targets != -100).sum())
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), args.grad_clip)
        reference.step()
        reference.zero_grad()
        assert ours["loss"] == pytest.approx(nats.item() / count, rel=1e-4), step


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_learned_by_heart(optimizer, tmp_path):
    run, rows = make_run(tmp_path, "--optimizer", optimizer, "--learning_rate", "5e-3", "--weight_decay", "0")
    engine = TrainingEngine(run.model, run.args, WORLD)
    batch = rows[0].batch(range(2))
    for step in range(150):
        numbers, _ = take_step(engine, [dict(batch)], language_model, 1.0, step)
        if numbers["loss"] < 0.05:
            return
    pytest.fail(f"loss {numbers['loss']:.3f} after {step + 1} steps")


def test_nothing_to_learn_in_a_step_is_said_and_harmless(tmp_path, capsys):
    run, rows = make_run(tmp_path)
    engine = TrainingEngine(run.model, run.args, WORLD)
    before = [p.clone() for p in engine.module.parameters()]
    assert take_step(engine, [rows[0].batch([-1, -1])], language_model, 1.0, 4)[0] == {}
    assert "step 5 has nothing to learn" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters()))


def test_a_nan_stops_before_the_weights_are_touched(tmp_path):
    run, rows = make_run(tmp_path)
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    engine = TrainingEngine(run.model, run.args, WORLD)
    before = [p.clone() for p in engine.module.parameters()]
    with pytest.raises(RunFailed, match="loss is nan at step 3"):
        take_step(engine, [rows[0].batch(range(2))], language_model, 1.0, 2)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, engine.module.parameters()))


def test_the_plan_covers_each_row_once_for_any_number_of_processes(tmp_path):
    run, rows = make_run(tmp_path)
    run.args.max_steps, run.args.epochs = None, 2.0
    for size, batch_size, accumulation in ((1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1)):
        run = replace(run, batch_size=batch_size, accumulation_steps=accumulation)
        plans = [Plan(run, rows[0], World(r, size, WORLD.device, WORLD.dtype)) for r in range(size)]
        steps = [[r for p in plans for i in range(accumulation) for r in p.rows(s, i)] for s in range(plans[0].steps)]
        seen = [r for step in steps for r in step if r >= 0]
        assert sorted(seen) == list(range(2 * len(rows[0])))
        assert [sorted(step) for step in steps[:-1]] == [list(range(4 * s, 4 * s + 4)) for s in range(len(steps) - 1)]


# ------------------------------------------------------------------------------------------------------- when to save
@pytest.mark.parametrize(
    ("steps", "minutes", "saved_at"),
    [(4, 0, [4, 8]), (100, 1, [3, 6, 9]), (4, 1, [3, 4, 7, 8]), (100, 0, [])],
    ids=["by steps", "by the clock", "by both, the clock running from the last save", "neither"],
)
def test_a_run_is_saved_by_steps_and_by_the_clock(monkeypatch, steps, minutes, saved_at):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saves, due = SaveTimes(Namespace(save_interval=steps, save_minutes=minutes)), []
    for step in range(1, 10):
        clock[0] += 20
        due += [step] * saves.due(step, saves.overdue())
    assert due == saved_at


def test_all_processes_save_where_one_is_overdue():
    saves = SaveTimes(Namespace(save_interval=100, save_minutes=60))
    assert not saves.overdue() and not saves.due(3, overdue=0.0)
    assert saves.due(3, overdue=1.0)


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_slow_steps_are_saved_each(tmp_path, monkeypatch, stage):
    script = load({"pretrain": "1-pretrain.py", "grpo": "train_grpo.py"}[stage])
    flags = [*run_flags(stage, tmp_path, steps=4), "--save_interval", "100", "--save_minutes", "1e-9"]
    saved = []
    monkeypatch.setattr(Files, "save", lambda self, engine, tokenizer, record, step, counters: saved.append(step))
    script.main([*flags, "--out_dir", str(tmp_path / "out")])
    assert saved == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------- whole runs
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*run_flags("pretrain", tmp_path, steps=150), "--save_interval", 1000, "--out_dir"]
    process = subprocess.Popen(
        command("1-pretrain.py", *flags, broken), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert last_json(out)["stopped"] is True and "to go on: python" in out and "--resume" in out
    step = last_json(out)["steps"]
    assert 3 <= step < 150
    assert run("1-pretrain.py", *flags, broken, "--resume").returncode == 0
    assert run("1-pretrain.py", *flags, whole).returncode == 0
    assert torch.equal(*(load_model(d / "pretrain_32.pth")[0].lm_head.weight for d in (whole, broken)))


@pytest.mark.parametrize(
    ("signals", "left", "stopped"),
    [
        ([signal.SIGINT], [], signal.SIGINT),
        ([signal.SIGINT, signal.SIGTERM], [], signal.SIGINT),  # Ctrl-C under DeepSpeed's launcher
        ([signal.SIGINT, signal.SIGTERM, signal.SIGINT], [130], signal.SIGINT),
        ([signal.SIGTERM, signal.SIGTERM], [143], signal.SIGTERM),
    ],
)
def test_a_second_signal_of_its_kind_ends_at_once(monkeypatch, signals, left, stopped):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop = StopSignals()
    try:
        for number in signals:
            signal.raise_signal(number)
    finally:
        stop.restore()
    assert codes == left and stop.signal == stopped


@pytest.mark.parametrize(
    ("words", "launched", "said"),
    [
        ("x.py --overwrite --seed 1", {}, "python x.py --seed 1 --resume"),
        ("x.py --overwrite 1 --seed 1 --resume 0", {}, "python x.py --seed 1 --resume"),
        ("x.py --resume=0 --use_moe 1 --local_rank=3", {}, "python x.py --use_moe 1 --resume"),
        ("x.py", {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
         "torchrun --nproc_per_node 2 x.py --resume"),
        ("x.py", {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
         "torchrun ... x.py --resume"),
        ("x.py", {"CROSS_SIZE": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, "deepspeed --num_gpus 2 x.py --resume"),
        ("x.py", {"CROSS_SIZE": "2", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, "deepspeed ... x.py --resume"),
    ],
)  # fmt: skip
def test_the_command_to_go_on(monkeypatch, words, launched, said):
    monkeypatch.setattr(sys, "argv", words.split())
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert resume_command() == said


def test_resume_with_another_micro_batch_keeps_the_global_batch(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*run_flags("pretrain", tmp_path), "--dropout", "0", "--out_dir"]
    load("1-pretrain.py").main([*flags, str(whole)])
    process = popen("1-pretrain.py", [*flags, broken], tmp_path / "log.txt")
    after_a_save(process, broken)
    process.kill()
    process.wait()
    again = run("1-pretrain.py", *flags, broken, "--resume", "--batch_size", "4")
    assert again.returncode == 0, again.stderr
    histories = [
        [json.loads(line) for line in (d / "pretrain_32.jsonl").read_text().splitlines()] for d in (whole, broken)
    ]
    for a, b in zip(*histories, strict=True):
        assert a["step"] == b["step"] and a.get("tokens") == b.get("tokens")
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    wrong = run("1-pretrain.py", *flags, broken, "--resume", "--batch_size", "3")
    assert wrong.returncode == 0  # finished: prints its result


def test_a_machine_that_does_not_see_the_saved_state_is_refused():
    """Its process would begin at step 0 and send gradients of other weights."""
    processes = Namespace(gather=lambda mine: [mine, mine | {"saved step": None}])
    with pytest.raises(UserError, match="the processes differ in saved step; .* a disk that all of them share"):
        check_alike(processes, {"seed": 42}, {"step": 4})


def test_dry_run_says_all_and_writes_no_weights(tmp_path, capsys):
    load("1-pretrain.py").main([*run_flags("pretrain", tmp_path), "--out_dir", str(tmp_path / "o"), "--dry_run"])
    out = capsys.readouterr().out
    assert last_json(out)["dry_run"] is True and "parameters" in out and "GB a process (estimate)" in out
    assert not list((tmp_path / "o").glob("*.pth"))


def test_the_tokenizer_and_config_travel_with_the_weights(tmp_path):
    result = load("1-pretrain.py").main([*run_flags("pretrain", tmp_path), "--out_dir", str(tmp_path / "o")])
    model, tokenizer, record = load_model(result["weights"])
    assert isinstance(model.config, LMConfig) and record["result"] == result and record["seq_len"] == 64
    assert tokenizer.get_vocab() == load_tokenizer().get_vocab()
    assert (tmp_path / "o" / "pretrain_32.png").stat().st_size > 1000
    wanted = {"stage", "steps", "tokens", "loss", "val_loss", "val_bits_per_byte", "real_token_share",
              "learned_token_share", "learned_kept_share", "seconds", "tokens_per_second", "peak_memory_bytes",
              "weights"}  # fmt: skip
    assert wanted <= set(result)


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_what_fails_after_the_last_step_loses_nothing(tmp_path, monkeypatch, stage):
    """The last step is saved before the last validation; resumed, the run ends as the one that was not disturbed."""
    script = load({"pretrain": "1-pretrain.py", "grpo": "train_grpo.py"}[stage])
    flags = [*run_flags(stage, tmp_path, steps=4), "--eval_interval", "0", "--save_interval", "100", "--out_dir"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    wanted = script.main([*flags, str(whole)])
    module = sys.modules["trainer.loop" if stage == "pretrain" else "trainer.grpo"]
    calls, evaluate = [], module.evaluate

    def fails_at_the_end(*args):
        calls.append(1)
        if len(calls) == (1 if stage == "pretrain" else 2):  # GRPO validates before its first step too
            raise OSError("the machine caught fire")
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", fails_at_the_end)
        with pytest.raises(OSError, match="fire"):
            script.main([*flags, str(broken)])
    found = script.main([*flags, str(broken), "--resume"])
    for key in ("steps", "tokens", "loss", "val_loss"):
        assert found[key] == wanted[key]
    name = weights_of(stage)
    one, two = (torch.load(d / name, weights_only=True)["model"] for d in (whole, broken))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert history(whole / name) == history(broken / name)


def test_weights_that_a_step_ruined_are_not_saved(tmp_path):
    """A finite gradient, but a rate that overflows float32: the last save stays, and the run says so."""
    flags = [*run_flags("pretrain", tmp_path, steps=3), "--save_interval", "1", "--optimizer", "adamw", "--warmup", "0",
             "--out_dir", tmp_path / "out"]  # fmt: skip
    done = run("1-pretrain.py", *flags, "--learning_rate", "3e38")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not finite" in done.stderr and not (tmp_path / "out" / "pretrain_32.pth").exists()


def test_a_run_that_learned_nothing_has_no_loss(tmp_path):
    """All of its rows are empty: no NaN in the result."""
    run, rows = make_run(tmp_path, "--max_steps", "1")
    rows[0].batch = lambda indices, batch=rows[0].batch: batch([-1] * len(indices))
    result = train(run, rows, WORLD)
    assert result["loss"] is None and "NaN" not in json.dumps(result)
