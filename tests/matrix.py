"""The tests with several sets of versions, each in an environment of its own: what `make test-matrix` runs.

    python tests/matrix.py [locked] [lowest] [newest]

locked   constraints.txt: what make, continuous integration and the README install
lowest   constraints-lowest.txt: the lower ends of the ranges in requirements*.txt
newest   what pip takes today within the ranges

The environments are .venv-NAME, made anew each time as a user's would be. At the end stands a table in Markdown, a row
for each set, to be copied into docs/versions.md. Exit code 1 if a test failed.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "locked": ["-c", "constraints.txt"],
    "lowest": ["-c", "constraints-lowest.txt"],
    "newest": [],
}
SHOWN = ("torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "pandas", "streamlit")
COLUMNS = ("date", "set", "Python", *SHOWN, "passed", "failed", "skipped", "minutes")


def environment(name: str) -> Path:
    """A new virtual environment with this set's packages -> its python."""
    folder = ROOT / f".venv-{name}"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", "requirements-dev.txt"]
    subprocess.run([*install, *SETS[name]], cwd=ROOT, check=True)
    return python


def versions(python: Path) -> list[str]:
    code = f"from importlib.metadata import version\nfor name in {SHOWN}: print(version(name))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test(python: Path, report: Path) -> dict[str, int]:
    """Runs the tests and counts them by how they ended."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, env=env)
    if done.returncode not in (0, 1):  # 1: some tests failed
        sys.exit(f"pytest could not run them (exit code {done.returncode})")
    suite = ElementTree.parse(report).getroot().find("testsuite").attrib
    counts = {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {"passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"]}


def row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET", help=", ".join(SETS))
    names = parser.parse_args().sets
    if unknown := set(names) - set(SETS):
        parser.error(f"{', '.join(sorted(unknown))}: no such set; there are {', '.join(SETS)}")
    table, failed = [row(COLUMNS), row("---" for _ in COLUMNS)], 0
    try:
        for name in names:
            print(f"\n== {name}", flush=True)
            python = environment(name)
            begin = time.monotonic()
            counts = test(python, ROOT / f".venv-{name}" / "tests.xml")
            minutes = f"{(time.monotonic() - begin) / 60:.1f}"
            table.append(row([datetime.date.today(), name, platform.python_version(), *versions(python),
                              *counts.values(), minutes]))  # fmt: skip
            failed += counts["failed"]
    finally:  # what is done is shown also where the next set cannot be installed or tested
        print("", *table, sep="\n", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
