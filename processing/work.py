"""What a long job has done so far, on disk, so that a killed one goes on where it was."""

import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from processing.dedup import Fingerprints
from trainer.cli import UserError


class Cleaned(NamedTuple):
    """What a worker makes of a batch. Lines of JSON, ready to be written, in the order of the rows."""

    kept: bytes
    dropped: bytes
    origins: list[tuple[int, int, int]]  # of each kept row: file, line, characters
    keys: list[int]
    signatures: np.ndarray | None
    counts: Counter  # (file, reason) -> rows; reason "" is kept
    converted: int
    position: tuple[int, int]  # file and rows of it that have been read, once this batch is written


class Work:
    """The folder OUT.building: rows and fingerprints so far, and progress.json, which says how much of them counts.

    Files are only appended to. What stands behind the sizes in progress.json was written after the last checkpoint by
    a run that was killed, and is cut off. progress.json itself is replaced by renaming.
    """

    def __init__(self, folder: Path, plan: dict, near: bool, overwrite: bool):
        self.folder = folder
        record = folder / "plan.json"
        if overwrite and folder.exists() and not (folder / "replaced").exists():
            shutil.rmtree(folder)
        if record.exists() and json.loads(record.read_text(encoding="utf-8")) != plan:
            raise UserError(f"{folder} holds an unfinished run of other input or settings; --overwrite discards it")
        folder.mkdir(exist_ok=True)
        replace_file(record, json.dumps(plan, ensure_ascii=False))
        saved = folder / "progress.json"
        self.progress = {"position": [0, 0], "kept": 0, "converted": 0, "counts": {}, "bytes": {}}
        if saved.exists():
            self.progress = json.loads(saved.read_text(encoding="utf-8"))
            print(f"going on after {sum(self.progress['counts'].values()):,} rows of an interrupted run")
        self.prints = Fingerprints(folder / "prints", near)
        self.prints.truncate(self.progress["kept"])
        self.files = {}
        for name in ("rows.jsonl", "dropped.jsonl", "origins.bin"):
            self.files[name] = open(folder / name, "ab")
            self.files[name].truncate(self.progress["bytes"].get(name, 0))

    def append(self, cleaned: Cleaned):
        self.files["rows.jsonl"].write(cleaned.kept)
        self.files["dropped.jsonl"].write(cleaned.dropped)
        self.files["origins.bin"].write(np.asarray(cleaned.origins, np.int64).tobytes())
        if cleaned.keys:
            self.prints.append(cleaned.keys, cleaned.signatures)
        self.progress["position"] = list(cleaned.position)
        self.progress["kept"] += len(cleaned.keys)
        self.progress["converted"] += cleaned.converted
        for (source, reason), count in cleaned.counts.items():
            key = f"{source} {reason}"
            self.progress["counts"][key] = self.progress["counts"].get(key, 0) + count

    def checkpoint(self):
        self.prints.flush()
        for name, file in self.files.items():
            file.flush()
            self.progress["bytes"][name] = file.seek(0, os.SEEK_END)
        replace_file(self.folder / "progress.json", json.dumps(self.progress, ensure_ascii=False))

    def close(self):
        self.prints.close()
        for file in self.files.values():
            file.close()


def replace_file(path: Path, text: str):
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def new_file(path: Path):
    """A text file that appears under its name when it is whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.new")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
