"""Reads training files of every kind, row by row, and brings each row into one of three shapes.

Files: .jsonl, .jsonl.gz, .jsonl.zst, .csv, .txt, .parquet. Shapes ("kinds"):
  text  a string                                       pretraining, tokenizer
  chat  [{"role", "content", ...}, ...]                SFT, LoRA, distillation, reasoning
  pair  {"chosen": messages, "rejected": messages}     preferences

Reading is split in two so that the slow half can run in other processes: `raw_rows` walks a file in one process
and yields undecoded rows, `parse` turns one of them into a shape. Memory is bounded by the longest row, and rows have
a limit (MAX_ROW_BYTES). Nothing is dropped in silence: a bad row raises BadRow with the reason in words.
"""

import ast
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from trainer.cli import UserError

MAX_ROW_BYTES = 64 * 2**20  # a longer "line" is a binary file or a file without line ends, not a document
MAX_HISTORY_CHARS = 2**20
TXT_DOCUMENT_CHARS = 100_000  # a longer .txt file is cut at the next blank line, at twice this at the next line end
ROLES = ("system", "user", "assistant", "tool")
TOLD = ("role", "content", "reasoning_content", "tools", "tool_calls")
DAMAGED = (OSError, EOFError, ValueError, zlib.error)  # what reading a damaged or cut-off file raises
UNUSABLE = (ValueError, TypeError, RecursionError)  # of a row that cannot be written: surrogates, dates, too deep
ZSTANDARD_BYTES = 2**14  # unpacked at a time; of a file made to harm they are 64 MB at most
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".txt", ".parquet")


class BadRow(ValueError):
    """A row that cannot be used; the message says why. The caller knows file and line."""


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
def parse(raw, kind: str):
    """One raw row in the shape "text", "chat" or "pair"; raises BadRow."""
    record = parse_record(raw)
    return {"text": as_text, "chat": as_chat, "pair": as_pair}[kind](record)


def parse_record(raw) -> dict:
    """A raw row as a dict."""
    if isinstance(raw, dict):
        if None in raw:  # where csv puts what is left over
            raise BadRow("more fields than columns: quote a field that holds a comma")
        return raw
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python reads, too
        raise BadRow(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRow(f"a row must be a JSON object, not {type(record).__name__}")
    return record


def as_text(record: dict) -> str:
    """{"text": ...} -> the string."""
    text = record.get("text")
    if "text" not in record:
        raise BadRow(f'no key "text" (found: {_keys(record)})')
    if not isinstance(text, str):
        raise BadRow(f'"text" must be a string, not {"null" if text is None else type(text).__name__}')
    if not text.strip():
        raise BadRow('"text" is empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, as broken JSON writers leave it behind
        raise BadRow(f'"text": character {error.start} is no valid Unicode') from None
    return text


def as_chat(record: dict) -> list[dict]:
    """{"conversations": [...]} (or "messages"), or the columns history, q, a of MiniMind v1 -> messages.

    Tools and a system text may stand beside them, see with_beside.
    """
    if "conversations" in record or "messages" in record:
        messages = record.get("conversations", record.get("messages"))
    elif "q" in record and "a" in record:
        messages = []
        for question, answer in parse_history(record.get("history")):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages += [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]
    else:
        raise BadRow(f'no key "conversations" and no columns "q", "a" (found: {_keys(record)})')
    return with_beside(check_messages(messages), record)


def as_pair(record: dict) -> dict:
    """{"chosen": [...], "rejected": [...]}: two conversations that differ in their last message only.

    Tools and a system text may stand beside them, see with_beside.
    """
    if "chosen" not in record or "rejected" not in record:
        raise BadRow(f'no keys "chosen" and "rejected" (found: {_keys(record)})')
    chosen, rejected = check_messages(record["chosen"]), check_messages(record["rejected"])
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise BadRow("chosen and rejected must each end with an answer of the assistant")
    if len(chosen) == 1 or len(rejected) == 1:
        raise BadRow("chosen and rejected must be whole conversations: the answers stand without their prompt "
                     "(`data_process.py clean --to dpo` joins a prompt that stands beside them)")  # fmt: skip
    chosen, rejected = with_beside(chosen, record), with_beside(rejected, record)
    ours, theirs = ([_told(message) for message in messages] for messages in (chosen, rejected))
    if ours[:-1] != theirs[:-1]:
        raise BadRow("the prompts of chosen and rejected differ; they may differ in the last message only")
    if ours[-1] == theirs[-1]:
        raise BadRow("chosen and rejected are the same answer: there is nothing to prefer")
    return {"chosen": chosen, "rejected": rejected}


def _told(message: dict) -> dict:
    """What the chat template makes text of: not the scores and names that a message may carry beside it."""
    return {key: message[key] for key in TOLD if message.get(key) is not None}


def with_beside(messages: list[dict], record: dict) -> list[dict]:
    """The messages with what their row holds beside them: "tools" (OpenAI's fine-tuning rows, as the argument of its
    API) and "system" (ShareGPT's) become part of the system message that comes first.

    Raises BadRow where that message says otherwise, and for OpenAI's older "functions".
    """
    if not _nothing(record.get("functions")):
        raise BadRow('"functions" is OpenAI\'s older form of "tools", and is not read; write them as "tools"')
    beside = {key: record[key] for key in ("system", "tools") if not _nothing(record.get(key))}
    if not beside:
        return messages
    if "system" in beside and not isinstance(beside["system"], str):
        raise BadRow('"system" must be a string')
    has_one = messages[0]["role"] == "system"
    first = dict(messages[0]) if has_one else {"role": "system", "content": ""}
    for name, value in beside.items():
        key = "content" if name == "system" else name
        if not _nothing(first.get(key)) and first[key] != value:
            raise BadRow(f'"{name}" stands beside the messages, and their system message has {key} of its own')
        first[key] = value
    return [first, *messages[has_one:]]


def _nothing(value) -> bool:
    """Whether a key is as good as absent: what writers of tables put into cells without a value."""
    return value is None or isinstance(value, str | list) and value in ("", "[]", [])


def check_messages(messages) -> list[dict]:
    """Returns the messages if they can be rendered and hold at least one assistant turn, or raises BadRow."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("a conversation must be a list with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"message {i} is not an object")
        if message.get("role") not in ROLES:
            raise BadRow(f"message {i} has role {message.get('role')!r}; roles are {', '.join(ROLES)}")
        check_keys(i, message)
        calls_only = message.get("content") is None and message.get("tool_calls")  # as OpenAI writes them
        if not isinstance(message.get("content"), str) and not calls_only:
            raise BadRow(f'message {i} needs a string under "content"')
        if not isinstance(message.get("reasoning_content"), str | None):
            raise BadRow(f'message {i} needs a string under "reasoning_content"')
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("no assistant message: there is nothing to learn")
    return [message | {"content": message.get("content") or ""} for message in messages]


def check_keys(i: int, message: dict) -> None:
    """Raises BadRow for keys of a message that would change what is learned, and that are not read."""
    if message.get("function_call"):
        raise BadRow(f'message {i} has a "function_call", OpenAI\'s older form; write it as "tool_calls"')
    if message.get("role") == "assistant" and message.get("weight") not in (None, 1):
        raise BadRow(f'message {i} has "weight" {message["weight"]}, but every answer is learned; leave the row out')


def record_text(record: dict) -> str:
    """All human text of a record of any schema, messages joined by newlines; tools and calls as JSON."""
    if "text" in record:
        return as_text(record)
    if "chosen" in record:
        pair = as_pair(record)
        messages = [*pair["chosen"], pair["rejected"][-1]]
    else:
        messages = as_chat(record)
    keys = ("reasoning_content", "content", "tools", "tool_calls")
    parts = [message[key] for message in messages for key in keys if message.get(key)]
    return "\n".join(part if isinstance(part, str) else as_json(part) for part in parts)


def as_json(value) -> str:
    """JSON text of tools or calls; raises BadRow for what has none, bytes or a date of a Parquet file."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"tools or calls cannot be written as JSON: {error}") from None


def parse_history(cell) -> list:
    """MiniMind v1 keeps earlier turns as a Python literal, [[question, answer], ...]; parsed as a literal only."""
    if cell is None or cell == "":
        return []
    if isinstance(cell, str):
        if len(cell) > MAX_HISTORY_CHARS:
            raise BadRow(f"the history cell is longer than {MAX_HISTORY_CHARS} characters")
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise BadRow("the history cell is not a list of [question, answer]") from None
    if not isinstance(cell, list | tuple) or any(not isinstance(turn, list | tuple) or len(turn) != 2 for turn in cell):
        raise BadRow("the history cell is not a list of [question, answer]")
    return list(cell)


def _keys(record: dict) -> str:
    return ", ".join(map(str, list(record)[:8])) or "none"
