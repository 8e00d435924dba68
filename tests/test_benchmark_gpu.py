"""`scripts/benchmark.py gpu`: on a CPU, on a pretended GPU, and with no packages but those it names."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from stage import last_json, load

from benchmarks.parts import Part, Results, tables
from common.errors import UserError
from model.LMConfig import LMConfig

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--presets", "tiny", "--rows", "1", "--new_tokens", "2"]
NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "pyarrow")


def gpu(capsys, *flags) -> tuple[dict, str]:
    """The command, in this process -> (its JSON object, all it printed)."""
    capsys.readouterr()
    load("scripts/benchmark.py").main(["gpu", *map(str, flags)])
    printed = capsys.readouterr().out
    return last_json(printed), printed


# ------------------------------------------------------------------------------------------------- the whole command
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path, capsys):
    result, printed = gpu(capsys, "--out_dir", tmp_path / "out")
    assert result == {"measurement": "gpu", "gpu": None}
    sentence, _ = printed.splitlines()
    assert "sees no CUDA GPU here: nothing was run" in sentence
    assert not (tmp_path / "out").exists()


def test_parts_on_a_cpu_are_measured_once_and_called_a_cpus(tmp_path, capsys):
    flags = [*TOY, "--device", "cpu", "--steps", 1, "--out_dir", tmp_path]
    result, _ = gpu(capsys, *flags, "--parts", "decode")
    assert result["gpu"] is None and result["device"] == "CPU" and result["failed"] == []
    found = result["found"]["decode: tiny, 16"]
    assert found["eager"]["tokens_per_second"]["n"] == 3 and found["eager"]["tokens_per_second"]["min"] > 0
    assert "CUDA only" in found["compiled"]["refused"]

    both, printed = gpu(capsys, *flags, "--parts", "speed", "decode")
    assert re.findall(r"^\[.*?\] (\w+)", printed, re.M) == ["speed"]  # decode is there already
    assert both["found"].items() > result["found"].items()
    step = both["found"]["speed: tiny, 1"]
    assert (
        step["ours"]["mfu"] > 0 and step["muon"]["formula_bytes"] > 4 * LMConfig.from_preset("tiny").parameter_count()
    )
    assert step["transformers"]["tokens_per_second"]["median"] > 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.startswith("A smoke run of the command on a CPU") and table in printed
    assert re.search(r"^\| tiny \| 1 \| [\d,]+ \| ", table, re.M) and re.search(r"^\| tiny \| 64 \| ", table, re.M)

    with pytest.raises(UserError, match="holds figures of other settings .steps 1 is now 2.*--overwrite"):
        gpu(capsys, *TOY, "--device", "cpu", "--steps", 2, "--parts", "decode", "--out_dir", tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--steps", 0], "--steps must be at least 1"), (["--rows", 0], "--rows must be at least 1"),
     (["--steps", 1], "--steps must be at least 2 for kills"), (["--device", "gpu"], "gpu'? is no device")],
)  # fmt: skip
def test_wrong_flags_are_one_sentence(flags, words, tmp_path, capsys):
    with pytest.raises(UserError, match=words):
        gpu(capsys, "--device", "cpu", *flags, "--out_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- what is kept
def test_what_failed_is_tried_again_after_what_was_never_tried(tmp_path):
    path, machine = tmp_path / "results.jsonl", {"device": "CPU", "steps": 1}
    results = Results(path, machine)
    results.add("a", ("x", "1"), {"error": "no kernel"})
    results.add("a", ("x", "2"), {"speed": 2.0})
    wanted = [("a", ("x", n)) for n in "123"]
    again = Results(path, machine)
    assert again.left(wanted) == [("a", ("x", "3")), ("a", ("x", "1"))]
    again.add("a", ("x", "1"), {"speed": 1.0})
    assert Results(path, machine).left(wanted) == [("a", ("x", "3"))]
    again.add("a", ("x", "3"), {"error": "no kernel"})
    part = Part("speeds.", None, None, ("kind", "no."), {"tokens/s": lambda f: f"{f['speed']:.1f}"})
    assert tables({"b": part, "a": part}, again).splitlines() == [
        "**a**: speeds.", "", "| kind | no. | tokens/s |", "| --- | --- | ---: |", "| x | 1 | 1.0 |", "| x | 2 | 2.0 |",
        "| x | 3 | – |", "", "- x 3: no kernel",
    ]  # fmt: skip


def test_differences_are_shares_of_the_larger_number():
    from benchmarks.gpu_stages import difference

    assert difference(2.0, 2.0) == difference(0.0, 0.0) == 0
    assert difference(3.0, 4.0) == difference(-3.0, -4.0) == 0.25
    assert difference(0.0, 5.0) == 1 and difference(-1.0, 1.0) == 2


def test_a_failing_case_is_told_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    """Here of two exams one cannot be read."""
    from benchmarks import gpu_speed

    monkeypatch.setitem(gpu_speed.EXAMS, "letters", lambda engine: 1 / 0)
    result, printed = gpu(capsys, *TOY, "--device", "cpu", "--parts", "exams", "--out_dir", tmp_path)
    assert result["failed"] == ["exams: letters, auto", "exams: letters, float32"]
    assert result["found"]["exams: text, auto"]["other_answers"] == 0
    assert "- letters auto: division by zero" in printed


# ------------------------------------------------------------------------------------------ with few packages, no GPU
def lean_python(folder: Path) -> Path:
    """A Python whose packages are NEEDED and what they require, and no others."""
    venv.create(folder, with_pip=False)
    site = next(folder.rglob("site-packages"))
    links, todo, seen = set(), list(NEEDED), set()
    while todo:
        name = canonicalize_name(todo.pop())
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another system
            continue
        if name not in seen:
            seen.add(name)
            links |= {(package.locate_file(""), file.parts[0]) for file in package.files if file.parts[0] != ".."}
            needs = map(Requirement, package.requires or ())
            todo += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    for home, name in links - {(home, "__pycache__") for home, _ in links}:
        (site / name).symlink_to(Path(home) / name)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def test_it_imports_nothing_but_what_it_needs(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from stage import STAGES, load
for script in (*STAGES.values(), "scripts/benchmark.py", "eval_ceval.py"):
    load(script)
import benchmarks.gpu, benchmarks.fixed_answers
for name in ("openai", "fastapi", "matplotlib", "datasketch", "pytest"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " is here")
"""
    done = subprocess.run([lean_python(tmp_path), "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_all_parts_on_a_cpu_with_few_packages(tmp_path):
    """At toy size and with two stages; compared with itself, the CPU is equal to itself, killed or not."""
    parts = ["stages", "speed", "decode", "kills", "dtypes", "exams"] + ["compiled"] * bool(shutil.which("g++"))
    result = started(lean_python(tmp_path / "lean"), tmp_path, "--device", "cpu", "--parts", *parts,
                        "--stages", "pretrain", "lora")  # fmt: skip
    found = result["found"]
    for stage in ("pretrain", "lora"):
        assert found[f"stages: {stage}"]["largest_difference"] == 0 < found[f"stages: {stage}"]["last"]
        kill = found[f"kills: {stage}"]
        assert kill["killed_after"] == 1 and kill["equal"] and kill["undisturbed"]["equal"]
    assert "needs a GPU" in found["dtypes: pretrain, float16"]["refused"]
    assert found["exams: letters, auto"]["questions"] == 308
    assert found["speed: tiny, 1"].keys() >= {"ours", "muon", "transformers"}
    if "compiled" in parts:
        assert found["compiled: tiny, 1"]["ours"]["tokens_per_second"]["median"] > 0


@pytest.mark.slow
def test_the_command_on_a_pretended_gpu(tmp_path):
    """What it starts meets the same GPU, see tests/pretended/everywhere."""
    if shutil.which("g++") is None or torch.version.cuda:
        pytest.skip("a pretended GPU needs g++ and a torch that is built for the CPU alone")
    env = {"PYTHONPATH": str(ROOT / "tests" / "pretended" / "everywhere"), "PRETENDED": "8.6"}
    result = started(sys.executable, tmp_path, "--parts", "stages", "speed", "decode", "kills", "dtypes",
                        "--stages", "full_sft", "grpo-fixed", env=env)  # fmt: skip
    found = result["found"]
    assert result["gpu"].startswith("NVIDIA GeForce RTX 3090, compute capability 8.6")
    assert 0 < found["stages: full_sft"]["largest_difference"] < 1e-3
    assert 0 < found["stages: grpo-fixed"]["largest_difference"] < 1e-2  # of the gradient's norm
    assert found["kills: full_sft"]["equal"]  # its sums are a CPU's: always in the same order
    assert found["dtypes: pretrain, float16"]["passed_over"] == 0
    assert found["speed: tiny, 1"]["ours"]["peak_bytes"] is not None


def started(python, folder: Path, *flags, env=None) -> dict:
    """The command with this Python -> its JSON object; no case has failed."""
    command = [python, "scripts/benchmark.py", "gpu", *TOY, "--steps", 2, "--out_dir", folder / "out", *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | (env or {}), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = last_json(done.stdout)
    assert result["failed"] == [], done.stderr[-3000:]
    assert [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text("utf-8").splitlines()][1:]
    return result
