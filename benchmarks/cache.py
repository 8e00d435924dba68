"""Tokenising a file of gigabytes: memory over all processes, cores used, and what a kill leaves behind (Linux).

The file is the given text over and over, each document under a number of its own. A process of its own tokenises it;
beside it the proportional memory (PSS) of it and its workers is read from /proc every half second. Then the same is
begun once more and killed half-way: no folder may pass for a finished cache, and no worker may live on.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.reading import raw_rows
from data.row_shapes import parse_record

ROOT = Path(__file__).resolve().parent.parent
TOKENISE = """
import sys
from model.tokenizer import load_tokenizer
from data.token_cache import tokenised
cache = tokenised(sys.argv[1], "text", load_tokenizer(), sys.argv[2], workers=int(sys.argv[3]))
print(len(cache), len(cache.tokens))
"""


def add_flags(parser) -> None:
    parser.add_argument("--data_path", nargs="+", required=True, metavar="FILE", help="text to repeat")
    parser.add_argument("--gigabytes", type=float, default=2.0, metavar="N", help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(%(default)s)")


def write_file(sources, path: Path, size: float) -> int:
    """Rows of {"text"} until the file has `size` bytes; their number."""
    texts = [parse_record(raw)["text"] for source in sources for _, raw in raw_rows(source)]
    rows = 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            for text in texts:
                file.write(json.dumps({"text": f"{rows} {text}"}, ensure_ascii=False) + "\n")
                rows += 1
    return rows


def family(pid: int) -> list[int]:
    """A process and what it has started."""
    found = [pid]
    for parent in found:
        try:
            found += [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        except OSError:
            continue
    return found


def memory_of(pid: int) -> int:
    """Bytes of a process and its workers, what they share counted once."""
    total = 0
    for one in family(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:")))
    return total


def start(file: Path, folder: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-c", TOKENISE, str(file), str(folder), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run(args) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / "text.jsonl"
        rows = write_file(args.data_path, file, args.gigabytes * 1e9)
        print(f"{rows:,} documents, {file.stat().st_size / 1e9:.2f} GB", flush=True)
        begin, peak = time.time(), 0
        process = start(file, folder / "cache", args.workers)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.5)
        seconds = time.time() - begin
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        documents, tokens = map(int, process.stdout.read().split())
        print(f"{tokens:,} tokens in {seconds:.0f} s, peak {peak / 2**30:.2f} GB", flush=True)

        process = start(file, folder / "killed", args.workers)
        time.sleep(seconds / 2)
        workers = family(process.pid)[1:]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(5)
        alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        whole = [path.name for path in (folder / "killed").iterdir() if ".building-" not in path.name]
    return {
        "gigabytes": args.gigabytes, "documents": documents, "tokens": tokens, "seconds": seconds,
        "cores_used": (usage.ru_utime + usage.ru_stime) / seconds, "peak_memory_bytes": peak,
        "workers_alive_after_a_kill": len(alive), "caches_that_pass_for_whole": len(whole),
        "passed": documents == rows and peak < 1.5e9 and not alive and not whole,
    }  # fmt: skip
