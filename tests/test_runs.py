"""Runs found in a folder: how far they are, how they ended, what differs, and which files are none; logs that grow."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from stage import STAGES, Forked, load, run_flags, with_loss, write_prompts

from common.errors import RunFailed, UserError
from common.files import is_locked, lock
from inspection.run_log import RunLog, read_samples
from inspection.runs import NOTE, SAMPLES, TrainingRun, differences, find_runs, lock_of, open_run
from trainer.setup import prepare
from trainer.stage_flags import parse, stage_parser

ROWS = [
    {"step": 1, "tokens": 100, "seconds": 2.0, "lr": 0.1, "loss": 5.0, "grad_norm": 1.0},
    {"step": 2, "tokens": 50, "seconds": 3.0, "lr": 0.2, "loss": 4.0, "grad_norm": 2.0},
    {"step": 2, "val_loss": 4.5, "val_bits_per_byte": None},
    {"step": 3, "tokens": 60, "seconds": 3.5, "lr": 0.1, "loss": 3.0, "grad_norm": 3.0},
]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def log(tmp_path):
    (tmp_path / "x_32.jsonl").write_text(lines(ROWS))
    return RunLog(tmp_path / "x_32.jsonl").read()


# ---------------------------------------------------------------------------------------------------------------- logs
def test_series_by_step_tokens_and_seconds(log):
    loss, validated = log.series("loss"), log.series("val_loss")
    assert loss.step.tolist() == [1, 2, 3] and loss.value.tolist() == [5, 4, 3]
    assert loss.tokens.tolist() == [100, 150, 210] and loss.seconds.tolist() == [2, 3, 3.5]
    assert (validated.step[0], validated.tokens[0], validated.seconds[0], validated.value[0]) == (2, 150, 3, 4.5)
    assert log.series("tokens_per_second").value.tolist() == [50, 120]
    assert log.names() == ["lr", "loss", "grad_norm", "val_loss", "tokens_per_second"]
    assert log.step == 3 and log.seconds_left(9) == pytest.approx(6 * 0.75) and log.seconds_left(None) is None
    with pytest.raises(UserError, match="x_32.jsonl holds no reward; it holds lr, loss"):
        log.series("reward")


def test_a_log_that_grows_is_read_on_and_half_a_line_is_no_fault(log):
    line = lines([{"step": 4, "tokens": 1, "seconds": 4.0, "loss": 2.0}])
    for part, steps in ((line[:20], 3), (line[20:-1], 3), (line[-1:], 4)):
        with open(log.path, "a") as file:
            file.write(part)
        assert log.read().step == steps and not log.faults
    assert log.rows == RunLog(log.path).read().rows


def test_a_log_that_was_cut_is_read_anew(log):
    """A resumed run takes its last steps again: other lines stand where others were read, and perhaps more of them."""
    again = [{"step": 3, "tokens": 61, "seconds": 9.0, "loss": 3.1}, {"step": 4, "tokens": 1, "loss": 1.0}]
    log.path.write_text(lines([*ROWS[:3], *again, *again[1:] * 5]))
    assert log.read().rows[3:5] == again
    log.path.write_text("")
    assert log.read().rows == [] and log.step == 0


def test_lines_that_are_none_are_named(log):
    with open(log.path, "ab") as file:
        file.write(
            b'{"step": 4\n\xff\xfe\n{"step": "5", "loss": 1}\n[4]\n' + b"[" * 100_000 + b"\n" + lines(ROWS[3:]).encode()
        )
    log.read()
    assert len(log.faults) == 5 and log.faults[0] == f"{log.path}:5: not a line of a training log"
    assert log.series("loss").value.tolist() == [5, 4, 3, 3]


def test_a_log_of_before_times_were_kept(tmp_path):
    shutil.copytree(Path(__file__).parent / "files", tmp_path / "out")
    found = find_runs(tmp_path / "out")
    (run,) = found.runs
    assert run.name == "pretrain_32" and run.stage == "pretrain" and run.steps == 12 and run.log.step == 7
    assert (run.status, run.resume) == ("stopped", "") and "not known" in run.why
    assert run.settings["config.dim"] == 32 and run.settings["max_steps"] == 12
    assert np.isnan(run.log.series("loss").seconds).all() and "tokens_per_second" not in run.log.names()
    assert [(path.name, why) for path, why in found.others] == [("texts.jsonl", "is not the log of a training run")]


# ---------------------------------------------------------------------------------------------------------------- runs
def main(folder, out, *more, wrap=None, stage="pretrain"):
    script = load(STAGES[stage])
    script = with_loss(script, wrap) if wrap else script
    return script.main([*run_flags(stage, folder, steps=6), "--out_dir", str(out), *map(str, more)])


def test_a_run_from_its_beginning_to_its_end(tmp_path):
    out, seen = tmp_path / "out", []

    def looked_at(loss_fn):
        def looking(model, batch):
            seen.append(open_run(out / "pretrain_32.jsonl"))
            return loss_fn(model, batch)

        return looking

    result = main(tmp_path, out, "--sample_prompts", write_prompts(tmp_path / "p.txt"), wrap=looked_at)
    assert seen[0].log.rows == [] and seen[0].steps == 6 and seen[0].stage == "pretrain"
    assert seen[0].resume.endswith(" --resume") and seen[0].folder
    (run,) = find_runs(out).runs  # its samples are no run
    assert (run.status, run.why, run.faults, run.resume) == ("finished", "", [], "")
    assert run.result == json.loads(json.dumps(result)) and run.log.step == 6
    assert run.log.series("loss").value[-1] == result["loss"]
    seconds = run.log.series("loss").seconds
    assert (np.diff(seconds) > 0).all() and 0 < seconds[-1] <= result["seconds"]
    assert run.log.series("tokens_per_second").value.min() > 0
    again = find_runs(out, before=find_runs(out)).runs[0]
    assert again.log.rows == run.log.rows and again.status == "finished"
    samples = read_samples(run.beside("_samples.jsonl"))
    assert [(s.step, s.prompt) for s in samples] == [(s, p) for s in (5, 6) for p in ("春天", "第3篇")]


def test_a_failed_run_says_why_and_how_to_go_on(tmp_path):
    def breaks(loss_fn):
        calls = []

        def broken(model, batch):
            calls.append(1)
            loss, *rest = loss_fn(model, batch)
            return loss * (float("nan") if len(calls) > 8 else 1), *rest

        return broken

    with pytest.raises(RunFailed):
        main(tmp_path, tmp_path / "out", wrap=breaks)
    (run,) = find_runs(tmp_path / "out").runs
    assert run.status == "failed" and run.why.startswith("the loss is nan at step") and run.resume
    assert run.result == {}
    main(tmp_path, tmp_path / "out", "--resume")
    assert find_runs(tmp_path / "out").runs[0].status == "finished"


def test_a_run_at_work_one_that_is_told_to_stop_and_one_that_is_killed(tmp_path):
    run_flags("pretrain", tmp_path)  # its data
    for how, status, why in ((signal.SIGTERM, "stopped", "SIGTERM"), (signal.SIGKILL, "lost", "killed, or")):
        out = tmp_path / status
        flags = [*run_flags("pretrain", tmp_path, steps=100_000), "--out_dir", out]
        process = Forked(STAGES["pretrain"], flags, tmp_path / "log.txt")
        log, until = out / "pretrain_32.jsonl", time.monotonic() + 60
        while not (log.exists() and RunLog(log).read().step > 2) and time.monotonic() < until:
            time.sleep(0.02)
        (run,) = find_runs(out).runs
        assert run.status == "running" and run.steps == 100_000 and run.log.seconds_left(run.steps) > 0
        os.kill(process.pid, how)
        process.wait()
        (run,) = find_runs(out).runs
        assert run.status == status and why in run.why and run.resume.endswith("--resume")


def test_what_differs_between_runs(tmp_path):
    main(tmp_path, tmp_path / "out")
    main(tmp_path, tmp_path / "out", "--save_weight", "other", "--learning_rate", "0.002", "--qk_norm")
    runs = find_runs(tmp_path / "out").runs
    assert [run.name for run in runs] == ["other_32", "pretrain_32"]  # the newest first
    assert differences(runs) == {"learning_rate": [0.002, 0.004], "config.qk_norm": [True, False]}


def test_files_that_are_bad_or_of_others_are_named_and_nothing_falls(tmp_path):
    out = tmp_path / "out"
    main(tmp_path, out)
    (out / "answers.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    (out / "empty.jsonl").touch()
    (out / "binary.jsonl").write_bytes(bytes(range(256)) * 1000)
    (out / "folder.jsonl").mkdir()
    (out / "nowhere.jsonl").symlink_to("gone")
    (out / "lora").mkdir()
    (out / "lora" / "x_32.jsonl").write_text(lines(ROWS))
    (out / "lora" / "x_32.pth").write_bytes(b"no weights")
    (out / "lora" / "y_32.jsonl").write_text(lines(ROWS))
    (out / "lora" / "y_32_run.json").write_text("[1]")
    found = find_runs(out)
    assert sorted(path.name for path, _ in found.others) == [
        "answers.jsonl", "binary.jsonl", "empty.jsonl", "folder.jsonl", "nowhere.jsonl"
    ]  # fmt: skip
    runs = {run.name: run for run in found.runs}
    assert sorted(runs) == ["pretrain_32", "x_32", "y_32"] and runs["x_32"].log.step == 3
    assert "x_32.pth cannot be read as weights" in runs["x_32"].faults[0]
    assert runs["y_32"].faults == [f"{out}/lora/y_32_run.json is not what a run says of itself"]
    (out / "pretrain_32_run.json").write_text("{")
    (run,) = (run for run in find_runs(out).runs if run.name == "pretrain_32")
    assert run.status == "finished" and run.stage == "pretrain" and len(run.faults) == 1  # by its weights
    with pytest.raises(UserError, match="no folder .*nowhere"):
        find_runs(tmp_path / "nowhere")


def test_a_look_at_a_lock_does_not_take_it(tmp_path):
    assert not is_locked(tmp_path / "none")
    path = tmp_path / "lock"
    path.touch()
    assert not is_locked(path)
    lock(path, "taken").close()


def test_a_dry_run_and_a_finished_one_write_no_note(tmp_path):
    main(tmp_path, tmp_path / "out", "--dry_run")
    assert not list(tmp_path.glob("out/*_run.json"))
    main(tmp_path, tmp_path / "out")
    before = (tmp_path / "out" / "pretrain_32_run.json").read_bytes()
    main(tmp_path, tmp_path / "out", "--resume")
    assert (tmp_path / "out" / "pretrain_32_run.json").read_bytes() == before


def test_the_names_of_files_are_the_trainers(tmp_path):
    data = tmp_path / "t.jsonl"
    data.write_text('{"text": "x"}\n')
    flags = ["--preset", "tiny", "--device", "cpu", "--data_path", str(data), "--out_dir", str(tmp_path / "o")]
    files = prepare(parse(stage_parser("pretrain", "", from_weight="none"), flags)).files
    run = TrainingRun(files.name, RunLog(files.log))
    assert run.beside(NOTE) == files.about and run.beside(SAMPLES) == files.samples
    assert run.beside("_resume.pth") == files.state and lock_of(files.log).exists()
