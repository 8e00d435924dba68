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

    UserError for a placeholder without a value, which the file would still hold, and for a value that no placeholder
    asks for, which is a typing error. Nothing is written then.
    """
    path, out = Path(path), Path(out)
    if out.exists() and out.samefile(path):
        raise UserError(f"--out {out} is the input file; name another")
    if not out.name.endswith(".jsonl"):
        raise UserError(f"--out {out}: the filled rows are JSON lines; let the name end in .jsonl")
    # The values as they stand inside a JSON string: quotes, backslashes and line ends are escaped.
    escaped = {key: json.dumps(value, ensure_ascii=False)[1:-1] for key, value in values.items()}
    found, rows = Counter(), 0
    with replaced(out, text=True) as file:
        for line, raw in raw_rows(path):
            try:
                text = json.dumps(parse_record(raw), ensure_ascii=False)
                text.encode()  # half of a surrogate pair cannot be written
            except UNUSABLE as error:
                raise UserError(f"{path}:{line}: {error}") from None
            found.update(PLACEHOLDER.findall(text))
            # A placeholder without a value stays for now: it is named below, with all others.
            file.write(PLACEHOLDER.sub(lambda match: escaped.get(match[1], match[0]), text) + "\n")
            rows += 1
        # Checked inside the block: an error here leaves no file, or the one that was there.
        if missing := sorted(set(found) - set(values)):
            wanted = " ".join(f"--set {name}=..." for name in missing)
            raise UserError(f"{path} also holds {_written(missing)}; add {wanted}")
        if unused := sorted(set(values) - set(found)):
            there = _written(sorted(found)) or "none"
            raise UserError(f"{path} has no placeholder {_written(unused)} (found: {there})")
    return {"stage": "fill", "rows": rows, "filled": found.total(), "placeholders": dict(found), "out": str(out)}


def _written(names: list[str]) -> str:
    return ", ".join("{{" + name + "}}" for name in names)
