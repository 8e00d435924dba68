"""The folder in which cleaning works, beside its output; and what reading leaves there for the later steps."""

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

UNFINISHED = "work"  # a folder inside the new one, deleted before the new one gets its name


class Cleaned(NamedTuple):
    """The result of a worker for one batch."""

    kept: bytes  # lines of JSON, in the order of the rows
    dropped: bytes  # the same for the dropped rows, if they are kept
    origins: list[tuple[int, int, int]]  # of each kept row: file, line, characters
    keys: list[int]
    signatures: np.ndarray | None
    counts: Counter  # (file, reason) -> rows; reason "" is kept
    converted: int


@contextmanager
def new_folder(folder: Path, written: set[str]):
    """A new folder for this process alone. When the block ends it is deleted, unless `publish` has renamed it.

    written: the names that a run writes. A folder that a killed run left under this name is deleted first. UserError
    where it holds other names, because it may then be the user's.
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
    """The first name in a folder that is not one of ours, or None. A folder with such a name is never deleted."""
    return min({path.name for path in folder.iterdir()} - ours, default=None)


def publish(building: Path, out: Path, overwrite: bool):
    """Renames the finished folder to `out`. An earlier output stays until here and is deleted now."""
    shutil.rmtree(building / UNFINISHED)  # rows and fingerprints, which only this run needed
    if out.exists():
        if not overwrite and any(out.iterdir()):
            raise UserError(f"{out} appeared during this run; move it elsewhere and give the same command again")
        # The summary goes first: if a kill leaves a part of the folder, it is not taken for a finished output.
        (out / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(out)
    os.rename(building, out)


class Work:
    """What reading has found so far: rows, their origins and fingerprints in files, counts in memory."""

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
