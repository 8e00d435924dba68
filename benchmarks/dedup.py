"""`data_process.py clean` on many made-up documents among which edited copies are planted.

  python scripts/benchmark.py dedup --documents 2000000

Documents are drawn unit by unit with the uneven frequencies of language (Zipf over 3,000 Chinese characters), 50 to
400 units long as MiniMind's are (median about 170); one in a hundred is a copy of an earlier one, with a tenth of its
units replaced at random places. Told are the share of copies found, the share of strangers taken for copies, documents
a second of the whole command, and the most memory that the command and its workers held.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PLANTED = 100  # one document in so many
KEPT = 10_000  # earlier documents that copies are made of
BLOCK = 10_000


def add_flags(parser) -> None:
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--share", type=float, default=0.1, help="of a copy's units that is replaced (0.1)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out_dir", help="where the temporary files go")


def write_documents(path: Path, count: int, share: float, seed: int = 0) -> set[int]:
    """Writes `count` rows {"text"}; returns the line numbers (from 1) of the planted copies."""
    rng = np.random.default_rng(seed)
    frequency = 1 / (np.arange(3000) + 10)
    limits = np.cumsum(frequency / frequency.sum())
    earlier, planted, line = [], set(), 0
    with open(path, "w", encoding="utf-8") as file:
        while line < count:
            lengths = np.clip(np.exp(rng.normal(5.15, 0.5, min(BLOCK, count - line))), 64, 400).astype(int)
            units = 0x4E00 + np.searchsorted(limits, rng.random(lengths.sum())).clip(0, 2999).astype("<u4")
            for document in np.split(units, np.cumsum(lengths)[:-1]):
                line += 1
                if line % PLANTED == 0:
                    document = earlier[rng.integers(len(earlier))].copy()
                    places = rng.choice(len(document), round(share * len(document)), replace=False)
                    document[places] = 0x4E00 + rng.integers(0, 3000, len(places))
                    planted.add(line)
                elif len(earlier) < KEPT:
                    earlier.append(document.copy())  # a view would keep its whole block
                elif rng.random() < KEPT / line:  # so that copies lie near and far from their originals
                    earlier[rng.integers(KEPT)] = document.copy()
                text = document.astype("<u4").tobytes().decode("utf-32-le")
                file.write('{"text": "' + text + '"}\n')
    return planted


def run(args) -> dict:
    """args: documents, share (of the units that is replaced), workers, out_dir (None: a temporary folder)."""
    with tempfile.TemporaryDirectory(dir=args.out_dir) as folder:
        raw, out = Path(folder) / "raw.jsonl", Path(folder) / "out"
        planted = write_documents(raw, args.documents, args.share)
        size = raw.stat().st_size
        print(f"{args.documents:,} documents, {size / 2**20:,.0f} MB, {len(planted):,} of them copies", flush=True)
        command = [sys.executable, "data_process.py", "clean", "--data_path", str(raw), "--out_dir", str(out),
                   "--keep_dropped", "--workers", str(args.workers)]  # fmt: skip
        begin = time.time()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds = time.time() - begin
        summary = json.loads(done.stdout.strip().splitlines()[-1])
        dropped = set()
        with open(out / "dropped.jsonl", encoding="utf-8") as file:
            for row in map(json.loads, file):
                assert row["reason"].endswith("copy"), row["reason"]
                dropped.add(row["line"])
    found, false = len(dropped & planted), len(dropped - planted)
    result = {
        "documents": args.documents, "edited_share": args.share, "workers": args.workers,
        "found": found / len(planted), "false_hits": false / (args.documents - len(planted)),
        "documents_per_second": args.documents / seconds, "seconds": seconds, "raw_bytes": size,
        "peak_memory_bytes": summary["peak_memory_bytes"], "disk_bytes_a_document": 4 * 160 + 8 + 24,
    }  # fmt: skip
    print(
        f"found {result['found']:.2%}, false hits {result['false_hits']:.4%}, "
        f"{result['documents_per_second']:,.0f} documents/s, peak {result['peak_memory_bytes'] / 2**30:.2f} GB"
    )
    return result
