"""Measurements that are no tests. Each prints its figures and, last, one JSON object.

  python scripts/benchmark.py               names them
  python scripts/benchmark.py gpu --help    says what one measures, and its flags

Each is a module of benchmarks/ with add_flags(parser) and run(args) -> dict. What was measured once, and is no gate, is
in docs/ with the commit that has its command. Speeds are ratios of things that are measured in turns in one process.
Real text comes by --data_path; the documents call its folder $DATA.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch starts; --threads of a measurement changes it later
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import importlib
import json

from common.errors import UserError, run_main
from common.flags import Parser

MEASUREMENTS = {
    "engine": "generating, beside transformers",
    "lora": "a new identity by an adapter",
    "dpo": "preferences on held-out pairs",
    "reason": "well-formed thinking and right answers",
    "grpo": "right answers before and after reinforcement",
    "runtimes": "an exported model in transformers 4 and 5, llama.cpp, ONNX, OpenVINO, CTranslate2",
    "serving": "many clients at the API server for minutes",
    "recipe": "our pretraining beside MiniMind's recipe, bits per byte over time",
    "gpu": "all of it on a GPU: stages, speed, decoding, kills, exams",
}


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in MEASUREMENTS:
        for name, text in MEASUREMENTS.items():
            print(f"  {name:<11} {text}")
        if not argv or argv[0] in ("-h", "--help"):
            return
        raise UserError(f"no measurement {argv[0]!r}; the names stand above")
    measurement = importlib.import_module(f"benchmarks.{argv[0]}")
    parser = Parser(prog=f"benchmark.py {argv[0]}", description=measurement.__doc__)
    measurement.add_flags(parser)
    result = measurement.run(parser.parse_args(argv[1:]))
    print(json.dumps({"measurement": argv[0], **result}, ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
