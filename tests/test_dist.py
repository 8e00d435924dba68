"""Several processes learn what one does, in the same order, and none of them waits for one that is gone.

One job of two processes does everything here: it runs tests/ranks.py, whose last run loses a process.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from stage import ROOT, STAGES, TINY, load, run_flags, write_chats, write_prompts, write_texts

from common.errors import RunFailed, UserError
from trainer import heartbeat
from trainer.heartbeat import Heartbeat
from trainer.plan import Plan
from trainer.world import World, join

SCRIPTS = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def flags_of(stage, folder, out, *more) -> list[str]:
    data = write_texts(folder / "t.jsonl") if stage == "pretrain" else write_chats(folder / "c.jsonl")
    flags = [*TINY, "--data_path", data, "--out_dir", folder / out, "--max_steps", 8, "--save_interval", 2,
             "--eval_interval", 3, "--val_split", 0.1, "--from_weight", "none", "--accumulation_steps", 4,
             "--sample_prompts", write_prompts(folder / "prompts.txt")]  # fmt: skip
    return list(map(str, [*flags, *more]))


def two_processes(jobs) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [*TORCHRUN, str(ROOT / "tests" / "ranks.py"), str(jobs)]
    return subprocess.run(ranks, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What two processes did: two stages, a file of one row, commands that differ, a run in which rank 1 is killed at
    its 12th batch."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "one.jsonl").write_text(json.dumps({"text": "只有一行。"}, ensure_ascii=False) + "\n", "utf-8")
    halved = ("--accumulation_steps", 2)
    few = [*flags_of("pretrain", folder, "few"), "--data_path", str(folder / "one.jsonl"), "--val_split", "0"]
    jobs = [{"script": SCRIPTS[s], "flags": flags_of(s, folder, "two", *halved)} for s in SCRIPTS]
    jobs += [{"script": SCRIPTS["pretrain"], "flags": few}]
    jobs += [{"script": SCRIPTS["pretrain"], "flags": flags_of("pretrain", folder, "apart"), "more": ["--seed", "7"]}]
    jobs += [{"script": SCRIPTS["pretrain"], "flags": flags_of("pretrain", folder, "broken", *halved),
              "kill": [1, 12]}]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps([job | {"port": free_port()} for job in jobs]))
    done = two_processes(folder / "jobs.json")
    seconds = time.time() - float((folder / "jobs.json.lost").read_text())
    notes = [[json.loads(path.read_text()) for path in sorted(folder.glob(f"jobs.json.{i}.rank*"))] for i in range(5)]
    for stage, script in SCRIPTS.items():  # the same alone
        load(script).main(flags_of(stage, folder, "one"))
    return SimpleNamespace(folder=folder, done=done, notes=notes, seconds=seconds)


def history(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_losses(one, two) -> None:
    for a, b in zip(history(one), history(two), strict=True):
        assert (a["step"], a.get("tokens")) == (b["step"], b.get("tokens"))
        for key in ("loss", "val_loss", "val_bits_per_byte"):
            if a.get(key) is not None:
                assert b[key] == pytest.approx(a[key], rel=1e-5), (key, a["step"])


@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_learn_what_one_does(stage, job):
    """Training and validation losses of each step, and the tokens counted, are those of the whole job."""
    assert_same_losses(job.folder / "one" / f"{stage}_32.jsonl", job.folder / "two" / f"{stage}_32.jsonl")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_samples_are_written_once_whoever_else_takes_part(stage, job):
    one, two = (history(job.folder / d / f"{stage}_32_samples.jsonl") for d in ("one", "two"))
    asked = [(step, prompt) for step in (3, 6, 8) for prompt in ("春天", "第3篇")]
    assert [(row["step"], row["prompt"]) for row in one] == [(row["step"], row["prompt"]) for row in two] == asked


@pytest.mark.parametrize("number", range(2))
def test_processes_read_different_rows_and_together_all(number, job):
    noted = [notes["rows"] for notes in job.notes[number]]
    n = max(row[0] for row in noted[0])  # of the training rows; the others are those of validation
    first, second = ([i for m, *indices in rows if m == n for i in indices] for rows in noted)
    assert len(first) == len(second) == 8 * 2 * 2
    assert sorted(first + second) == list(range(64))  # places in the run's order, which goes on past an epoch


@pytest.mark.parametrize("number", range(2))
def test_only_a_steps_last_micro_batch_exchanges_gradients(number, job):
    for notes in job.notes[number]:
        exchanged = notes["exchanged"]
        assert len(exchanged) == 8 * 2
        assert not any(exchanged[0::2]) and all(exchanged[1::2])


def test_fewer_rows_than_processes_are_refused(job):
    assert [notes["code"] for notes in job.notes[2]] == [2, 2]
    assert "1 row(s) of data cannot be shared by 2 processes" in job.done.stderr
    args = SimpleNamespace(epochs=1, max_steps=None, warmup=0)
    run = SimpleNamespace(args=args, batch_size=1, accumulation_steps=1, state=None)
    with pytest.raises(UserError, match="3 row"):
        Plan(run, [0] * 3, World(0, 4, torch.device("cpu"), torch.float32))


def test_processes_that_were_given_different_commands_are_refused(job):
    """As on two machines, each with a command line and a disk of its own."""
    assert [notes["code"] for notes in job.notes[3]] == [2, 2]
    assert "error: the processes differ in seed; give every machine the same command" in job.done.stderr


def test_restarts_want_a_new_meeting_place_for_each_attempt(monkeypatch):
    """torchrun's own outlives the lost processes, and still holds what they left there."""
    launcher = {"RANK": 0, "WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 3, "TORCHELASTIC_USE_AGENT_STORE": True}
    for name, value in launcher.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        join(SimpleNamespace(device="cpu", dtype="auto")),
    ):
        pass


def test_a_lost_process_ends_the_others_and_is_named(job):
    assert job.done.returncode == 1 and [notes["code"] for notes in job.notes[4]] == [1]  # rank 1 left no note
    assert "failed: rank 1 is lost" in job.done.stderr and "what was saved before is whole" in job.done.stderr
    assert job.seconds < 60  # from the kill to the end of all


@pytest.mark.parametrize(("ranks", "missing"), [([0], "rank 1, rank 2"), ([1], "rank 0"), ([0, 1], "rank 2")])
def test_a_process_that_does_not_come_is_named_by_those_who_wait(ranks, missing, monkeypatch, capfd):
    monkeypatch.setattr(heartbeat, "START", timedelta(seconds=1.5))
    monkeypatch.setattr(heartbeat, "TOLD", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    said = []

    def come(rank):
        with pytest.raises(RunFailed) as failed:
            Heartbeat(rank, 3)
        said.append(str(failed.value))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [f"{missing} did not come within 0.025 minutes; see what it said, and start all again"] * len(ranks)
    told = sorted(capfd.readouterr().err.splitlines())
    assert told == [f"rank {rank} is waiting for {missing}" for rank in ranks]


def test_several_processes_without_a_place_to_meet_are_the_users_mistake(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="use torchrun"):
        Heartbeat(0, 2)


def test_one_process_with_another_micro_batch_goes_on_where_two_were(job):
    """The run that lost a process at its sixth step: the state of step 4 was saved; 2 x 2 x 2 rows become 8 x 1 x 1."""
    out = job.folder / "broken"
    assert (out / "pretrain_32_resume.pth").exists()
    flags = flags_of("pretrain", job.folder, "broken", "--batch_size", 8, "--resume")
    load(SCRIPTS["pretrain"]).main(flags)
    assert_same_losses(job.folder / "one" / "pretrain_32.jsonl", out / "pretrain_32.jsonl")


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others_within_a_minute(tmp_path):
    flags = flags_of("pretrain", tmp_path, "out", "--accumulation_steps", 2)
    job = {"script": SCRIPTS["pretrain"], "flags": flags, "port": free_port(), "fail": [1, 12]}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    done = two_processes(tmp_path / "jobs.json")
    assert done.returncode == 1 and time.time() - float((tmp_path / "jobs.json.lost").read_text()) < 60
    assert "failed: out of memory. What was saved" in done.stderr and "failed: rank 1 is lost" in done.stderr
    assert (tmp_path / "out" / "pretrain_32_resume.pth").exists()


@pytest.mark.slow
def test_the_loss_of_a_process_that_another_waits_to_meet_ends_it(tmp_path):
    """On two machines, where no launcher ends the other: it would wait for a day."""
    job = {"script": SCRIPTS["pretrain"], "flags": flags_of("pretrain", tmp_path, "out"), "port": free_port()}
    (tmp_path / "jobs.json").write_text(json.dumps([job | {"kill": [1, 0]}]))
    command = [sys.executable, str(ROOT / "tests" / "ranks.py"), str(tmp_path / "jobs.json")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    first, _ = (subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env | {"RANK": str(rank)})
                for rank in range(2))  # fmt: skip
    try:
        error = first.communicate(timeout=120)[1]
    finally:
        first.kill()
    assert first.returncode == 1 and "failed: rank 1 is lost" in error
    assert time.time() - float((tmp_path / "jobs.json.lost").read_text()) < 60


@pytest.mark.slow
def test_the_loss_of_the_first_process_ends_the_others_too(tmp_path):
    """As a user starts it: the processes meet in the launcher, which outlives them."""
    flags = flags_of("pretrain", tmp_path, "out", "--accumulation_steps", 2, "--max_steps", 400, "--save_interval", 1)
    state = tmp_path / "out" / "pretrain_32_resume.pth"
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen([*TORCHRUN, "1-pretrain.py", *flags], cwd=ROOT, stdout=log, stderr=log,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    while process.poll() is None and not state.exists():
        time.sleep(0.05)
    ranks = {p.environ()["RANK"]: p for p in psutil.Process(process.pid).children() if "RANK" in p.environ()}
    assert sorted(ranks) == ["0", "1"]
    ranks["0"].kill()
    begin = time.monotonic()
    assert process.wait(120) != 0 and time.monotonic() - begin < 60
    assert not ranks["1"].is_running() and state.exists()


# ------------------------------------------------------------------------------------------------- every other stage
EXACT = {  # how a stage is told to be free of chance
    "lora": ["--dropout", "0", "--lora_dropout", "0"], "dpo": ["--dropout", "0"], "full_dist": ["--dropout", "0"],
    "reason": ["--dropout", "0"], "full_sft": ["--dropout", "0", "--use_moe", "--n_routed_experts", "4"],
}  # fmt: skip


@pytest.mark.slow
def test_every_stage_learns_in_two_processes_what_it_does_in_one(tmp_path):
    """Fine-tuning with experts here, whose balance loss is a mean over all processes' tokens."""
    jobs = []
    for stage, exact in EXACT.items():
        flags = [*run_flags(stage, tmp_path / stage, steps=6), *exact, "--out_dir"]
        load(STAGES[stage]).main([*flags, str(tmp_path / stage / "one")])
        split = [*flags, str(tmp_path / stage / "two"), "--accumulation_steps", "1"]
        jobs.append({"script": STAGES[stage], "flags": split, "port": free_port()})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = two_processes(tmp_path / "jobs.json")
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in EXACT:
        one, two = (next((tmp_path / stage / d).rglob("*_32*.jsonl")) for d in ("one", "two"))
        assert len(history(one)) >= 7
        assert_same_losses(one, two)


@pytest.mark.slow
def test_two_nodes_are_one_process(tmp_path, job):
    """The command of docs/devices.md for several machines, here one process on each of two that are both this one."""
    flags = flags_of("pretrain", job.folder, "nodes", "--accumulation_steps", 2)
    launch = [*TORCHRUN[:3], "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint",
              f"127.0.0.1:{free_port()}", "--rdzv_id", "night"]  # fmt: skip
    nodes = [subprocess.Popen([*launch, "1-pretrain.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]  # fmt: skip
    assert [node.wait(300) for node in nodes] == [0, 0]
    assert_same_losses(job.folder / "one" / "pretrain_32.jsonl", job.folder / "nodes" / "pretrain_32.jsonl")


def test_batches_of_an_evaluation_are_as_many_on_every_process():
    for n, batch_size, size in ((0, 2, 2), (5, 2, 1), (5, 2, 2), (9, 2, 4), (3, 1, 4)):
        worlds = [World(rank, size, torch.device("cpu"), torch.float32) for rank in range(size)]
        shares = [list(world.shares(n, batch_size)) for world in worlds]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for batch in share for i in batch if i >= 0) == list(range(n))
