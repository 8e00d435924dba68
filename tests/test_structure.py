"""The house keeps its shape: sizes, arrows, no copies."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # room: the rooms below it; docs/design.md draws it
    "common": (),
    "model": ("common",),
    "data": ("common", "model"),
    "trainer": ("common", "data", "model"),
    "inference": ("common", "model"),
    "exams": ("common", "data", "model", "inference"),
    "serving": ("common", "model", "inference"),
    "chat": ("common", "model", "inference"),
    "cleaning": ("common", "data", "model"),
    "sample": ("common", "data"),
    "export": ("common", "model"),
    "inspection": ("common", "model", "inference"),
    "figures": ("common", "data", "model", "inspection"),
    "course": ("common", "figures"),
    "pages": ("common", "model", "data", "inference", "chat", "inspection", "cleaning"),
}
SCRIPTS = sorted(p for p in ROOT.glob("*.py"))
CODE = SCRIPTS + sorted(p for room in (*MAY_IMPORT, "benchmarks", "scripts") for p in (ROOT / room).glob("*.py"))
LAZY = (
    "deepspeed",
    "wandb",
    "streamlit",
    "peft",
    "trl",
    "lm_eval",
    "matplotlib",
    "tensorboard",
    "gguf",
    "huggingface_hub",
    "ray",
)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.col_offset


def files_imported(path):
    """The files of this project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (found for name in names if (found := ROOT / f"{name.replace('.', '/')}.py") in CODE)


@pytest.mark.parametrize("room", [*MAY_IMPORT])
def test_a_rooms_first_line_says_what_it_imports(room):
    said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
    assert set(re.findall(r"(\w+)/", said.partition("Imports")[2])) == set(MAY_IMPORT[room])


def test_no_file_imports_itself_in_a_circle():
    below = {path: set(files_imported(path)) for path in CODE}
    while leaves := [path for path, imports in below.items() if not imports]:
        below = {path: imports - set(leaves) for path, imports in below.items() if path not in leaves}
    assert not below, f"circles among {sorted(str(path.relative_to(ROOT)) for path in below)}"


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way_and_heavy_packages_are_imported_late(path):
    room = path.parent.name if path.parent != ROOT else ""
    names = list(imported(path))
    others = set(MAY_IMPORT) | {"benchmarks", "scripts"}
    if room in MAY_IMPORT:
        assert not {name for name, _ in names} & others - {room, *MAY_IMPORT[room]}
    needs = "streamlit" if room == "pages" else None  # streamlit is what starts the page
    assert not [name for name, column in names if name in LAZY and name != needs and column == 0]


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    source = path.read_text(encoding="utf-8")
    stage = path.parent == ROOT and "stage_parser(" in source
    assert len(source.splitlines()) <= (120 if stage else 349)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 80, f"{path.name}:{node.name}"


def test_no_six_code_lines_stand_in_two_scripts():
    seen = {}
    for path in SCRIPTS:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line and not line.startswith(("#", "import ", "from "))]
        for i in range(len(lines) - 5):
            block = "\n".join(lines[i : i + 6])
            if "run_main(main)" in block or "def main(" in block:  # how a program begins and ends
                continue
            assert seen.setdefault(block, path) == path, f"{path.name} repeats {seen[block].name}:\n{block}"


def test_every_required_package_is_imported_somewhere():
    required = re.findall(r"^([A-Za-z0-9_-]+)", (ROOT / "requirements.txt").read_text(), re.M)
    names = {name for path in CODE for name, _ in imported(path)}
    # used through transformers' templates, pandas' parquet and torch's writer of events
    by_others = {"jinja2", "pyarrow", "pandas", "tensorboard"}
    assert {r.lower() for r in required} - {n.lower() for n in names} <= by_others


AT_TORCH = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, os.environ.get("OMP_WAIT_POLICY", "not set").encode())
            os._exit(0)
sys.meta_path.insert(0, Finder())
del sys.argv[0]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAIN = [path.name for path in SCRIPTS if "join(args)" in path.read_text(encoding="utf-8")]
GENERATE = ["0-eval_pretrain.py", "2-eval.py", "eval_ceval.py", "scripts/serve_openai_api.py",
            "scripts/benchmark.py engine --help"]  # fmt: skip


@pytest.mark.parametrize("command", TRAIN + GENERATE)
def test_how_torchs_threads_wait_is_settled_before_torch_is_loaded(command):
    """Threads that train sleep while they wait, threads that generate spin: see trainer/engine.py."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", AT_TORCH, *command.split()], cwd=ROOT, env=env, capture_output=True,
                          text=True)  # fmt: skip
    assert done.stdout == ("PASSIVE" if command in TRAIN else "not set"), done.stderr
