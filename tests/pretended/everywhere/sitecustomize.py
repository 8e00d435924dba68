"""The pretended GPU in every Python of a command, those that it starts included: Python imports this file at its start.

PYTHONPATH=tests/pretended/everywhere PRETENDED=8.6 python scripts/benchmark.py gpu
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from pretended.gpu import gpu

IT = gpu(tuple(map(int, os.environ["PRETENDED"].split("."))))
IT.__enter__()  # until the process ends
