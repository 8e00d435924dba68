"""Brings exams as they are published (archives, Parquet) into the folders that eval_ceval.py reads."""

import csv
import json
import zipfile
from pathlib import Path, PurePosixPath

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
    """CSV files only, by the last two parts of their names: no member can leave the folder."""
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = PurePosixPath(member.filename)
            if path.suffix != ".csv" or "__MACOSX" in path.parts:
                continue
            split = path.parent.name if path.parent.name in SPLITS else ""
            target = folder / split / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read(member))


def _write_rows(table: Path, folder: Path, split: str):
    from pyarrow import parquet

    rows = parquet.read_table(table).to_pylist()
    if rows and "answerKey" in rows[0]:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        return
    (folder / split).mkdir(exist_ok=True)
    with open(folder / split / f"{table.parent.name}_{split}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
