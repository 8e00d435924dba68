"""Held-out bits per byte of the same small model on as many tokens of a collection: raw, cleaned, by v1's thresholds.

  python scripts/benchmark.py cleaning --data_path $DATA/pretrain --max_steps 300

The held-out documents are rows of the clean collection; what is equal to one of them or nearly, in either training
set, is left out, so that no side has seen them. All sides start from the same random weights, take the same number of
steps over rows of the same length, and are measured on the same documents. The runs of a seed stand side by side, so
chance of the order and of the start can be told from the effect.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.report import spread
from benchmarks.stages import read_lines, stage
from cleaning.clean import Settings, clean, row_text
from cleaning.dedup import Fingerprints, exact_key, find_copies, signature
from cleaning.filters import PROFILES
from cleaning.normalise import normalise_row
from cleaning.published_shapes import to_row
from data.files import find_files
from data.reading import dirty_rows
from data.row_shapes import BadRow, parse_record
from inference.engine import Engine
from model.weights import load_model


def add_flags(parser) -> None:
    parser.add_argument("--data_path", nargs="+", required=True)
    parser.add_argument("--heldout", type=float, default=0.02)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="handed to 1-pretrain.py; the last flag")


def raw_texts(paths):
    """Every row that has a text at all: what a user without cleaning would train on."""
    for path in paths:
        for file in find_files(path)[0]:
            for row in dirty_rows(file):
                try:
                    text = to_row(parse_record(row.raw), "text")
                except BadRow:
                    continue
                if text["text"].strip():
                    yield text


def without_heldout(rows: list[dict], heldout: list[dict], folder: Path) -> list[dict]:
    """The rows that are no copies of a held-out document."""
    texts = [row_text(normalise_row(row)) for row in heldout + rows]
    prints = Fingerprints(folder)
    for text in texts:
        prints.append([exact_key(text)], signature(text)[None])
    prints.close()
    of, _ = find_copies(prints)
    return [row for row, copied in zip(rows, of[len(heldout) :]) if not 0 <= copied < len(heldout)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return read_lines(path.read_text(encoding="utf-8"))


def bits_per_byte(weights: Path, heldout: list[dict], seq_len: int) -> float:
    model, tokenizer, _ = load_model(weights)
    return Engine(model, tokenizer).bits_per_byte([row["text"] for row in heldout], seq_len)[0]


def run(args) -> dict:
    """args: data_path (raw files, folders), heldout (share), preset, seq_len, max_steps, seeds, flags (of stage 1)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        summary = clean(args.data_path, folder / "clean", Settings(heldout=args.heldout))
        held = read(folder / "clean" / "pretrain_heldout.jsonl")
        clean(args.data_path, folder / "v1", Settings(profile=PROFILES["minimind-v1"], dedup="exact"))
        sides = {"raw": list(raw_texts(args.data_path)), "cleaned": read(folder / "clean" / "pretrain.jsonl"),
                 "minimind-v1": read(folder / "v1" / "pretrain.jsonl")}  # fmt: skip
        files = {}
        for side, rows in sides.items():
            rows = without_heldout(rows, held, folder / f"prints_{side}")
            files[side] = write(folder / f"{side}.jsonl", rows)
            print(f"{side}: {len(rows):,} rows, {sum(len(row['text']) for row in rows):,} characters", flush=True)
        bits = {side: [] for side in files}
        for seed in range(args.seeds):
            for side, data in files.items():
                result = stage("1-pretrain.py", "--data_path", data, "--preset", args.preset, "--seq_len", args.seq_len,
                               "--max_steps", args.max_steps, "--epochs", 1000, "--seed", seed, "--val_split", 0,
                               "--out_dir", folder / f"{side}_{seed}", *args.flags)  # fmt: skip
                bits[side].append(bits_per_byte(result["weights"], held, args.seq_len))
                print(f"seed {seed}, {side}: {result['tokens']:,} tokens, "
                      f"{bits[side][-1]:.4f} bits per byte", flush=True)  # fmt: skip
    return {
        "preset": args.preset, "tokens": result["tokens"], "heldout_documents": len(held),
        "dropped": summary["reasons"], "bits_per_byte": {side: spread(found) for side, found in bits.items()},
        "minus_raw": {side: spread(np.subtract(bits[side], bits["raw"]).tolist()) for side in list(bits)[1:]},
    }  # fmt: skip
