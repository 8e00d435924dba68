"""Finds raw files and walks them row by row without stopping at a bad one.

Training files are read strictly: the first bad row ends the run (data/reading.py). Raw collections are dirty by
nature, so here a bad row, or a whole bad file, becomes a Dropped with its reason and reading goes on behind it. Memory
is bounded by the longest row, and rows have a limit (MAX_ROW_BYTES).
"""

import codecs
import csv
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from data.reading import DAMAGED, MAX_ROW_BYTES, open_bytes, parquet_rows

KINDS = (".jsonl", ".json", ".csv", ".txt", ".md", ".parquet")
ARCHIVES = (".gz", ".zst")
MAX_CSV_RECORD = 4 * 2**20  # a longer record is a quote that does not close
TXT_DOCUMENT_BYTES = 300_000  # about 100,000 Chinese characters; a longer .txt is cut at the next blank line
SNIFFED_BYTES = 65_536
SHOWN_BYTES = 2_000  # of a row that cannot be read: enough to recognise it
ENCODINGS = ("utf-8", "gb18030")
UNREADABLE = "unreadable file"  # the reason under which a damaged or cut-off file is dropped, or its rest
BETWEEN = " \t\r\n,\ufeff"  # what may stand between the elements of an array


class Dropped(Exception):
    """A row that is left out. `reason` is one of a few fixed phrases, for counting; `detail` is for a reader.

    `row` is the beginning of `data`, the bytes that could not be read as a row; None where there are none.
    """

    def __init__(self, reason: str, detail: str = "", data: bytes = b""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
        self.row = data[:SHOWN_BYTES].decode("utf-8", "backslashreplace") or None


class RawRow(NamedTuple):
    """`raw` is a line of JSON, a record, or why there is none; `converted` tells that it was GB18030."""

    line: int
    raw: str | dict | Dropped
    converted: bool = False


def find_files(path) -> tuple[list[Path], list[Path]]:
    """(data files, what else there is: files of other kinds, links to folders and to nothing): the file itself, or a
    folder walked in the order of its names."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.is_file() and kind_of(path) is None:
        raise UserError(f"{path}: unknown kind of file; data files end in {', '.join(KINDS)} (.gz, .zst)")
    inside = [path] if path.is_file() else sorted(_walk(path))
    files = {file: None for file in inside if kind_of(file) and file.is_file()}  # in their order
    if not files:
        raise UserError(f"no data files in {path}; they end in {', '.join(KINDS)}")
    return list(files), [file for file in inside if file not in files]


def _walk(folder: Path) -> Iterator[Path]:
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


def raw_rows(path: Path, encoding: str = "utf-8", txt_rows: str = "document") -> Iterator[RawRow]:
    """Every row of a file of any kind.

    encoding: "gb18030" reads what is not valid UTF-8 as GB18030, row by row, so that mixed collections work.
    txt_rows: a .txt or .md file is one "document", or each "line" is one.
    """
    line = 0
    try:
        if path.stat().st_size == 0:
            raise Dropped("empty file")
        kind = kind_of(path)
        if kind != ".parquet":
            _refuse_binary(path)
        if kind == ".parquet":
            rows = (RawRow(number, record) for number, record in parquet_rows(path))
        elif kind in (".txt", ".md"):
            rows = _txt_rows(path, encoding, txt_rows)
        else:
            rows = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _line_rows}[kind](path, encoding)
        for row in rows:
            line = row.line
            yield row
    except Dropped as dropped:
        yield RawRow(line, dropped)
    except (*DAMAGED, RecursionError) as error:
        yield RawRow(line, Dropped(UNREADABLE, f"from row {line + 1} on: {error}"))


def columns_of(path: Path, encoding: str = "utf-8") -> list[str] | None:
    """The columns of a CSV or Parquet file; None for the kinds whose rows name their own keys."""
    if kind_of(path) == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            return parquet.read_schema(path).names
        except (ArrowException, *DAMAGED):
            return None  # reading says why
    if kind_of(path) == ".csv":
        first = next(iter(raw_rows(path, encoding)), None)  # a file without rows has nothing to judge
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
        raise Dropped("not UTF-8", detail, data) from None
    if encoding != "gb18030":
        raise Dropped("not UTF-8", f"{detail}; it is valid GB18030: --encoding gb18030 converts it", data)
    return text, True


def _refuse_binary(path: Path):
    with open_bytes(path) as file:
        head = file.read(SNIFFED_BYTES)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Dropped("binary file", "UTF-16 text: convert it with iconv -f utf-16 -t utf-8")
    if b"\0" in head:
        raise Dropped("binary file", f"a zero byte at {head.index(0)}")


# ---------------------------------------------------------------------------------------------------- kinds of files
def _lines(file) -> Iterator[tuple[int, bytes | Dropped]]:
    """(number, line); Dropped in place of a line above MAX_ROW_BYTES, which is passed over without being held."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) < MAX_ROW_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
            pass
        yield number, Dropped("line too long", f"more than {MAX_ROW_BYTES // 2**20} MB without a line end", line)


def _line_rows(path, encoding) -> Iterator[RawRow]:
    with open_bytes(path) as file:
        for number, line in _lines(file):
            if isinstance(line, Dropped) or line.strip():
                yield _decoded(number, line, encoding)


def _decoded(number: int, data: bytes | Dropped, encoding: str) -> RawRow:
    try:
        return RawRow(number, data) if isinstance(data, Dropped) else RawRow(number, *decode(data, encoding))
    except Dropped as dropped:
        return RawRow(number, dropped)


def _txt_rows(path, encoding, txt_rows) -> Iterator[RawRow]:
    """Documents, or lines. Each line is decoded alone: one that cannot be costs itself, not its document."""
    piece, size, first, converted = [], 0, 1, False
    with open_bytes(path) as file:
        for number, line in _lines(file):
            row = _decoded(number, line, encoding)
            if isinstance(row.raw, Dropped):
                yield row
                continue
            blank = not row.raw.strip()
            if txt_rows == "line":
                if not blank:
                    yield row._replace(raw={"text": row.raw})
                continue
            if size > 2 * TXT_DOCUMENT_BYTES or (size > TXT_DOCUMENT_BYTES and blank):
                yield RawRow(first, {"text": "".join(piece)}, converted)
                piece, size, first, converted = [], 0, number, False
            piece.append(row.raw)
            size += len(line)
            converted |= row.converted
        if "".join(piece).strip():
            yield RawRow(first, {"text": "".join(piece)}, converted)


def _json_rows(path, encoding) -> Iterator[RawRow]:
    """A .json file is one array of records, or JSON lines."""
    with open_bytes(path) as file:
        is_array = file.read(SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    yield from (_array_rows if is_array else _line_rows)(path, encoding)


def _array_rows(path, encoding) -> Iterator[RawRow]:
    """Elements of an array one after another, without holding the array; `line` is the element's number."""
    decoder, number, position = json.JSONDecoder(), 0, 0
    with open_bytes(path) as file:
        codec = _codec_of(file.read(SNIFFED_BYTES), encoding)
    with io.TextIOWrapper(open_bytes(path), encoding=codec) as file:
        buffer = file.read(2**20).lstrip(BETWEEN)[1:]
        while True:
            while position < len(buffer) and buffer[position] in BETWEEN:
                position += 1
            if buffer[position : position + 1] == "]":
                return
            try:
                record, end = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                buffer, position = buffer[position:], 0
                more = file.read(max(2**20, len(buffer)))  # doubles, so that a long element is parsed a few times only
                if not more or len(buffer) > MAX_ROW_BYTES:
                    raise Dropped("not JSON", f"element {number + 1} of the array: {error.msg}") from None
                buffer += more
                continue
            row = record if isinstance(record, dict) else buffer[position:end]  # JSON that is no row: `shapes` says why
            number, position = number + 1, end
            yield RawRow(number, row, codec != "utf-8-sig")


def _codec_of(head: bytes, encoding: str) -> str:
    """One encoding for a whole array: it has no lines to decide by."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8-sig"
    except UnicodeDecodeError:
        if encoding == "gb18030":
            return "gb18030"
        raise Dropped("not UTF-8", "an array in another encoding; --encoding gb18030 converts GB18030") from None


def _csv_rows(path, encoding) -> Iterator[RawRow]:
    """Records of a CSV file. Behind a broken one reading goes on at the next line, so one quote costs one row.

    A header that cannot be read costs the file: a row in its place would name the columns.
    """
    with open_bytes(path) as file:
        lines = _CsvLines(_lines(file), encoding)
        header = None
        while True:
            lines.begin_record()
            try:
                values = next(csv.reader(lines, strict=True), None)
            except Dropped as dropped:
                if header is None:
                    raise
                yield RawRow(lines.first, dropped)
                continue
            except csv.Error as error:
                if header is None:
                    raise Dropped("broken CSV", f"the header: {error}", lines.record()) from None
                detail = f"{error}; reading goes on at the next line"
                yield RawRow(lines.first, Dropped("broken CSV", detail, lines.record()))
                lines.back_to_second()
                continue
            if values is None:
                return
            if not values:  # a blank line
                continue
            if header is None:
                header = values
            elif len(values) != len(header):
                detail = f"{len(values)} fields for {len(header)} columns"
                yield RawRow(lines.first, Dropped("broken CSV", detail, lines.record()))
            else:
                yield RawRow(lines.first, dict(zip(header, values, strict=True)), lines.converted)


class _CsvLines:
    """The lines of a file as csv.reader wants them; remembers a record's lines, to go back when it proves broken."""

    def __init__(self, lines, encoding: str):
        csv.field_size_limit(MAX_CSV_RECORD)
        self.lines, self.encoding = lines, encoding
        self.waiting, self.taken = deque(), []
        self.first, self.converted = 0, False

    def begin_record(self):
        self.taken, self.size, self.converted = [], 0, False

    def record(self) -> bytes:
        return b"".join(line for _, line in self.taken)

    def back_to_second(self):
        self.waiting.extendleft(reversed(self.taken[1:]))

    def __iter__(self):
        return self

    def __next__(self) -> str:
        number, line = self.waiting.popleft() if self.waiting else next(self.lines)
        if not self.taken:
            self.first = number
        if isinstance(line, Dropped):
            raise line
        self.taken.append((number, line))
        self.size += len(line)
        if self.size > MAX_CSV_RECORD:
            raise csv.Error(f"a quote that does not close within {MAX_CSV_RECORD // 2**20} MB")
        text, converted = decode(line, self.encoding)
        self.converted |= converted
        return text
