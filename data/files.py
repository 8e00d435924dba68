"""Data files: found in a folder, opened where they are packed, the rows of Parquet files. Damage is always an error."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".txt", ".md", ".parquet")
ARCHIVES = (".gz", ".zst")
ENDINGS = f"{', '.join(KINDS)} (.gz, .zst)"
DAMAGED = (OSError, EOFError, ValueError, zlib.error)  # what reading a damaged or cut-off file raises


def find_files(path) -> tuple[list[Path], list[Path]]:
    """(data files, what else there is: files of other kinds, links to folders and to nothing): the file itself, or a
    folder walked in the order of its names."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.is_file() and kind_of(path) is None:
        raise UserError(f"{path}: unknown kind of file; data files end in {ENDINGS}")
    inside = [path] if path.is_file() else sorted(_files_in(path))
    files = {file: None for file in inside if kind_of(file) and file.is_file()}  # in their order
    if not files:
        raise UserError(f"no data files in {path}; they end in {ENDINGS}")
    return list(files), [file for file in inside if file not in files]


def _files_in(folder: Path) -> Iterator[Path]:
    """All files in a folder and those in it (pathlib passes over one that cannot be read without a word), and links to
    folders, which may lead in a circle and are not followed."""

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse):
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        yield from (Path(place) / name for name in (*links, *names))


def kind_of(path: Path) -> str | None:
    """The ending that counts, ".jsonl" of "a.jsonl.gz"; None if the file is of no kind we read."""
    name = Path(path.name.lower())
    suffix = Path(name.stem).suffix if name.suffix in ARCHIVES else name.suffix
    return suffix if suffix in KINDS else None


def open_bytes(path):
    """Opens a plain, gzip or zstandard file for reading bytes."""
    path = Path(path)
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        # pyarrow's reader goes on with the next frame where one ends, and raises where the file is cut off. What it has
        # unpacked of the block that it was asked for is lost then, so the blocks are small.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"), 2**13)
    return open(path, "rb", buffering=2**20)


def parquet_rows(path) -> Iterator[tuple[int, dict]]:
    """(number, row) of each row; one of DAMAGED where the file is no Parquet file, or no whole one."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
            wanted = file.metadata.num_rows  # pyarrow reads a file with damaged counts without an error
    except (pyarrow.ArrowException, OSError) as error:  # errors of pyarrow's own, some of several lines
        raise OSError(str(error).partition("\n")[0]) from None
    if number != wanted:
        raise EOFError(f"it should have {wanted} rows")
