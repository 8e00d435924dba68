"""What all tests share: one torch thread, the folder of real data, and the slow tests that only `--all` runs."""

import os
import sys
from pathlib import Path

# Before torch starts, and inherited by the programs that tests run: threads that share a busy core wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --all"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data that $DATA names; tests that want it are skipped where there is none."""
    folder = Path(os.environ.get("DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real data here: set DATA to a folder of it")
    return folder
