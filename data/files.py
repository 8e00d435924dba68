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
ZSTANDARD_BYTES = 2**14  # unpacked at a time; of a file made to harm they are 64 MB at most


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
        return io.BufferedReader(_Zstandard(path), 2**20)
    return open(path, "rb", buffering=2**20)


class _Zstandard(io.RawIOBase):
    """The content of a zstandard file, all its frames. (The library's own reader ends without a word behind the first
    frame, and where a frame is cut off.)"""

    def __init__(self, path):
        import zstandard

        self.new_frame, self.error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self.file, self.frame = open(path, "rb"), None
        self.packed, self.unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.unpacked:
            packed = self.packed or self.file.read(ZSTANDARD_BYTES)  # what the last frame left over comes first
            if not packed:
                if self.frame is not None:  # the file ends, the frame does not
                    raise EOFError("it is cut off: its last frame has no end")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.unpacked = memoryview(self.frame.decompress(packed))
            except self.error as error:
                raise OSError(str(error)) from None
            self.packed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        # As much as the caller has room for; the rest waits for the next call.
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


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
