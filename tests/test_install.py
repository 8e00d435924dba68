"""What the first command of a user meets: an old Python, a broken .venv, missing packages; and the locked versions."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from stage import load
from test_structure import imported

ROOT = Path(__file__).resolve().parent.parent
PYENV = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
SYSTEMS = {
    "Linux": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    "macOS": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix"},
    "Windows": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
}
WITH_MAKE = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="no make here")


# ------------------------------------------------------------------------------------------------- locked versions
def read_requirements(path: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def pins(name: str, environment: dict[str, str]) -> dict[str, Version]:
    """The versions that a constraints file names for one system and Python."""
    found = {}
    for pin in read_requirements(ROOT / name):
        if pin.marker is None or pin.marker.evaluate(environment):
            (specifier,) = pin.specifier
            package = canonicalize_name(pin.name)
            assert specifier.operator == "==" and package not in found, pin
            found[package] = Version(specifier.version)
    return found


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_requirement_has_one_locked_version_in_its_range(name, python, system):
    """Fails when a requirement was changed without `make lock`."""
    environment = SYSTEMS[system] | {"python_version": python, "python_full_version": f"{python}.1"}
    locked = pins(name, environment)
    for path in ROOT.glob("requirements*.txt"):
        for requirement in read_requirements(path):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                version = locked[canonicalize_name(requirement.name)]
                assert version in requirement.specifier, requirement
                lowest = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
                assert name == "constraints.txt" or [version] == lowest, "the lower end is not what is tested"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_locks_name_versions_and_nothing_else(name):
    """No registry's address, no options, no hashes: they would bind a user to where the file was written."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.match(r"[\w.-]+==[\w.+!]+( ; [^#]+)?  +# via ", line), line
        assert "://" not in line and "--" not in line


# --------------------------------------------------------------------------------------------------------- old Python
def old_pythons() -> list[str]:
    names = [shutil.which(f"python3.{minor}") for minor in range(6, 11)]
    of_pyenv = [python for name in ("3.[6-9].*", "3.10.*") for python in PYENV.glob(f"versions/{name}/bin/python")]
    return [name for name in names if name] + sorted(map(str, of_pyenv))


OLD = [python for python in old_pythons() if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0]


def fake_old_python(path: Path) -> Path:
    """A program that can do no more than run a script as Python 3.10 would, up to what this project's files ask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!{sys.executable}\nimport runpy, sys\nsys.version_info = (3, 10, 13, "final", 0)\n'
                    'sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name="__main__")\n')  # fmt: skip
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path):
    """What make needs of the project, with nothing to install."""
    folder = tmp_path / "clone"
    (folder / "common").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "common" / "needs.py", folder / "common")
    for name in ("requirements.txt", "constraints.txt"):
        (folder / name).touch()
    return folder


def make(folder: Path, *arguments) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    return subprocess.run(["make", *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True)


def is_one_sentence(text: str, *words: str) -> bool:
    lines = [line for line in text.splitlines() if not line.startswith("make: ***")]
    return len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words)


@WITH_MAKE
def test_make_refuses_an_old_python_before_pip_runs(clone, tmp_path):
    old = fake_old_python(tmp_path / "python3.10")
    for target in ("demo", "test", "test-all", "lint", "lock", "test-matrix"):
        for name in ("dev", "export", "eval", "ray"):
            (clone / f"requirements-{name}.txt").touch()
        done = make(clone, target, f"PYTHON={old}")
        assert done.returncode == 2 and is_one_sentence(done.stderr, "3.10", "3.11 or later"), done.stderr
        assert not done.stdout and not (clone / ".venv").exists()


@WITH_MAKE
def test_pip_shows_what_it_downloads(clone):
    """Gigabytes, for minutes: without a line a newcomer thinks that nothing happens."""
    commands = [line for line in make(clone, "-n", ".venv/installed").stdout.splitlines() if "pip install" in line]
    assert len(commands) == 1 and not {"-q", "--quiet", "off"} & set(commands[0].split())


def test_the_demo_refuses_an_old_python_before_it_imports_anything(tmp_path):
    script = ROOT / "scripts" / "demo.py"
    fake = fake_old_python(tmp_path / "python3.10")
    done = subprocess.run([sys.executable, fake, script], capture_output=True, text=True)
    assert done.returncode == 2 and is_one_sentence(done.stderr, "3.10", "3.11 or later"), done.stderr


@pytest.mark.skipif(not OLD, reason="no Python from 3.6 to 3.10 here")
@pytest.mark.parametrize("script", ["scripts/demo.py", "common/needs.py"])
def test_old_pythons_can_read_what_tells_them_that_they_are_old(script):
    for python in OLD:
        done = subprocess.run([python, ROOT / script], capture_output=True, text=True)
        assert done.returncode == 2 and is_one_sentence(done.stderr, "3.11 or later"), (python, done.stderr)


def test_the_demo_says_what_to_install_where_packages_are_missing():
    done = subprocess.run([sys.executable, "-I", "-S", ROOT / "scripts" / "demo.py"], capture_output=True, text=True)
    assert done.returncode == 2 and is_one_sentence(done.stderr, "torch", "transformers", "pip install -r"), done.stderr


def test_the_demo_asks_for_every_package_that_its_programs_import_at_once():
    rooms = [path for room in ("model", "trainer", "inference", "export") for path in (ROOT / room).glob("*.py")]
    names = {name for path in [*ROOT.glob("*.py"), *rooms] for name, column in imported(path) if column == 0}
    own = {path.name for path in ROOT.iterdir()}
    assert names - set(sys.stdlib_module_names) - own <= set(load("scripts/demo.py").PACKAGES)


# ------------------------------------------------------------------------------------------------------- broken .venv
def of_an_older_python(venv: Path) -> None:
    fake_old_python(venv / "bin" / "python")


def of_a_python_that_is_gone(venv: Path) -> None:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/nowhere/python3.11")


def half_made(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)


@WITH_MAKE
@pytest.mark.slow  # pip is put into a new environment
@pytest.mark.parametrize("broken", [of_an_older_python, of_a_python_that_is_gone, half_made])
def test_make_rebuilds_a_broken_venv_and_leaves_a_good_one(clone, broken):
    broken(clone / ".venv")
    (clone / ".venv" / "installed").touch()
    (clone / ".venv" / "old").touch()
    done = make(clone, ".venv/installed", f"PYTHON={sys.executable}")
    assert done.returncode == 0 and "-m pip install" in done.stdout, done.stderr
    assert not (clone / ".venv" / "old").exists() and (clone / ".venv" / "installed").exists()
    assert make(clone, "-q", ".venv/installed").returncode == 0  # nothing to do any more
