"""The folder in which a long job works beside its output, and what reading leaves there for the steps after it."""

import os
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cleaning.dedup import Fingerprints
from common.errors import UserError
from common.files import lock, named

UNFINISHED = "work"  # the folder, in the new one, of what is deleted before the new one gets its name


class Cleaned(NamedTuple):
    """What a worker makes of a batch. Lines of JSON, ready to be written, in the order of the rows."""

    kept: bytes
    dropped: bytes
    origins: list[tuple[int, int, int]]  # of each kept row: file, line, characters
    keys: list[int]
    signatures: np.ndarray | None
    counts: Counter  # (file, reason) -> rows; reason "" is kept
    converted: int


@contextmanager
def new_folder(folder: Path, written: set[str]):
    """A new folder for this process alone. When the block ends it is deleted, unless `publish` has renamed it.

    What a killed run left under this name is deleted first; UserError where it holds more than that: written, the names
    that a run writes.
    """
    try:
        # The lock lies beside the folder, so that it is neither deleted nor published with it.
        taken = f"another run is at work in {folder}; wait for it, or name another --out_dir"
        held = lock(folder.with_name(f".{folder.stem}.lock"), taken)
        if folder.exists():  # left by a killed run, or a folder of the user's that has this name by chance
            if name := foreign(folder, written | {UNFINISHED}):
                raise UserError(
                    f"{folder} holds {name}, not written by this command; move it, or name another --out_dir"
                )
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    with held:
        try:
            with named(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def foreign(folder: Path, ours: set[str]) -> str | None:
    """The first name in a folder that is none of ours: such a folder is never deleted."""
    return min({path.name for path in folder.iterdir()} - ours, default=None)


def publish(building: Path, out: Path, overwrite: bool):
    """Renames the new folder, which is whole, to `out`. An earlier output is deleted only now."""
    shutil.rmtree(building / UNFINISHED)  # rows and fingerprints, which only this run needed
    if out.exists():
        if not overwrite and any(out.iterdir()):
            raise UserError(f"{out} appeared during this run; move it elsewhere and give the same command again")
        # Without its summary a folder does not pass for finished, should a kill leave a part of it.
        (out / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(out)
    os.rename(building, out)


class Work:
    """What reading has found so far. Rows and fingerprints in files of a folder, appended to; counts in memory."""

    def __init__(self, folder: Path, near: bool, keep_dropped: bool):
        self.folder, unfinished = folder, folder / UNFINISHED
        self.prints = Fingerprints(unfinished / "prints", near)
        self.kept_rows = open(unfinished / "rows.jsonl", "w+b")
        self.kept_origins = open(unfinished / "origins.bin", "w+b")
        self.dropped = open(folder / "dropped.jsonl", "wb") if keep_dropped else None
        self.counts: Counter = Counter()  # (file, reason) -> rows; reason "" is kept
        self.kept = self.converted = 0

    def append(self, cleaned: Cleaned):
        self.kept_rows.write(cleaned.kept)
        self.kept_origins.write(np.asarray(cleaned.origins, np.int64).tobytes())
        if self.dropped:
            self.dropped.write(cleaned.dropped)
        if cleaned.keys:
            self.prints.append(cleaned.keys, cleaned.signatures)
        self.counts += cleaned.counts
        self.kept += len(cleaned.keys)
        self.converted += cleaned.converted

    def close(self):
        self.prints.close()
        for file in filter(None, (self.kept_rows, self.kept_origins, self.dropped)):
            file.close()

    def rows(self):
        """The kept rows, lines of JSON, as a file."""
        return open(self.folder / UNFINISHED / "rows.jsonl", "rb")

    def origins(self) -> np.ndarray:
        """(n, 3) int64: file, line and characters of each kept row."""
        return np.fromfile(self.folder / UNFINISHED / "origins.bin", np.int64).reshape(-1, 3)
