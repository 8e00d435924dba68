"""Finds raw files and walks them row by row without stopping at a bad one.

Training files are read strictly: the first bad row ends the run (trainer/read.py). Raw collections are dirty by
nature, so here a bad row, or a whole bad file, becomes a Dropped with its reason and reading goes on behind it. Memory
is bounded by the longest row, and rows have a limit (MAX_ROW_BYTES).
"""

import csv
import gzip
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.cli import UserError
from trainer.read import MAX_ROW_BYTES, open_bytes

KINDS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
ARCHIVES = (".gz", ".zst")
MAX_CSV_RECORD = 4 * 2**20  # a longer record is a quote that does not close
TXT_DOCUMENT_BYTES = 300_000  # about 100,000 Chinese characters; a longer .txt is cut at the next blank line
SNIFFED_BYTES = 65_536
ENCODINGS = ("utf-8", "gb18030")


class Dropped(Exception):
    """A row that is left out. `reason` is one of a few fixed phrases, for counting; `detail` is for a reader."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class RawRow(NamedTuple):
    """`raw` is a line of JSON, a record, or why there is none; `converted` tells that it was GB18030."""

    line: int
    raw: str | dict | Dropped
    converted: bool = False


def find_files(paths) -> tuple[list[Path], list[Path]]:
    """(data files, files of other kinds): files as they are given, folders walked in the order of their names."""
    files, others = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")
        if path.is_file() and kind_of(path) is None:
            raise UserError(f"{path}: unknown kind of file; data files end in {', '.join(KINDS)}, or these with .gz")
        inside = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in inside:
            (others if kind_of(file) is None else files).append(file)
    if not files:
        raise UserError(f"no data files in {', '.join(map(str, paths))}; they end in {', '.join(KINDS)}")
    return files, others


def kind_of(path: Path) -> str | None:
    """".jsonl" of "a.jsonl.gz"; None if the file is of no kind we read."""
    suffix = Path(path.stem).suffix if path.suffix in ARCHIVES else path.suffix
    return suffix if suffix in KINDS else None


def raw_rows(path: Path, encoding: str = "utf-8", txt_rows: str = "document") -> Iterator[RawRow]:
    """Every row of a file of any kind.

    encoding: "gb18030" reads what is not valid UTF-8 as GB18030, row by row, so that mixed collections work.
    txt_rows: a .txt file is one "document", or each "line" is one.
    """
    line = 0
    try:
        if path.stat().st_size == 0:
            raise Dropped("empty file")
        kind = kind_of(path)
        if kind == ".parquet":
            rows = _parquet_rows(path)
        else:
            _refuse_binary(path)
            rows = {".csv": _csv_rows, ".txt": _txt_rows, ".json": _json_rows, ".jsonl": _line_rows}[kind](
                path, encoding, *([txt_rows] if kind == ".txt" else [])
            )
        for row in rows:
            line = row.line
            yield row
    except Dropped as dropped:
        yield RawRow(line, dropped)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # cut off, damaged, not readable
        yield RawRow(line, Dropped("unreadable file", f"from row {line + 1} on: {error}"))
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # zstandard is imported only where a file needs it
            raise
        yield RawRow(line, Dropped("unreadable file", f"from row {line + 1} on: {error}"))


def columns_of(path: Path, encoding: str = "utf-8") -> list[str] | None:
    """The columns of a CSV or Parquet file; None for the kinds whose rows name their own keys."""
    if kind_of(path) == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        try:
            return parquet.read_schema(path).names
        except (ArrowInvalid, OSError):
            return None  # reading says why
    if kind_of(path) == ".csv":
        first = next(iter(raw_rows(path, encoding)), None)
        return list(first.raw) if first and isinstance(first.raw, dict) else None
    return None


def decode(data: bytes, encoding: str) -> tuple[str, bool]:
    """(text, whether it was GB18030). Valid UTF-8 is taken as UTF-8: Chinese GB18030 text is hardly ever valid."""
    try:
        return data.decode("utf-8-sig"), False
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start}"
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        raise Dropped("not UTF-8", detail) from None
    if encoding != "gb18030":
        raise Dropped("not UTF-8", f"{detail}; it is valid GB18030: --encoding gb18030 converts it")
    return text, True


def _refuse_binary(path: Path):
    with open_bytes(path) as file:
        head = file.read(SNIFFED_BYTES)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Dropped("binary file", "UTF-16 text: convert it with iconv -f utf-16 -t utf-8")
    if b"\0" in head:
        raise Dropped("binary file", f"a zero byte at {head.index(0)}")


# ---------------------------------------------------------------------------------------------------- kinds of files
def _lines(file) -> Iterator[tuple[int, bytes | None]]:
    """(number, line); None in place of a line above MAX_ROW_BYTES, which is passed over without being held."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) < MAX_ROW_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def _too_long() -> Dropped:
    return Dropped("line too long", f"more than {MAX_ROW_BYTES // 2**20} MB without a line end")


def _line_rows(path, encoding) -> Iterator[RawRow]:
    with open_bytes(path) as file:
        for number, line in _lines(file):
            if line is None:
                yield RawRow(number, _too_long())
            elif line.strip():
                yield _decoded(number, line, encoding)


def _decoded(number: int, data: bytes, encoding: str, wrap=None) -> RawRow:
    try:
        text, converted = decode(data, encoding)
    except Dropped as dropped:
        return RawRow(number, dropped)
    return RawRow(number, wrap(text) if wrap else text, converted)


def _txt_rows(path, encoding, txt_rows) -> Iterator[RawRow]:
    def document(text):
        return {"text": text}

    piece, size, first = [], 0, 1
    with open_bytes(path) as file:
        for number, line in _lines(file):
            if line is None:
                yield RawRow(number, _too_long())
                continue
            if txt_rows == "line":
                if line.strip():
                    yield _decoded(number, line, encoding, document)
                continue
            blank = not line.strip()
            if size > 2 * TXT_DOCUMENT_BYTES or (size > TXT_DOCUMENT_BYTES and blank):
                yield _decoded(first, b"".join(piece), encoding, document)
                piece, size, first = [], 0, number
            piece.append(line)
            size += len(line)
        if b"".join(piece).strip():
            yield _decoded(first, b"".join(piece), encoding, document)


def _json_rows(path, encoding) -> Iterator[RawRow]:
    """A .json file is one array of records, or JSON lines."""
    with open_bytes(path) as file:
        is_array = file.read(SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    yield from (_array_rows if is_array else _line_rows)(path, encoding)


def _array_rows(path, encoding) -> Iterator[RawRow]:
    """Elements of an array one after another, without holding the array; `line` is the element's number."""
    decoder, buffer, number, block = json.JSONDecoder(), "", 0, 2**20
    with open_bytes(path) as file:
        data = file.read(block)
        pieces = _text_blocks(file, data, encoding, block)
        buffer = next(pieces).lstrip("\ufeff \t\r\n").removeprefix("[")
        for piece in [*[""], *()] if False else pieces:
            buffer += piece
    yield from ()
