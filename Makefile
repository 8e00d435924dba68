# make demo      from nothing to a model that talks, on the embedded sample
# make test      the tests a change must pass      make test-all   everything, slow ones too
# make lint      ruff
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --disable-pip-version-check -q

# One thread a process: the tests run in two processes, and torch threads that share a busy core wait for each other.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test test-all lint
demo: .venv/installed
	.venv/bin/python scripts/demo.py

test: .venv/installed-dev
	$(TEST_ENV) .venv/bin/python -m pytest -n 2 --dist loadfile

test-all: .venv/installed-all
	$(TEST_ENV) .venv/bin/python -m pytest -n 2 --dist loadfile --all

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(PIP_INSTALL) -r requirements.txt
	touch $@

.venv/installed-dev: requirements.txt requirements-dev.txt | .venv/bin/python
	$(PIP_INSTALL) -r requirements-dev.txt
	touch $@

.venv/installed-all: requirements-export.txt requirements-eval.txt .venv/installed-dev
	$(PIP_INSTALL) -r requirements-export.txt -r requirements-eval.txt
	touch $@
