"""Learns a vocabulary from text files of any kind the project reads, and measures it on documents it did not see.

    python scripts/train_tokenizer.py --data_path a.jsonl.gz:2 b.csv --vocab_size 6400 --out_dir out/tokenizer

A number after the file's name is its weight: 2 counts every document twice, 0.5 counts every second one (chosen by
the hash of its text), 0 holds the whole file out. A byte-pair vocabulary is made from counts of pairs alone, so the
weights decide what it fits. `model/minimind_tokenizer` was made by this script; docs/tokenizer.md has the command.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from common.errors import UserError, run_main
from data.reading import check_file, iter_texts
from model.tokenizer import encode_texts, load_tokenizer
from model.tokenizer_files import save_tokenizer, tokenizer_hash
from model.vocabulary import DEFAULT_VOCAB_SIZE, MIN_VOCAB_SIZE, train_tokenizer

DEFAULT_FILES = ("dataset/tokenizer_train.jsonl", "dataset/pretrain_hq.jsonl")  # MiniMind's names
SAMPLE_FILES = ("dataset/sample/pretrain.jsonl", "dataset/sample/sft.jsonl")
HELD_OUT_CHARS = 1_000_000  # of one file that are kept to measure on
# Every turn of a conversation begins with a role's name. Each document adds the three once, so that each is one token.
HEADERS = "system\nuser\nassistant\n"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", nargs="+", metavar="FILE[:WEIGHT]", help="jsonl, gz, zst, csv, txt, parquet")
    parser.add_argument("--vocab_size", type=int, default=DEFAULT_VOCAB_SIZE)
    parser.add_argument("--out_dir", default="out/tokenizer")
    limit_help = "MB of text read from each file, 0 for all of it; a MB takes about 45 MB of memory"
    parser.add_argument("--limit_mb", type=float, default=64, help=limit_help)
    parser.add_argument("--val_split", type=float, default=0.01, help="share of documents held out to measure on")
    parser.add_argument("--compare", nargs="+", default=[], metavar="FOLDER", help="other tokenizers for the table")
    parser.add_argument("--skip_bad_lines", action="store_true", help="leave out rows that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace another tokenizer in --out_dir")
    args = parser.parse_args(argv)
    if args.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"--vocab_size must be at least {MIN_VOCAB_SIZE}: 16 special tokens and 256 bytes")
    if not 0 <= args.val_split < 1:
        raise UserError(f"--val_split must be at least 0 and less than 1, not {args.val_split}")
    if args.limit_mb < 0:
        raise UserError(f"--limit_mb must not be negative, not {args.limit_mb}")
    return args


def main(argv=None):
    args = parse_args(argv)
    files = [split_weight(name) for name in args.data_path or default_files()]
    others = {Path(folder).name: open_tokenizer(folder) for folder in args.compare}
    check_out_dir(args)
    started = time.monotonic()
    corpus = Corpus(files, args.val_split, args.limit_mb * 1e6, args.skip_bad_lines)
    tokenizer = train_tokenizer(corpus, args.vocab_size)
    if not corpus.documents and not any(corpus.held_out.values()):
        raise UserError(f"no text to learn from in {', '.join(path for path, _ in files)}")
    if corpus.documents == 0:
        raise UserError("every document was held out: nothing was learned; lower --val_split or raise the weights")
    if len(tokenizer) < args.vocab_size:
        print(
            f"WARNING: the text is used up at {len(tokenizer)} entries, fewer than {args.vocab_size}", file=sys.stderr
        )
    save(tokenizer, args)
    chars_per_token = print_table(corpus.held_out, {"new": tokenizer, **others})
    record = {
        "vocab_size": len(tokenizer),
        "documents": corpus.documents,
        "characters": corpus.characters,
        "chars_per_token": chars_per_token,
        "out_dir": args.out_dir,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(record))


def default_files() -> list[str]:
    for name in DEFAULT_FILES:
        if Path(name).exists():
            print(f"--data_path not given: learning from {name}", file=sys.stderr)
            return [name]
    print(
        f"--data_path not given and no {DEFAULT_FILES[0]}: LEARNING FROM THE SMALL EMBEDDED SAMPLE "
        f"({', '.join(SAMPLE_FILES)}); good for a try, not for use",
        file=sys.stderr,
    )
    return list(SAMPLE_FILES)


def split_weight(name: str) -> tuple[str, float]:
    """ "file.jsonl:2" -> ("file.jsonl", 2.0); no number means 1."""
    path, _, number = name.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        path, weight = name, 1.0
    if not path or Path(name).exists():
        path, weight = name, 1.0
    if not 0 <= weight < 1000:
        raise UserError(f"{name}: a weight lies between 0 and 1000")
    check_file(path)
    return path, weight


def open_tokenizer(folder: str):
    try:
        return load_tokenizer(folder)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_out_dir(args) -> None:
    """UserError, before the work, where the result could not be saved."""
    folder = Path(args.out_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out_dir {folder} is a file")
    if (folder / "tokenizer.json").exists() and not args.overwrite:
        size = len(open_tokenizer(folder))
        if size != args.vocab_size:
            raise UserError(f"{folder} holds a tokenizer of {size} entries; --overwrite replaces it")
        print(f"{folder} holds a tokenizer; unless this run gives the same, it is kept (--overwrite)", file=sys.stderr)


def save(tokenizer, args) -> None:
    folder = Path(args.out_dir)
    guarded = (folder / "tokenizer.json").exists() and not args.overwrite
    if guarded and tokenizer_hash(open_tokenizer(folder)) != tokenizer_hash(tokenizer):
        raise UserError(f"{folder} holds a different tokenizer, which was kept; --overwrite replaces it")
    save_tokenizer(tokenizer, folder)


class Corpus:
    """Iterates over the texts to learn from, each as often as its file's weight says; keeps the held-out ones."""

    def __init__(self, files, val_split: float, limit_bytes: float, skip_bad_lines: bool):
        self.files, self.val_split = files, val_split
        self.limit_bytes, self.skip_bad_lines = limit_bytes, skip_bad_lines
        self.documents = self.characters = 0  # learned from, repeats not counted
        self.held_out: dict[str, list[str]] = {path: [] for path, _ in files}

    def __iter__(self):
        with tqdm(desc="reading", unit=" documents", file=sys.stderr) as bar:
            for path, weight in self.files:
                yield from self._file(path, weight, bar)
        print("merging pairs (a minute for 50 MB of text on two cores)", file=sys.stderr)

    def _file(self, path: str, weight: float, bar):
        size = kept = 0
        for text in iter_texts([path], self.skip_bad_lines):
            bar.update()
            size += len(text.encode("utf-8", "replace"))
            if self.limit_bytes and size > self.limit_bytes:
                print(f"{path}: read the first {self.limit_bytes / 1e6:g} MB of text (--limit_mb)", file=sys.stderr)
                break
            # The hash of the text decides, so a document is on the same side in every run, and so are its copies.
            chance, other_chance = hash_numbers(text)
            if weight == 0 or chance < self.val_split:
                if kept < HELD_OUT_CHARS:
                    kept += len(text)
                    self.held_out[path].append(text)
                continue
            # Weight 2.3: twice, and a third time for 30% of the documents.
            times = int(weight) + (other_chance < weight % 1)
            if times:
                self.documents += 1
                self.characters += len(text)
                yield from [text] * times
                yield HEADERS


def hash_numbers(text: str) -> tuple[float, float]:
    """Two independent numbers in [0, 1) that depend on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32, int.from_bytes(digest[4:8], "big") / 2**32


def print_table(held_out: dict[str, list[str]], tokenizers: dict) -> float | None:
    """Characters a token on held-out documents, by file and pooled; returns the new tokenizer's over all files."""
    pools = {"Chinese files": [], "other files": [], "all files": []}
    print(f"characters per token on held-out documents | {'characters':>10} | " + " | ".join(tokenizers))
    for path, texts in held_out.items():
        if texts:
            chars = sum(map(len, texts))
            row = [chars, *(sum(map(len, encode_texts(tokenizer, texts))) for tokenizer in tokenizers.values())]
            pools["Chinese files" if is_chinese(texts) else "other files"].append(row)
            pools["all files"].append(row)
            print_row(Path(path).name, row)
    if not pools["all files"]:
        print("no document was held out; raise --val_split for a table", file=sys.stderr)
        return None
    for name, rows in pools.items():
        if rows:
            total = [sum(column) for column in zip(*rows, strict=True)]
            print_row(name, total)
    return round(total[0] / total[1], 4)


def print_row(name: str, row: list[int]) -> None:
    chars, *tokens = row
    print(f"{name:42} | {chars:10} | " + " | ".join(f"{chars / n:.3f}" for n in tokens))


def is_chinese(texts: list[str]) -> bool:
    """True if at least a fifth of all that is no blank are Chinese characters (Chinese prose has four fifths)."""
    text = "".join("".join(texts).split())
    return 5 * sum("\u4e00" <= char <= "\u9fff" for char in text) >= len(text)


if __name__ == "__main__":
    run_main(main)
