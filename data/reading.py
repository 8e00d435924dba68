"""Reads training files of every kind, row by row, and brings each row into one of three shapes.

Files: .jsonl, .jsonl.gz, .jsonl.zst, .csv, .txt, .parquet. Shapes ("kinds"):
  text  a string                                       pretraining, tokenizer
  chat  [{"role", "content", ...}, ...]                SFT, LoRA, distillation, reasoning
  pair  {"chosen": messages, "rejected": messages}     preferences

Reading is split in two so that the slow half can run in other processes: `raw_rows` walks a file in one process
and yields undecoded rows, `parse` turns one of them into a shape. Memory is bounded by the longest row, and rows have
a limit (MAX_ROW_BYTES). Nothing is dropped in silence: a bad row raises BadRow with the reason in words.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from data.row_shapes import BadRow, parse, parse_record, record_text

MAX_ROW_BYTES = 64 * 2**20  # a longer "line" is a binary file or a file without line ends, not a document
TXT_DOCUMENT_CHARS = 100_000  # a longer .txt file is cut at the next blank line, at twice this at the next line end
DAMAGED = (OSError, EOFError, ValueError, zlib.error)  # what reading a damaged or cut-off file raises
UNUSABLE = (ValueError, TypeError, RecursionError)  # of a row that cannot be written: surrogates, dates, too deep
ZSTANDARD_BYTES = 2**14  # unpacked at a time; of a file made to harm they are 64 MB at most
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".txt", ".parquet")


def iter_texts(paths, skip_bad_lines=False) -> Iterator[str]:
    """The text of every row of every file, whatever its schema: for training a tokenizer or counting."""
    for path in paths:
        for line, raw in raw_rows(path):
            try:
                record = parse_record(raw)
                yield record_text(record)
            except BadRow as error:
                if not skip_bad_lines:
                    raise UserError(f"{path}:{line}: {error} (--skip_bad_lines leaves such lines out)") from None


def iter_rows(paths, kind: str) -> Iterator:
    """Every row of every file in the shape `kind`; the first bad one raises UserError with file and line."""
    for path in paths:
        for line, raw in raw_rows(path):
            try:
                yield parse(raw, kind)
            except BadRow as error:
                raise UserError(f"{path}:{line}: {error}") from None


def check_file(path) -> Path:
    """Returns the path of a readable, non-empty data file with a known ending, or raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such data file: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the data files in it")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; data files end in {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: it has no rows to learn from")
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return path


# ---------------------------------------------------------------------------------------------- files -> raw rows
def raw_rows(path) -> Iterator[tuple[int, object]]:
    """Yields (line number, raw row). A raw row is bytes (a line of JSON) or a dict (a CSV or Parquet record)."""
    path = check_file(path)
    if path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".txt":
        yield from _txt_documents(path)
    else:
        yield from _lines(path)


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
            packed = self.packed or self.file.read(ZSTANDARD_BYTES)
            if not packed:
                if self.frame is not None:
                    raise EOFError("it is cut off: its last frame has no end")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.unpacked = memoryview(self.frame.decompress(packed))
            except self.error as error:
                raise OSError(str(error)) from None
            self.packed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def _lines(path) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path) as file:
        number = 0
        try:
            while line := file.readline(MAX_ROW_BYTES):
                number += 1
                if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                    raise UserError(
                        f"{path}:{number}: a line longer than {MAX_ROW_BYTES // 2**20} MB; is it JSON lines?"
                    )
                if line.strip():
                    yield number, line
        except DAMAGED as error:
            raise UserError(f"{path}: cannot be read past line {number}: {error}") from None


def _csv_rows(path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{reader.line_num + 1}: not UTF-8 ({error.reason})") from None
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: broken CSV: {error}") from None


def _parquet_rows(path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        for number, row in parquet_rows(path):
            yield number, row
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read past row {number}: {error}") from None


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
            wanted = file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:  # errors of pyarrow's own, some of several lines
        raise OSError(str(error).partition("\n")[0]) from None
    if number != wanted:
        raise EOFError(f"it should have {wanted} rows")


def _txt_documents(path) -> Iterator[tuple[int, dict]]:
    """A .txt file is one document; a long one is cut at the first blank line after TXT_DOCUMENT_CHARS, and one without
    blank lines at the first line end after twice as many."""
    piece, size, first = [], 0, 1
    for number, line in enumerate(_txt_lines(path), start=1):
        blank = not line.strip()
        if size > 2 * TXT_DOCUMENT_CHARS or (size > TXT_DOCUMENT_CHARS and blank):
            yield first, {"text": "".join(piece)}
            piece, size, first = [], 0, number + blank
            if blank:
                continue
        piece.append(line)
        size += len(line)
    if "".join(piece).strip():
        yield first, {"text": "".join(piece)}


def _txt_lines(path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        number = 0
        try:
            while line := file.readline(MAX_ROW_BYTES):
                number += 1
                if len(line) == MAX_ROW_BYTES and not line.endswith("\n"):
                    raise UserError(f"{path}:{number}: a line longer than {MAX_ROW_BYTES // 2**20} MB; is it text?")
                yield line
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 after line {number} ({error.reason})") from None


# ---------------------------------------------------------------------------------------------- raw rows -> shapes
