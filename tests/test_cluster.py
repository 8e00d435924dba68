"""Cleaning by Ray: the files are the pool's, a lost worker's rows are cleaned by another, errors are one line."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys

import pytest
from stage import ROOT, last_json

from cleaning.cluster import PACKAGES, Ray
from common.errors import RunFailed, run_main
from data_process import main

with_ray = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("ray") is None,
    reason="wants Linux and ray: pip install -r requirements-ray.txt",
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def write_raw(path):
    """4,000 rows in some five batches, a few of them bad or copies."""
    rng = random.Random(0)
    characters = [chr(i) for i in range(0x4E00, 0x5E00)]
    texts = ["".join(rng.choices(characters, k=150)) for _ in range(3990)]
    texts += [*texts[:4], *(text.replace(text[60:70], "") for text in texts[4:8]), "短", "□" * 20]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join([*rows, "{", '{"txt": 1}']), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("address", "flags", "said"),
    [
        (None, (), "pip install -r requirements-ray.txt"),
        ("10.0.0.1:6379", ("--workers", "2"), "--workers would change"),
    ],
)
def test_what_keeps_ray_from_beginning_is_one_line(address, flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    raw = write_raw(tmp_path / "raw.jsonl")
    argv = ["clean", "--data_path", str(raw), "--out_dir", str(tmp_path / "out"), "--engine", "ray", *flags]
    with pytest.raises(SystemExit) as end:
        run_main(main, argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_what_travels_to_the_workers_is_all_that_they_import(tmp_path):
    for package in PACKAGES:
        (tmp_path / package).symlink_to(ROOT / package)
    command = [sys.executable, "-c", "from cleaning.clean import clean_batch"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@with_ray
def test_the_files_are_those_of_the_pool(tmp_path):
    raw, files = write_raw(tmp_path / "raw.jsonl"), {}
    for engine in ("pool", "ray"):
        command = [sys.executable, "data_process.py", "clean", "--data_path", raw, "--out_dir", tmp_path / engine,
                   "--heldout", "0.1", "--keep_dropped", "--workers", "2", "--engine", engine]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert last_json(done.stdout)["workers"] == 2
        files[engine] = {path.name: path.read_bytes() for path in sorted((tmp_path / engine).iterdir())}
    assert "Ray (local): 2 CPUs on 1 machine(s)" in done.stdout
    assert files["ray"] == files["pool"]
    summary = json.loads(files["ray"]["summary.json"])
    wanted = {"exact copy": 4, "near copy": 4, "not JSON": 1, "wrong shape": 1, "too short": 1, "symbol noise": 1}
    assert summary["reasons"] == wanted and files["ray"]["dropped.jsonl"].count(b"\n") == 12


@pytest.mark.slow
@with_ray
def test_results_keep_their_order_and_a_lost_workers_batch_is_done_again(tmp_path):
    lost, drawn = tmp_path / "lost", []

    def double(batch, path):
        if batch == 3 and not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * batch

    batches = (drawn.append(i) or i for i in range(20))
    for i, result in enumerate(Ray(2).map(double, batches, lost)):
        assert result == 2 * i and len(drawn) <= i + 1 + 2 * 2  # no more are under way
    assert i == 19 and lost.exists()


@pytest.mark.slow
@with_ray
@pytest.mark.parametrize(("how", "said"), [("die", "Ray gave up: "), ("raise", "a worker failed: KeyError: 'no'")])
def test_what_cannot_be_done_is_one_line(how, said):
    def fail(batch, how):
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("no")

    with pytest.raises(RunFailed, match=said) as failure:
        list(Ray(2).map(fail, [1], how))
    assert "\n" not in str(failure.value)
