"""W&B and TensorBoard get the numbers of the log file, need no network, and stop no run."""

import json
import signal
import struct
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from stage import TINY, last_json, load, run, write_texts

from common.errors import UserError
from trainer import loop
from trainer.log import Log
from trainer.stage_flags import parse, stage_parser
from trainer.world import World

FLAGS = [*TINY, "--max_steps", "6", "--save_interval", "2", "--eval_interval", "3", "--val_split", "0.1"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A machine that knows no key of W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def records(path):
    """The records of a .wandb file: 7 bytes, then LevelDB's log format, whose records may be cut at blocks of 32 KB."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for a header: padding
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            yield record
            record = b""


def told_to_wandb(folder) -> dict[int, dict]:
    """{step: numbers} as the run directory has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for record in map(Record.FromString, records(next(folder.glob("run-*.wandb")))):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = items.pop("_step", record.history.step.num)
            found[step] = {key: value for key, value in items.items() if key[0] != "_"}
    return found


def told_to_tensorboard(folder) -> dict[int, dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, found = EventAccumulator(str(folder), size_guidance={"scalars": 0}), {}
    events.Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.setdefault(event.step, {}), "told twice"
            found[event.step][name] = event.value
    return found


def test_both_get_what_the_log_has_also_over_a_stop(offline, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    out, factor = tmp_path / "out", loop.learning_rate_factor
    flags = [*FLAGS, "--data_path", str(write_texts(tmp_path / "t.jsonl")), "--out_dir", str(out), "--use_wandb",
             "--use_tensorboard", "--wandb_project", "p"]  # fmt: skip

    def ctrl_c_in_the_fourth_step(step, *rest):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return factor(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_factor", ctrl_c_in_the_fourth_step)
    with pytest.raises(SystemExit):
        load("1-pretrain.py").main(flags)
    monkeypatch.setattr(loop, "learning_rate_factor", factor)
    said = capsys.readouterr().out
    assert said.count("wandb: offline (no key)") == 1 and said.count("wandb") == 3  # its folder, and how to send it
    load("1-pretrain.py").main([*flags, "--resume"])

    expected = {}
    for record in map(json.loads, (out / "pretrain_32.jsonl").read_text().splitlines()):
        step = expected.setdefault(record.pop("step"), {})
        step.update({name: value for name, value in record.items() if value is not None})
    assert sorted(expected) == list(range(1, 7))
    folders = sorted((out / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # one id
    wandb = [told_to_wandb(folder) for folder in folders]
    assert sorted(wandb[0]) == [1, 2, 3, 4] and sorted(wandb[1]) == [5, 6]
    assert wandb[0] | wandb[1] == expected
    events = told_to_tensorboard(out / "tensorboard" / "pretrain_32")
    assert events.keys() == expected.keys()
    for step, numbers in expected.items():
        assert events[step] == pytest.approx(numbers, rel=1e-6)


def test_a_killed_run_tells_no_step_twice(tmp_path):
    """Steps told before the crash but after the last save are told again, and the first telling is dropped."""
    pytest.importorskip("tensorboard")
    from trainer.tracking import TensorBoard

    class Files:
        folder, name = tmp_path, "x"

    for start, last, factor in ((0, 5, 1.0), (2, 6, 10.0)):
        board = TensorBoard(Files, start)
        for step in range(start + 1, last + 1):
            board.log(step, {"loss": factor * step})
        board.close()
        time.sleep(1.1)  # event files are ordered by the second in their names
    events = told_to_tensorboard(tmp_path / "tensorboard" / "x")
    assert {step: numbers["loss"] for step, numbers in events.items()} == {1: 1, 2: 2, 3: 30, 4: 40, 5: 50, 6: 60}


@pytest.mark.parametrize("fails_in", ["log", "close"])
def test_a_service_that_fails_stops_no_run_and_all_is_saved_before_it_is_waited_for(
    fails_in, tmp_path, monkeypatch, capsys
):
    calls, weights = [], tmp_path / "out" / "pretrain_32.pth"

    class Failing:
        def log(self, step, numbers):
            calls.append(step)
            if fails_in == "log":
                raise ConnectionError("gone")

        def close(self):
            calls.append(weights.exists())
            raise ConnectionError("gone")

    monkeypatch.setattr(loop, "trackers", lambda *_: [Failing()])
    flags = [*FLAGS, "--data_path", str(write_texts(tmp_path / "t.jsonl")), "--out_dir", str(tmp_path / "out")]
    assert load("1-pretrain.py").main(flags)["steps"] == 6
    assert calls == ([1] if fails_in == "log" else [1, 2, 3, 3, 4, 5, 6, 6, True])
    assert capsys.readouterr().err.count("warning: Failing is told no more: ConnectionError('gone')") == 1


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_said_before_any_work(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--use_{package} needs the package {package}: pip install {package}"):
        parse(stage_parser("pretrain", ""), [f"--use_{package}"])


@pytest.mark.slow
def test_a_key_without_a_network_stops_no_run(offline, tmp_path):
    pytest.importorskip("wandb")
    flags = [*FLAGS, "--data_path", write_texts(tmp_path / "t.jsonl"), "--out_dir", tmp_path / "out", "--use_wandb"]
    nowhere = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    begin = time.monotonic()
    done = run("1-pretrain.py", *flags, env=nowhere)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["steps"] == 6 and time.monotonic() - begin < 120
    assert done.stdout.count("wandb: offline (") == 1
    assert len(told_to_wandb(next((tmp_path / "out" / "wandb").glob("offline-run-*")))) == 6


def test_the_time_left_is_told_by_the_steps_that_the_clock_saw(tmp_path, monkeypatch, capsys):
    world, now = World(0, 1, torch.device("cpu"), torch.float32), [0.0]
    log = Log(SimpleNamespace(log=tmp_path / "a.jsonl"), world, 40, 1.0, log_interval=10, start_step=7)  # resumed
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log.clock = 0.0
    for step in range(8, 31):
        now[0] += 2
        log.step(step, 100, lr=1e-3, loss=1.0)
        if step == 25:
            now[0] += 1000
            log.validation(step, val_loss=1.0)
    log.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert [line.split("left ")[1] for line in lines] == ["01:00", "00:40", "00:20"]
    assert all(" 50 tok/s" in line for line in lines)
