"""Raw collections -> clean stage files: read, normalise, filter, remove copies, hold out, mix, write.

The rows of a folder go through three steps:

  read    every row becomes a row of the wanted shape or is dropped with a reason (`clean_row`, on all cores or on a
          cluster); kept rows and their fingerprints go to files, because memory must not grow with the collection
  find    the copies among them (cleaning/dedup.py)
  write   the files of the stage

All of it happens in the folder OUT.building, which is renamed to OUT when it is whole; a killed run begins again. What
is written depends on the input, the settings and the seed only, not on the number of workers.
"""

import hashlib
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cleaning.dedup import THRESHOLD, exact_key, find_copies, signature
from cleaning.filters import PROFILES, Profile, check_row
from cleaning.normalise import normalise_row
from cleaning.published_shapes import check_rendering, knows, to_row
from cleaning.work import Cleaned, Work, foreign, new_folder, publish
from common.errors import UserError
from common.workers import Pool, peak_memory
from data.files import find_files
from data.reading import UNREADABLE, columns_of, dirty_rows, in_batches
from data.row_shapes import BadRow, parse_record

SHAPE = {"pretrain": "text", "sft": "chat", "dpo": "pair", "tokenizer": "any"}  # of a stage's rows
BATCH_CHARS = 2**17  # handed to a worker at a time: large enough to hide the hand-over
WRITTEN = {"summary.json", "dropped.jsonl", *(f"{to}{end}.jsonl" for to in SHAPE for end in ("", "_heldout"))}


@dataclass(frozen=True)
class Settings:
    """What decides the output, beside the input."""

    to: str = "pretrain"
    profile: Profile = PROFILES["default"]
    encoding: str = "utf-8"
    txt_rows: str = "document"
    text_key: str | None = None
    dedup: str = "near"  # near, exact or none
    threshold: float = THRESHOLD
    heldout: float = 0.0  # share of the rows that goes to a file of its own
    weights: tuple[float, ...] = ()  # copies of each row of a path in data_path; 0.5 takes half of the rows
    keep_dropped: bool = False
    seed: int = 42


# ----------------------------------------------------------------------------------------------- functions over rows
def clean_row(raw: str | dict, settings: Settings) -> dict:
    """One raw row in its stage's shape, normalised and found good; raises BadRow. The whole of cleaning for a row."""
    row = normalise_row(to_row(parse_record(raw), SHAPE[settings.to], settings.text_key))
    check_rendering(row)
    check_row(row, settings.profile)
    return row


def row_text(row: dict) -> str:
    """All text by which rows are compared and counted."""
    if "text" in row:
        return row["text"]
    messages = row["conversations"] if "conversations" in row else [*row["chosen"], row["rejected"][-1]]
    parts = [part for m in messages for part in (m.get("reasoning_content"), m["content"], m.get("tool_calls")) if part]
    return "\n".join(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)


def clean_batch(batch, files: list[str], settings: Settings) -> Cleaned:
    """[(file, line, whether it was GB18030, raw row), ...] -> Cleaned. Runs in a worker.

    The worker also turns rows into lines and fingerprints, so that the one process that writes has little to do.
    """
    kept, dropped, origins, keys, signatures, counts, converted = [], [], [], [], [], Counter(), 0
    for source, line, was_gb18030, raw in batch:
        try:
            row = clean_row(raw, settings)
        except BadRow as why:
            counts[source, why.reason] += 1
            if settings.keep_dropped:
                dropped.append(dropped_line(why.reason, why.detail, files[source], line, raw))
            continue
        text = row_text(row)
        counts[source, ""] += 1
        converted += was_gb18030
        kept.append(json_line(row))
        origins.append((source, line, len(text)))
        keys.append(exact_key(text))
        if settings.dedup == "near":
            signatures.append(signature(text))
    stacked = np.stack(signatures) if signatures else None
    return Cleaned(b"".join(kept), b"".join(dropped), origins, keys, stacked, counts, converted)


def json_line(row: dict) -> bytes:
    """A line of JSON; dates and bytes, which only a dropped row of a Parquet file can hold, as Python writes them."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def dropped_line(reason: str, detail: str, file: str, line: int, row) -> bytes:
    row = row.row if isinstance(row, BadRow) else row
    return json_line({"reason": reason, "detail": detail, "file": file, "line": line, "row": row})


# -------------------------------------------------------------------------------------------------------- the command
def clean(paths, out_dir, settings: Settings, workers: int = 1, overwrite: bool = False, engine=None) -> dict:
    """Cleans files and folders into the new folder out_dir; returns the summary that is also written there.

    engine: what runs clean_batch in the place of a pool of `workers` processes, see cleaning/cluster.py.
    """
    begin, out, engine = time.monotonic(), Path(out_dir), engine or Pool(workers)
    files, others, weights = _inputs(paths, settings)
    _check_places(paths, files, out)
    if others:
        first = ", ".join(path.name for path in others[:3]) + (", ..." if len(others) > 3 else "")
        print(f"{len(others):,} files of other kinds, or links, not read: {first}")
    _check_out(out, overwrite)
    with new_folder(out.with_name(f"{out.name}.building"), WRITTEN) as building:
        work = Work(building, settings.dedup == "near", settings.keep_dropped)
        try:
            _read(work, files, settings, engine)
        finally:
            work.close()
        for name, rows in _damaged(files, work.counts).items():
            print(f"warning: {name} cannot be read to its end, only {rows:,} rows of it", file=sys.stderr)
        read_seconds = time.monotonic() - begin
        if not work.kept:
            reasons = _by_reason(work.counts).most_common(5)
            why = ", ".join(f"{count:,} x {reason}" for reason, count in reasons) or "the files hold no rows"
            raise UserError(f"no row is left: {why}")
        rows = work.counts.total()  # before copies are taken out; every row, kept or dropped
        summary = _write(work, files, others, weights, settings)
        publish(building, out, overwrite)
    seconds = time.monotonic() - begin
    return summary | {
        "out_dir": str(out), "workers": engine.workers, "seconds": round(seconds, 1),
        "read_seconds": round(read_seconds, 1), "documents_per_second": round(rows / seconds, 1),
        "peak_memory_bytes": peak_memory(engine.held_here),
    }  # fmt: skip


def _inputs(paths, settings: Settings) -> tuple[list[Path], list[Path], list[float]]:
    """(data files, files of other kinds, the weight of each data file)."""
    if settings.weights and len(settings.weights) != len(paths):
        raise UserError(f"--weights has {len(settings.weights)} numbers for {len(paths)} paths; give one for each")
    if not all(0 <= weight < math.inf for weight in settings.weights):
        raise UserError("--weights are copies of a row: each a number, 0 or more")
    if settings.weights and not any(settings.weights):
        raise UserError("--weights are all 0: nothing would be written")
    files, others, weights = [], [], []
    for i, path in enumerate(paths):
        found, unknown = find_files(path)
        files, others = files + found, others + unknown
        weights += [settings.weights[i] if settings.weights else 1.0] * len(found)
    weight_of = {}  # a file can be named twice, by itself and by its folder
    for file, weight in zip(files, weights):
        if weight_of.setdefault(file.resolve(), weight) != weight:
            raise UserError(f"{file} is given twice with different --weights; name it once")
    for file in files:  # an hour's work should not end in "no row is left" for a column's name
        columns = columns_of(file, settings.encoding)
        if columns is not None and not knows(columns, SHAPE[settings.to], settings.text_key):
            raise UserError(
                f"{file} has no column for --to {settings.to} (its columns: {', '.join(columns)}); "
                "--text_key names the column of the text"
            )
    return files, others, weights


def _check_places(paths, files, out: Path):
    """The output must stand apart from the input, or the next run would read it, or delete what it reads."""
    if out.name in ("", ".."):
        raise UserError(f"--out_dir {out}: give the new folder a name")
    target = out.resolve()
    for path in map(Path, paths):
        if path.is_dir() and target.is_relative_to(path.resolve()):
            raise UserError(f"the output folder {out} lies inside the input folder {path}; name one outside it")
    for file in files:
        if file.resolve().is_relative_to(target) or file.resolve().is_relative_to(f"{target}.building"):
            raise UserError(f"the input {file} lies inside the output folder {out}; name another --out_dir")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out}: cannot make {target.parent}: {error.strerror}") from None


def _check_out(out: Path, overwrite: bool):
    """UserError where something stands at the place of the output that must not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = json.loads((out / "summary.json").read_text(encoding="utf-8"))["stage"] == "clean"
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{out} exists and was not written by this command; name a new folder with --out_dir")
    if name := foreign(out, WRITTEN):
        raise UserError(f"{out} holds {name}, not written by this command; move it elsewhere")
    if not overwrite:
        raise UserError(f"{out} holds the output of an earlier run; --overwrite replaces it")


def _read(work: Work, files: list[Path], settings: Settings, engine):
    batches = in_batches(_raw_rows(files, settings), BATCH_CHARS)
    names = [str(file) for file in files]
    with tqdm(desc="cleaning", unit=" rows", disable=not sys.stderr.isatty(), leave=False) as bar:
        for cleaned in engine.map(clean_batch, batches, names, settings):
            work.append(cleaned)
            bar.update(cleaned.counts.total())


def _raw_rows(files: list[Path], settings: Settings):
    for source, file in enumerate(files):
        for row in dirty_rows(file, settings.encoding, settings.txt_rows):
            yield source, row.line, row.converted, row.raw


def _damaged(files, counts: Counter) -> dict[str, int]:
    """{name: rows that were read} of the files whose rest could not be."""
    found = [source for source, reason in counts if reason == UNREADABLE]  # one such entry, which is no row
    return {str(files[i]): sum(n for (source, _), n in counts.items() if source == i) - 1 for i in found}


# -------------------------------------------------------------------------------------------------------------- write
def _write(work: Work, files, others, weights, settings: Settings) -> dict:
    """Writes the stage's files and summary.json into the folder -> the summary."""
    of, similarity = np.full(work.kept, -1), np.zeros(work.kept)
    if settings.dedup != "none":
        of, similarity = find_copies(work.prints, settings.threshold)
    written, characters = _write_rows(work, files, weights, of, similarity, settings)
    by_file, reasons = {}, _by_reason(work.counts)
    for (source, reason), count in work.counts.items():
        by_file.setdefault(str(files[source]), Counter())[reason or "kept"] += count
    kept = reasons.pop("")
    summary = {
        "stage": "clean", "to": settings.to, "rows": kept + reasons.total(), "kept": kept, "dropped": reasons.total(),
        "reasons": dict(reasons.most_common()), "written": written, "characters": characters,
        "converted_from_gb18030": work.converted, "seed": settings.seed,
        "files_not_read": [str(path) for path in others], "files_damaged": _damaged(files, work.counts),
        "by_file": {name: dict(found) for name, found in by_file.items()}, "settings": asdict(settings),
    }  # fmt: skip
    (work.folder / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1), "utf-8")
    return summary


def _write_rows(work: Work, files, weights, of, similarity, settings: Settings) -> tuple[dict, dict]:
    """Writes each row that is no copy, `weight` times; moves the counts of copies from kept to dropped.

    -> (rows in each file, characters in each).
    """
    keys, origins, counts, folder = work.prints.keys(), work.origins(), work.counts, work.folder
    outputs = {"": open(folder / f"{settings.to}.jsonl", "wb")}
    if settings.heldout:
        outputs["heldout"] = open(folder / f"{settings.to}_heldout.jsonl", "wb")
    if settings.keep_dropped:
        outputs["dropped"] = open(folder / "dropped.jsonl", "ab")  # reading has begun it
    written, characters = Counter(), Counter()
    with work.rows() as rows:
        for i, line in enumerate(rows):
            source, number, length = origins[i].tolist()
            if of[i] >= 0:
                # A near copy can have an estimated similarity of 1.0; only equal keys make an exact one.
                reason = "exact copy" if similarity[i] == 1.0 and keys[i] == keys[of[i]] else "near copy"
                counts[source, ""] -= 1
                counts[source, reason] += 1
                if settings.keep_dropped:
                    first, at, _ = origins[of[i]].tolist()
                    detail = f"{similarity[i]:.2f} like {files[first]}:{at}"
                    outputs["dropped"].write(dropped_line(reason, detail, str(files[source]), number, json.loads(line)))
                continue
            # The hash of the text decides, not the row's place: another order or more files move no row across.
            key = _prompt_key(line) if settings.to == "dpo" else int(keys[i])
            held, copies = _fate(key, weights[source], settings)
            outputs["heldout" if held else ""].write(line * copies)
            name = f"{settings.to}{'_heldout' if held else ''}.jsonl"
            written[name] += copies
            characters[name] += copies * length
    for file in outputs.values():
        file.close()
    return dict(written), dict(characters)


def _prompt_key(line: bytes) -> int:
    """Of the prompt of a pair: all pairs of a prompt are held out, or none."""
    return exact_key(row_text({"conversations": json.loads(line)["chosen"][:-1]}))


def _fate(key: int, weight: float, settings: Settings) -> tuple[bool, int]:
    """(whether the row is held out, how often it is written), by its text (a pair's prompt) and the seed alone.

    Rows of weight 0 are never held out: they are of a path that the output should know nothing of.
    """
    digest = hashlib.blake2b(f"{settings.seed} {key}".encode(), digest_size=16).digest()
    held, share = (int.from_bytes(half, "little") / 2**64 for half in (digest[:8], digest[8:]))
    if weight and held < settings.heldout:
        return True, 1
    return False, int(weight) + (share < weight % 1)  # 2.3: twice, and three times for 30% of the rows


def _by_reason(counts: Counter) -> Counter:
    """Rows of all files by the reason for which they were dropped; "" is kept."""
    reasons = Counter()
    for (_, reason), count in counts.items():
        reasons[reason] += count
    return reasons
