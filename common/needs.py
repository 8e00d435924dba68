"""Checks that Python is new enough and the packages are installed.

Old Pythons must be able to read this file, so it uses old syntax and imports no package. make runs it before it makes
.venv; scripts/demo.py calls it before its own imports.
"""

import sys

LOWEST = (3, 11)


def python_or_exit():
    """Ends the program with one sentence, exit code 2, where Python is older than the packages want it."""
    if sys.version_info[:2] < LOWEST:
        sys.stderr.write(
            "error: %s is Python %d.%d, and %d.%d or later is needed: install one and name it, as in "
            "`make demo PYTHON=python3.12` or `python3.12 scripts/demo.py`\n"
            % ((sys.executable,) + tuple(sys.version_info[:2]) + LOWEST)
        )
        sys.exit(2)


def packages_or_exit(names):
    """Ends the program with one sentence, exit code 2, where one of these packages cannot be found."""
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            "error: %s has no %s: python -m pip install -r requirements.txt -c constraints.txt (`make demo` does it in "
            "an environment of its own)\n" % (sys.executable, ", ".join(missing))
        )
        sys.exit(2)


if __name__ == "__main__":
    python_or_exit()
