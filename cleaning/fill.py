"""Fills placeholders such as {{name}} in a file of rows: identity data is shipped without a name."""

import json
import re
from collections import Counter
from pathlib import Path

from common.errors import UserError
from common.files import replaced
from data.reading import raw_rows
from data.row_shapes import UNUSABLE, parse_record

PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


def fill(path, out, values: dict[str, str]) -> dict:
    """Writes the rows of `path` to `out` (.jsonl) with each {{key}} replaced by values[key].

    Every string of a row is filled, those in lists and objects too. Raises UserError for a placeholder without a value,
    which the file then still holds, and for a value that no placeholder asks for, since that is a typing error.
    """
    path, out = Path(path), Path(out)
    if out.exists() and out.samefile(path):
        raise UserError(f"--out {out} is the input file; name another")
    if not out.name.endswith(".jsonl"):
        raise UserError(f"--out {out}: the filled rows are JSON lines; let the name end in .jsonl")
    found, rows = Counter(), 0
    for line, raw in raw_rows(path):
        found.update(PLACEHOLDER.findall(json.dumps(_record(path, line, raw), ensure_ascii=False)))
    if missing := sorted(set(found) - set(values)):
        wanted = " ".join(f"--set {name}=..." for name in missing)
        raise UserError(f"{path} also holds {_written(missing)}; add {wanted}")
    if unused := sorted(set(values) - set(found)):
        raise UserError(f"{path} has no placeholder {_written(unused)} (found: {_written(sorted(found)) or 'none'})")
    with replaced(out, text=True) as file:
        for line, raw in raw_rows(path):
            row = _filled(_record(path, line, raw), values)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows += 1
    return {"stage": "fill", "rows": rows, "filled": found.total(), "placeholders": dict(found), "out": str(out)}


def _written(names: list[str]) -> str:
    return ", ".join("{{" + name + "}}" for name in names)


def _record(path, line, raw) -> dict:
    try:
        record = parse_record(raw)
        json.dumps(record, ensure_ascii=False).encode()  # as it will be written
    except UNUSABLE as error:
        raise UserError(f"{path}:{line}: {error}") from None
    return record


def _filled(value, values: dict[str, str]):
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda match: values[match[1]], value)
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    return value
