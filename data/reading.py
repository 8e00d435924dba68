"""Reads data files of every kind, row by row. One walk, and two ways to take what is wrong with a file:

  raw_rows    strict, for training: a file that cannot be read ends the run, a bad row is raised when it is parsed
  dirty_rows  lenient, for cleaning: a bad row, or the rest of a bad file, becomes a Dropped, and reading goes on

Reading is split in two so that the slow half can run in other processes: the walk only finds where a row begins and
ends, in one process; data/row_shapes.py makes a text, a conversation or a pair of it. Memory is bounded by the longest
row, and rows have a limit (MAX_ROW_BYTES). Nothing is left out in silence.
"""

import codecs
import csv
import io
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from data.files import DAMAGED, ENDINGS, kind_of, open_bytes, parquet_rows
from data.row_shapes import BadRow, Dropped, parse, parse_record, record_text

MAX_ROW_BYTES = 64 * 2**20  # a longer "line" is a binary file or a file without line ends, not a document
MAX_CSV_RECORD = 4 * 2**20  # characters; a longer record is a quote that does not close
TXT_DOCUMENT_CHARS = 100_000  # a longer .txt is cut at the next blank line
SNIFFED_BYTES = 65_536
ENCODINGS = ("utf-8", "gb18030")
UNREADABLE = "unreadable file"  # the reason under which a damaged or cut-off file is dropped, or its rest
FAULTS = (Dropped, *DAMAGED, RecursionError)  # of a file, not of a row
BETWEEN = " \t\r\n,\ufeff"  # what may stand between the elements of an array


class RawRow(NamedTuple):
    """`raw` is a line of JSON, a record, or why there is none; `converted` tells that it was GB18030."""

    line: int
    raw: str | dict | Dropped
    converted: bool = False


# ------------------------------------------------------------------------------------------------------ two policies
def raw_rows(path, txt_rows: str = "document") -> Iterator[tuple[int, str | dict | Dropped]]:
    """(line, raw row) of each row, strictly: UserError where the file cannot be read (further).

    A Dropped among the rows is a row that cannot be read; parse and parse_record raise it, so that a caller meets it
    with the bad rows that only parsing finds.
    """
    line = 0
    try:
        for row in _walk(check_file(path), txt_rows=txt_rows):
            line = row.line
            yield row.line, row.raw
    except FAULTS as error:
        raise UserError(f"{path}: cannot be read past row {line}: {error}") from None


def dirty_rows(path: Path, encoding: str = "utf-8", txt_rows: str = "document") -> Iterator[RawRow]:
    """Every row of a file, leniently: where it cannot be read (further), the last row is a Dropped that says so.

    encoding: "gb18030" reads what is not valid UTF-8 as GB18030, row by row, so that mixed collections work.
    txt_rows: a .txt or .md file is one "document", or each "line" is one.
    """
    line = 0
    try:
        for row in _walk(path, encoding, txt_rows):
            line = row.line
            yield row
    except FAULTS as error:
        known = isinstance(error, Dropped)
        yield RawRow(line, error if known else Dropped(UNREADABLE, f"from row {line + 1} on: {error}"))


def iter_texts(paths, skip_bad_lines=False) -> Iterator[str]:
    """The text of every row of every file, whatever its schema: for training a tokenizer or counting."""
    for path in paths:
        for line, raw in raw_rows(path):
            try:
                yield record_text(parse_record(raw))
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


def in_batches(rows, characters: int) -> Iterator[list]:
    """Lists of neighbouring rows, about so many characters a list; each row is a tuple that ends with the raw row."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row[-1] if isinstance(row[-1], str) else str(row[-1]))
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# -------------------------------------------------------------------------------------------------------------- files


def check_file(path) -> Path:
    """Returns the path of a readable, non-empty data file with a known ending, or raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such data file: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the data files in it")
    if kind_of(path) is None:
        raise UserError(f"{path}: unknown kind of file; data files end in {ENDINGS}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: it has no rows")
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return path


def columns_of(path: Path, encoding: str = "utf-8") -> list[str] | None:
    """The columns of a CSV or Parquet file; None for the kinds whose rows name their own keys, and for a file that
    cannot be read: reading says why."""
    if kind_of(path) in (".csv", ".parquet"):
        first = next(dirty_rows(path, encoding), None)
        return list(first.raw) if first and isinstance(first.raw, dict) else None
    return None


# --------------------------------------------------------------------------------------------------------------- walk
def _walk(path: Path, encoding: str = "utf-8", txt_rows: str = "document") -> Iterator[RawRow]:
    """Every row of a file of any kind. A row that cannot be read is a Dropped among them. Where the file cannot
    be read (further), raises one of FAULTS."""
    kind = kind_of(path)
    if path.stat().st_size == 0:
        raise Dropped("empty file")
    if kind == ".parquet":
        yield from (RawRow(number, record) for number, record in parquet_rows(path))
        return
    with open_bytes(path) as file:
        head = file.read(SNIFFED_BYTES)
    _refuse_binary(head)  # else each "line" of a picture would be a bad row of its own
    with open_bytes(path) as file:  # anew: a packed file cannot go back to its beginning
        if kind == ".json" and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _array_rows(file, _codec_of(head, encoding))
        elif kind in (".json", ".jsonl"):
            yield from (row for row in _lines(file, encoding) if isinstance(row.raw, Dropped) or row.raw.strip())
        elif kind == ".csv":
            yield from _csv_rows(_lines(file, encoding))
        elif txt_rows == "line":
            for row in _lines(file, encoding):
                if isinstance(row.raw, Dropped):
                    yield row
                elif row.raw.strip():
                    yield row._replace(raw={"text": row.raw})
        else:
            yield from _documents(_lines(file, encoding))


def _refuse_binary(head: bytes):
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Dropped("binary file", "UTF-16 text: convert it with iconv -f utf-16 -t utf-8")
    if b"\0" in head:
        raise Dropped("binary file", f"a zero byte at {head.index(0)}")


def _lines(file, encoding: str) -> Iterator[RawRow]:
    """Every line, its end included, each decoded alone; Dropped in the place of one that cannot be decoded, or that is
    longer than MAX_ROW_BYTES, which is passed over without being held."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        try:
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                    pass  # a megabyte at a time, to where the next line begins
                raise Dropped("line too long", f"more than {MAX_ROW_BYTES // 2**20} MB without a line end", line)
            yield RawRow(number, *_decode(line, encoding))
        except Dropped as dropped:
            yield RawRow(number, dropped)


def _decode(data: bytes, encoding: str) -> tuple[str, bool]:
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
        hint = "it is valid GB18030: data_process.py clean --encoding gb18030 converts it"
        raise Dropped("not UTF-8", f"{detail}; {hint}", data)
    return text, True


def _documents(lines) -> Iterator[RawRow]:
    """A text file is one document; a long one is cut at a blank line, which belongs to neither part.

    A line that cannot be read costs itself, not its document.
    """
    piece, size, first, converted = [], 0, 1, False
    for row in lines:
        if isinstance(row.raw, Dropped):
            yield row
            continue
        blank = not row.raw.strip()
        # Without any blank line it is cut all the same, at twice the length: memory must not grow with the file.
        if size > 2 * TXT_DOCUMENT_CHARS or (size > TXT_DOCUMENT_CHARS and blank):
            yield RawRow(first, {"text": "".join(piece)}, converted)
            piece, size, first, converted = [], 0, row.line + blank, False
            if blank:
                continue
        piece.append(row.raw)
        size += len(row.raw)
        converted |= row.converted
    if "".join(piece).strip():
        yield RawRow(first, {"text": "".join(piece)}, converted)


def _array_rows(file, codec: str) -> Iterator[RawRow]:
    """Elements of a JSON array one after another, without holding the array; `line` is the element's number."""
    decoder, number, position = json.JSONDecoder(), 0, 0
    text = io.TextIOWrapper(file, encoding=codec)
    buffer = text.read(2**20).lstrip(BETWEEN)[1:]  # behind the opening bracket
    while True:
        while position < len(buffer) and buffer[position] in BETWEEN:
            position += 1
        if buffer[position : position + 1] == "]":
            return
        try:
            record, end = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            # Most often the element is only not whole yet. What is read doubles, so a long one is parsed a few times.
            buffer, position = buffer[position:], 0
            more = text.read(max(2**20, len(buffer)))
            if not more or len(buffer) > MAX_ROW_BYTES:
                raise Dropped("not JSON", f"element {number + 1} of the array: {error.msg}") from None
            buffer += more
            continue
        row = record if isinstance(record, dict) else buffer[position:end]  # JSON that is no row: parsing says why
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


def _csv_rows(lines) -> Iterator[RawRow]:
    """Records of a CSV file; `line` is a record's first. Behind a broken one reading goes on at the next line, so one
    quote that does not close costs one row, and not all that follow.

    A header that cannot be read costs the file: a row in its place would name the columns.
    """
    csv.field_size_limit(MAX_CSV_RECORD)
    header, waiting = None, deque()  # waiting: lines that are to be read again
    while True:
        taken = []
        # A new reader for each record: one that met a broken record knows no way back to the lines it took.
        try:
            values = next(csv.reader(_record(waiting, lines, taken), strict=True), None)
        except (csv.Error, Dropped) as error:
            said = f"{'the header: ' if header is None else ''}{error}"
            dropped = error if isinstance(error, Dropped) else _broken(said, taken)
            if header is None:
                raise dropped from None
            yield RawRow(taken[0].line, dropped)
            waiting.extendleft(reversed(taken[1:]))
            continue
        if values is None:
            return
        if not values:  # a blank line
            continue
        if header is None:
            header = values
        elif len(values) != len(header):
            yield RawRow(taken[0].line, _broken(f"{len(values)} fields for {len(header)} columns", taken))
        else:
            yield RawRow(taken[0].line, dict(zip(header, values)), any(row.converted for row in taken))


def _record(waiting: deque, lines, taken: list[RawRow]) -> Iterator[str]:
    """Lines for csv.reader, which takes as many as a record has; they are noted in `taken`."""
    size = 0
    while row := waiting.popleft() if waiting else next(lines, None):
        taken.append(row)
        if isinstance(row.raw, Dropped):
            if len(taken) > 1:
                raise csv.Error(f"a quote that does not close before line {row.line}, which cannot be read")
            raise row.raw
        size += len(row.raw)
        if size > MAX_CSV_RECORD:
            raise csv.Error(f"a quote that does not close within {MAX_CSV_RECORD // 2**20} million characters")
        yield row.raw


def _broken(detail: str, taken: list[RawRow]) -> Dropped:
    return Dropped("broken CSV", detail, "".join(row.raw for row in taken if isinstance(row.raw, str)).encode())
