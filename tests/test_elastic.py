"""The command of docs/devices.md for several machines, here two launchers on one: what is lost is started again, and
the run goes on by itself from the last save and ends as the run that nobody disturbed."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from stage import ROOT, TINY, history, write_texts
from test_dist import free_port

pytestmark = pytest.mark.slow

WEIGHTS, STATE, LOG = "pretrain_32.pth", "pretrain_32_resume.pth", "pretrain_32.jsonl"
LIMIT = 300  # seconds; on two quiet cores everything here takes a fifth of it


class Cluster:
    """Two machines, "a" (HOST, where all meet) and "b": a launcher each, with one process of training."""

    def __init__(self, folder, out: str):
        data, self.folder, self.out = folder / "texts.jsonl", folder, folder / out
        flags = [*TINY, "--data_path", data, "--out_dir", self.out, "--max_steps", 120, "--save_interval", 5,
                 "--eval_interval", 50, "--val_split", 0.1, "--dropout", 0.1, "--from_weight", "none"]  # fmt: skip
        port = free_port()
        self.command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "night",
                        "--max_restarts", "3", "1-pretrain.py", *map(str, flags), "--resume"]  # fmt: skip
        if not data.exists():
            write_texts(data)
        self.port, self.launchers = port, {}

    def start(self, *names):
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        for name in names:
            with open(self.log(name), "a", encoding="utf-8") as log:
                self.launchers[name] = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, env=env)
            while name == "a" and not self.listens():  # here each launcher takes itself for HOST's, and the first is
                assert self.launchers[name].poll() is None, self.printed()
                time.sleep(0.05)

    def listens(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self, name):
        return self.folder / f"{self.out.name}.{name}.txt"

    def printed(self) -> str:
        return "".join(self.log(name).read_text(encoding="utf-8") for name in self.launchers)

    def worker_after_a_save(self, name, but=()) -> psutil.Process:
        """The process of training on a machine, none of `but`, once it has lived to see a save."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            assert all(launcher.poll() is None for launcher in self.launchers.values()), self.printed()
            saved = self.out / STATE
            for process in psutil.Process(self.launchers[name].pid).children() if saved.exists() else ():
                with contextlib.suppress(psutil.Error):  # it has just ended
                    training = process not in but and "1-pretrain.py" in process.cmdline()
                    if training and saved.stat().st_mtime > process.create_time():
                        return process
            time.sleep(0.05)
        pytest.fail(f"no save in {LIMIT} seconds: {self.printed()}")

    def ends(self) -> list[int]:
        """How the launchers ended."""
        try:
            return [launcher.wait(LIMIT) for launcher in self.launchers.values()]
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end in {LIMIT} seconds: {self.printed()}")

    def close(self):
        for launcher in self.launchers.values():
            if launcher.poll() is None:
                for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                    process.kill()
                launcher.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """cluster(out): a Cluster that writes to this folder."""
    top, made = tmp_path_factory.mktemp("elastic"), []

    def make(out):
        made.append(Cluster(top, out))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def undisturbed(cluster):
    whole = cluster("whole")
    whole.start("a", "b")
    assert whole.ends() == [0, 0], whole.printed()
    return whole


def assert_same(one: Cluster, two: Cluster) -> None:
    """Weights and every number of every step."""
    weights = [torch.load(run.out / WEIGHTS, weights_only=True)["model"] for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert history(one.out / LOG) == history(two.out / LOG)


def test_a_lost_process_and_then_a_lost_machine_are_made_good(undisturbed, cluster):
    run = cluster("broken")
    run.start("a", "b")
    first = run.worker_after_a_save("b")
    first.kill()
    second = run.worker_after_a_save("b", but=[first])  # started by the launcher, with its partner on a
    run.launchers["b"].kill()
    run.launchers["b"].wait()
    psutil.wait_procs([second], timeout=60)
    assert not second.is_running()  # without a launcher nobody would end it, beside the run that goes on
    run.start("b")
    assert run.ends() == [0, 0], run.printed()
    printed = run.printed()
    assert "failed: rank" in printed and "this machine's launcher is lost" in printed
    assert printed.count("  resumed   at step ") == 2
    assert_same(undisturbed, run)


def test_a_stopped_launcher_saves_and_the_same_command_goes_on(undisturbed, cluster):
    run = cluster("stopped")
    run.start("a", "b")
    run.worker_after_a_save("a")
    for launcher in run.launchers.values():
        launcher.terminate()
    assert 0 not in run.ends()
    assert '"stopped": true' in run.printed() and (run.out / STATE).exists()
    run.start("a", "b")
    assert run.ends() == [0, 0], run.printed()
    assert_same(undisturbed, run)
