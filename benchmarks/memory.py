"""The memory estimate against the measured peak, for each preset and stage.

Each run is a process of its own that takes two steps of the stage with its default batch (the optimizer's state exists
from the second on) and reports the most memory the process ever held.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py"}


def add_flags(parser) -> None:
    parser.add_argument("--presets", nargs="+", default=["tiny", "minimind2-small"], metavar="NAME")
    parser.add_argument("flags", nargs="*", help="further flags of the stages, after --")


def measure(preset: str, stage: str, *flags) -> dict:
    """{"estimate", "peak"} in bytes of two steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, STAGES[stage], "--preset", preset, "--max_steps", "2", "--accumulation_steps", "1",
                   "--val_split", "0", "--from_weight", "none", "--out_dir", folder, *flags]  # fmt: skip
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    estimate = float(re.search(r"about ([\d.]+) GB a process", out)[1]) * 2**30
    return {"estimate": estimate, "peak": json.loads(out.strip().splitlines()[-1])["peak_memory_bytes"]}


def run(args) -> dict:
    results = {}
    for preset in args.presets:
        for stage in STAGES:
            found = measure(preset, stage, *args.flags)
            ratio = found["estimate"] / found["peak"]
            results[f"{preset} {stage}"] = {**found, "ratio": ratio}
            print(f"{preset:<18} {stage:<9} estimate {found['estimate'] / 2**30:5.2f} GB, "
                  f"peak {found['peak'] / 2**30:5.2f} GB, ratio {ratio:.2f}", flush=True)  # fmt: skip
    return results
