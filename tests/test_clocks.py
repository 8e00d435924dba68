"""Clocks that jump, by a correction or while a machine sleeps: no wrong figure, and no process is held for dead."""

import threading
import time
from types import SimpleNamespace

import torch

from cleaning.clean import Settings, clean
from trainer import heartbeat
from trainer import log as logs
from trainer.world import World


class Store:
    """What the processes tell each other through; rank 1 beats at most `beats` times, once in each of our counts."""

    def __init__(self, beats):
        self.beats, self.rounds = beats, 0

    def add(self, key, n):
        self.rounds += key == "beat/0"
        return min(self.rounds, self.beats) if key == "beat/1" else 0


def listened(beats: int, rounds: int, monkeypatch) -> str:
    """What rank 0 says of rank 1 after so many of its counts, between which the clock jumps by an hour."""
    hours = iter(range(10**6))
    monkeypatch.setattr(heartbeat, "GRACE", 60)
    monkeypatch.setattr(time, "monotonic", lambda: 3600.0 * next(hours))
    ours = heartbeat.Heartbeat.__new__(heartbeat.Heartbeat)
    ours.rank, ours.others, ours.store, ours.launcher = 0, [1], Store(beats), None
    ours.silence, ours.words, ours.lost = heartbeat.SILENCE, "", threading.Event()
    ours.done = SimpleNamespace(wait=lambda seconds: seconds == 60 or ours.store.rounds == rounds)
    ours._listen()
    return ours.words


def test_a_process_that_was_stopped_itself_holds_no_other_for_dead(monkeypatch):
    assert listened(beats=1, rounds=10, monkeypatch=monkeypatch) == ""
    assert listened(beats=1, rounds=40, monkeypatch=monkeypatch).startswith("rank 1 is lost (killed")
    assert listened(beats=40, rounds=40, monkeypatch=monkeypatch) == ""


def test_seconds_of_cleaning_do_not_follow_the_wall_clock(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text(
        "".join(f"第{i}天，鸟儿在树上唱第{i * i}首歌。" for i in range(30)), encoding="utf-8"
    )
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    summary = clean([tmp_path / "a.txt"], tmp_path / "out", Settings())
    assert 0 <= summary["seconds"] < 60 and 0 <= summary["read_seconds"] < 60 and summary["documents_per_second"] > 0


def test_the_time_left_is_that_of_the_steps_since_the_clock_was_set(monkeypatch, tmp_path, capsys):
    """A validation or a resumption in the middle of --log_interval sets it anew."""
    now = [0.0]
    files = SimpleNamespace(log=tmp_path / "x.jsonl", curve=tmp_path / "x.png", name="x")
    log = logs.Log(files, World(0, 1, torch.device("cpu"), torch.float32), 110, 1.0, 10, 0)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log.clock = now[0]
    for step in range(1, 11):
        now[0] += 60  # a step takes a minute
        log.step(step, 10, loss=1.0, lr=0.1)
        if step == 8:
            log.validation(step, val_loss=1.0)
    assert "left 1:40:00" in capsys.readouterr().out
    log.close()
