"""Brings exams as they are published (archives, Parquet) into the folders that eval_ceval.py reads."""

import csv
import json
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from common.errors import RunFailed
from common.files import replaced
from data.files import DAMAGED, parquet_rows

SPLITS = ("dev", "val", "test", "train")


def arrange(folder) -> int:
    """Unpacks <name>.zip and <subject>/<split>-*.parquet under `folder` into <split>/<subject>_<split>.csv.

    OpenBookQA's columns become <split>.jsonl. Returns the number of files of questions in the folder.
    """
    folder = Path(folder)
    for archive in sorted(folder.glob("*.zip")):
        _unzip(archive, folder)
    for table in sorted(folder.rglob("*.parquet")):
        split = table.name.split("-")[0]
        if split in SPLITS:
            _write_rows(table, folder, split)
    return sum(1 for pattern in ("*/*.csv", "*.csv", "*.jsonl") for _ in folder.glob(pattern))


def _unzip(archive: Path, folder: Path):
    """Unpacks CSV files only, under the last two parts of their names, so that none is written outside the folder."""
    with _told_of(archive):
        file = zipfile.ZipFile(archive)
    with file:
        for member in file.infolist():
            path = PurePosixPath(member.filename)
            if path.suffix != ".csv" or "__MACOSX" in path.parts:
                continue
            split = path.parent.name if path.parent.name in SPLITS else ""
            target = folder / split / path.name
            with _told_of(archive):
                content = file.read(member)
            with replaced(target) as copy:
                copy.write(content)


def _write_rows(table: Path, folder: Path, split: str):
    with _told_of(table):
        rows = [row for _, row in parquet_rows(table)]
    if rows and "answerKey" in rows[0]:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with replaced(folder / f"{split}.jsonl", text=True) as file:
            file.writelines(lines)
        return
    with replaced(folder / split / f"{table.parent.name}_{split}.csv", text=True) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def _told_of(path: Path):
    """A context around reading a downloaded file: damage becomes one line that says what to do."""
    try:
        yield
    except (zipfile.BadZipFile, RuntimeError, *DAMAGED) as error:  # RuntimeError: of a kind that is not read, encrypted
        raise RunFailed(f"{path} cannot be unpacked ({error}); delete it and give the same command again") from None
