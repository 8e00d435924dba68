"""What a long job has done so far, on disk, so that a killed one goes on where it was."""

import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cleaning.dedup import Damaged, Fingerprints, cut
from common.errors import UserError
from common.files import lock

OURS = {"lock", "plan.json", "plan.json.new", "progress.json", "progress.json.new", "rows.jsonl", "dropped.jsonl",
        "origins.bin", "prints", "out", "replaced"}  # fmt: skip


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


@contextmanager
def locked(folder: Path):
    """The folder, made where there is none, for this process alone."""
    try:
        folder.mkdir(exist_ok=True)
        file = lock(folder / "lock", f"another run is at work in {folder}; wait for it, or name another --out_dir")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    with file:
        yield
    if os.name == "nt" and not (folder / "plan.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # Windows deletes no open file: `remove` left the lock


def plan_of(folder: Path) -> dict | None:
    """The plan of an unfinished run; None for a folder that is new, or was about to be deleted."""
    try:
        return json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def foreign(folder: Path, ours: set[str]) -> str | None:
    """The first name in a folder that is none of ours: such a folder is never deleted."""
    return min({path.name for path in folder.iterdir()} - ours, default=None)


def empty(folder: Path):
    """Deletes all but the lock. The plan goes first: what a kill leaves behind without it counts for nothing."""
    (folder / "plan.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def remove(folder: Path):
    """Deletes the folder of a run that has ended."""
    empty(folder)
    shutil.rmtree(folder, ignore_errors=True)  # a network disk keeps the lock until it is closed


class Work:
    """The folder OUT.building: rows and fingerprints so far, and progress.json, which says how much of them counts.

    Files are only appended to. What stands behind the sizes in progress.json was written after the last checkpoint by
    a run that was killed, and is cut off; a file that is shorter means that the folder was damaged, and work begins
    anew. progress.json itself is replaced by renaming. Between `locked` and its end nobody else changes the folder.
    """

    def __init__(self, folder: Path, plan: dict, near: bool, overwrite: bool):
        self.folder, earlier = folder, plan_of(folder)
        if earlier not in (None, plan) and not overwrite:
            raise UserError(f"{folder} holds an unfinished run of other input or settings; --overwrite discards it")
        if earlier != plan:
            if name := foreign(folder, OURS):
                raise UserError(f"{folder} holds {name}, not written by this command; name another --out_dir")
            empty(folder)
        try:
            self._open(near)
        except Damaged as why:
            print(f"{why}: beginning again")
            self.close()
            empty(folder)
            self._open(near)
        if rows := sum(self.progress["counts"].values()):
            print(f"going on after {rows:,} rows of an interrupted run")
        replace_file(folder / "plan.json", json.dumps(plan, ensure_ascii=False))

    def _open(self, near: bool):
        saved = self.folder / "progress.json"
        self.progress = {"position": [0, 0], "kept": 0, "converted": 0, "counts": {}, "bytes": {}}
        self.prints = Fingerprints(self.folder / "prints", near)
        names = ("rows.jsonl", "dropped.jsonl", "origins.bin")
        self.files = {name: open(self.folder / name, "ab") for name in names}
        try:
            self.progress |= json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
        except ValueError:
            raise Damaged(f"{saved} is not JSON") from None
        self.prints.truncate(self.progress["kept"])
        for name, file in self.files.items():
            cut(file, self.progress["bytes"].get(name, 0))

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
