# make demo      from nothing to a model that talks, on the embedded sample
# make test      the tests a change must pass      make test-all   everything, slow ones too
# make lint      ruff
# make docs      the course's pages and pictures from the code and the recorded runs (RUN=all or names: runs them anew)
# make lock      the exact versions of constraints*.txt, anew: what a renewal is reviewed by
# make test-matrix   the tests with the locked, the lowest and the newest versions (VERSIONS="locked lowest newest")
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --disable-pip-version-check
LOCKED = -c constraints.txt
VERSIONS ?= locked lowest newest

# One thread a process: the tests run in two processes, and torch threads that share a busy core wait for each other.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test test-all lint docs lock test-matrix
demo: .venv/installed
	.venv/bin/python scripts/demo.py

test: .venv/installed-dev
	$(TEST_ENV) .venv/bin/python -m pytest -n 2 --dist loadfile

test-all: .venv/installed-all
	$(TEST_ENV) .venv/bin/python -m pytest -n 2 --dist loadfile --all

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/installed
	.venv/bin/python scripts/make_docs.py $(if $(RUN),--run $(RUN))

# One solution for every system and for Python 3.11 and later. Where pip reads it as constraints it installs nothing of
# its own: the CUDA packages that torch wants on Linux stand in it and are fetched only by a torch that wants them.
COMPILE = .venv/bin/uv pip compile -q --upgrade --universal --python-version 3.11 --annotation-style line \
	--custom-compile-command "make lock" requirements-dev.txt requirements-export.txt requirements-eval.txt requirements-ray.txt
lock: | .venv/bin/python
	$(PIP_INSTALL) -q --upgrade uv
	$(COMPILE) -o constraints.txt
	$(COMPILE) -o constraints-lowest.txt --resolution lowest-direct

test-matrix:
	@$(PYTHON) common/needs.py
	$(PYTHON) tests/matrix.py $(VERSIONS)

# A .venv of an older Python, of one that is gone, or half made (pip's own record is written last) is made anew.
ifneq ($(shell .venv/bin/python -c "import sys; from importlib.metadata import version; version('pip'); \
	print(sys.version_info >= (3, 11))" 2>/dev/null),True)
.PHONY: .venv/bin/python .venv/installed .venv/installed-dev .venv/installed-all
endif

.venv/bin/python:
	@$(PYTHON) common/needs.py
	$(PYTHON) -m venv --clear .venv

.venv/installed: requirements.txt constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -r requirements.txt $(LOCKED)
	touch $@

.venv/installed-dev: requirements.txt requirements-dev.txt constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -r requirements-dev.txt $(LOCKED)
	touch $@

.venv/installed-all: requirements-export.txt requirements-eval.txt requirements-ray.txt .venv/installed-dev
	$(PIP_INSTALL) -r requirements-export.txt -r requirements-eval.txt -r requirements-ray.txt $(LOCKED)
	touch $@
