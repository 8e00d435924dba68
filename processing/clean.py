"""Raw collections -> clean stage files: read, normalise, filter, remove copies, hold out, mix, write.

The rows of a folder go through three steps, each of which a killed run takes up again where it was:

  read    every row becomes a row of the wanted shape or is dropped with a reason (`clean_row`, on all cores or on a
          cluster); kept rows and their fingerprints are appended to files in OUT.building, with a checkpoint every few
          batches
  find    the copies among them (processing/dedup.py)
  write   the files of the stage, into a folder that is renamed to OUT when it is whole

What is written depends on the input, the settings and the seed only: not on the number of workers, not on kills.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

from model.files import named
from processing.dedup import THRESHOLD, exact_key, find_copies, signature
from processing.filters import PROFILES, Profile, check_row
from processing.normalise import normalise_row
from processing.read_raw import UNREADABLE, Dropped, RawRow, columns_of, find_files, raw_rows
from processing.shapes import check_rendering, knows, parse_record, to_row
from processing.work import OURS, Cleaned, Work, foreign, locked, plan_of, remove
from trainer.cli import UserError
from trainer.workers import Pool

SHAPE = {"pretrain": "text", "sft": "chat", "dpo": "pair", "tokenizer": "any"}  # of a stage's rows
BATCH_CHARS = 2**17  # handed to a worker at a time: large enough to hide the hand-over
CHECKPOINT_BATCHES = 8
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
    """One raw row in its stage's shape, normalised and found good; raises Dropped. The whole of cleaning for a row."""
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
    """[(file, raw row), ...] and a position -> Cleaned."""
    rows, position = batch
    kept, dropped, origins, keys, signatures, counts, converted = [], [], [], [], [], Counter(), 0
    for source, raw in rows:
        try:
            if isinstance(raw.raw, Dropped):
                raise raw.raw
            row = clean_row(raw.raw, settings)
        except Dropped as why:
            counts[source, why.reason] += 1
            if settings.keep_dropped:
                dropped.append(dropped_line(why.reason, why.detail, files[source], raw.line, raw.raw))
            continue
        text = row_text(row)
        counts[source, ""] += 1
        converted += raw.converted
        kept.append(json_line(row))
        origins.append((source, raw.line, len(text)))
        keys.append(exact_key(text))
        if settings.dedup == "near":
            signatures.append(signature(text))
    stacked = np.stack(signatures) if signatures else None
    return Cleaned(b"".join(kept), b"".join(dropped), origins, keys, stacked, counts, converted, position)


def json_line(row: dict) -> bytes:
    """A line of JSON; dates and bytes, which only a dropped row of a Parquet file can hold, as Python writes them."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def dropped_line(reason: str, detail: str, file: str, line: int, row) -> bytes:
    row = row.row if isinstance(row, Dropped) else row
    return json_line({"reason": reason, "detail": detail, "file": file, "line": line, "row": row})


# -------------------------------------------------------------------------------------------------------- the command
def clean(paths, out_dir, settings: Settings, workers: int = 1, overwrite: bool = False, engine=None) -> dict:
    """Cleans files and folders into the new folder out_dir; returns the summary that is also written there.

    engine: what runs clean_batch in the place of a pool of `workers` processes, see processing/cluster.py.
    """
    begin, out, engine = time.monotonic(), Path(out_dir), engine or Pool(workers)
    files, others, weights = _inputs(paths, settings)
    _check_places(paths, files, out)
    if others:
        first = ", ".join(path.name for path in others[:3]) + (", ..." if len(others) > 3 else "")
        print(f"{len(others):,} files of other kinds, or links, not read: {first}")
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    plan = json.loads(json.dumps({"settings": asdict(settings), "paths": [str(p) for p in paths], "files": stats}))
    _put_back(out)
    if (done := _finished(out, plan, overwrite)) is not None:
        return done
    with locked(_building(out)), named(_building(out)):
        work = Work(_building(out), plan, settings.dedup == "near", overwrite)
        rows_before = sum(work.progress["counts"].values())
        try:
            _read(work, files, settings, engine)
            for name, rows in _damaged(files, work.progress["counts"]).items():
                print(f"warning: {name} cannot be read to its end, only {rows:,} rows of it", file=sys.stderr)
            read_seconds = time.monotonic() - begin
            if work.progress["kept"]:
                of, similarity = _find(work, settings)
                summary = _write(work, plan, files, others, weights, of, similarity, settings)
        finally:
            work.close()
        if not work.progress["kept"]:
            remove(work.folder)
            raise UserError(f"no row is left: {_reasons_in_words(work.progress['counts'])}")
        _publish(work.folder, out, overwrite)
    rows = sum(work.progress["counts"].values()) - rows_before
    seconds = time.monotonic() - begin
    return summary | {
        "out_dir": str(out), "workers": engine.workers, "seconds": round(seconds, 1),
        "read_seconds": round(read_seconds, 1), "documents_per_second": round(rows / seconds, 1),
        "peak_memory_bytes": peak_memory(engine.held_here),
    }  # fmt: skip


def _building(out: Path) -> Path:
    return out.with_name(f"{out.name}.building")


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
    weight_of = {}
    for file, weight in zip(files, weights):
        if weight_of.setdefault(file.resolve(), weight) != weight:
            raise UserError(f"{file} is given twice with different --weights; name it once")
    for file in files:
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


def _put_back(out: Path):
    """The earlier output that a kill between the two renames of `_publish` left without its name."""
    replaced = _building(out) / "replaced"
    if replaced.exists() and not out.exists() and plan_of(_building(out)) is not None:
        with locked(_building(out)):
            os.rename(replaced, out)


def _finished(out: Path, plan: dict, overwrite: bool) -> dict | None:
    """The summary of an equal run that has finished; refuses a folder that is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict) or summary.get("stage") != "clean" or "plan" not in summary:
        raise UserError(f"{out} exists and was not written by this command; name a new folder with --out_dir")
    if overwrite:
        if name := foreign(out, WRITTEN):
            raise UserError(f"{out} holds {name}, not written by this command; move it elsewhere")
        return None
    if summary["plan"] != plan:
        raise UserError(f"{out} holds the output of other input or settings; --overwrite replaces it")
    left = _building(out)  # by a kill after the last rename
    if left.is_dir() and plan_of(left) in (None, plan) and not foreign(left, OURS):
        with locked(left):
            remove(left)
    print(f"{out} is finished already (--overwrite makes it anew)")
    return {key: value for key, value in summary.items() if key != "plan"} | {"out_dir": str(out)}


def _publish(building: Path, out: Path, overwrite: bool):
    """Renames the finished folder into place. A kill between the two renames leaves it in OUT.building, whole."""
    if out.exists():
        if not overwrite and any(out.iterdir()):
            raise UserError(f"{out} appeared during this run; move it elsewhere and give the same command again")
        shutil.rmtree(building / "replaced", ignore_errors=True)
        os.rename(out, building / "replaced")
    os.rename(building / "out", out)
    remove(building)


def peak_memory(workers: int) -> int | None:
    """Bytes this process and so many workers held at most; shared pages are counted for each. None: nobody counts."""
    if resource is None:
        return None
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts in ru_maxrss what the program that started this one held
        own = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * (own + workers * child)


def _read(work: Work, files: list[Path], settings: Settings, engine):
    batches = _batches(files, settings, work.progress["position"])
    names = [str(file) for file in files]
    done = sum(work.progress["counts"].values())
    with tqdm(desc="cleaning", unit=" rows", initial=done, disable=not sys.stderr.isatty(), leave=False) as bar:
        for number, cleaned in enumerate(engine.map(clean_batch, batches, names, settings), start=1):
            work.append(cleaned)
            bar.update(cleaned.counts.total())
            if number % CHECKPOINT_BATCHES == 0:
                work.checkpoint()
    work.checkpoint()


def _batches(files: list[Path], settings: Settings, position):
    """([(file, raw row), ...], position after them) from a position on; rows before it are passed over unparsed."""
    batch, size, (start, skip) = [], 0, position
    for source in range(start, len(files)):
        for count, row in enumerate(raw_rows(files[source], settings.encoding, settings.txt_rows), start=1):
            if source == start and count <= skip:
                continue
            batch.append((source, row))
            size += _size(row)
            if size >= BATCH_CHARS:
                yield batch, (source, count)
                batch, size = [], 0
    if batch:
        yield batch, (len(files), 0)


def _size(row: RawRow) -> int:
    return len(row.raw) if isinstance(row.raw, str) else len(str(row.raw))


def _damaged(files, counts: dict) -> dict[str, int]:
    """{name: rows that were read} of the files whose rest could not be."""
    found = [i for i in range(len(files)) if f"{i} {UNREADABLE}" in counts]
    return {str(files[i]): sum(n for key, n in counts.items() if key.startswith(f"{i} ")) - 1 for i in found}


def _find(work: Work, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    if settings.dedup == "none":
        count = work.progress["kept"]
        return np.full(count, -1), np.zeros(count)
    return find_copies(work.prints, settings.threshold)


# -------------------------------------------------------------------------------------------------------------- write
def _write(work: Work, plan: dict, files, others, weights, of, similarity, settings: Settings) -> dict:
    folder = work.folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    counts = Counter({tuple(key.split(" ", 1)): n for key, n in work.progress["counts"].items()})
    origins = np.fromfile(work.folder / "origins.bin", np.int64).reshape(-1, 3)
    written, characters = _write_rows(work.folder, files, weights, origins, of, similarity, counts, settings)
    by_file, reasons = {}, Counter()
    for (source, reason), count in counts.items():
        name = str(files[int(source)])
        by_file.setdefault(name, Counter())[reason or "kept"] += count
        reasons[reason] += count
    kept = reasons.pop("")
    summary = {
        "stage": "clean", "to": settings.to, "rows": kept + reasons.total(), "kept": kept, "dropped": reasons.total(),
        "reasons": dict(reasons.most_common()), "written": written, "characters": characters,
        "converted_from_gb18030": work.progress["converted"], "seed": settings.seed,
        "files_not_read": [str(path) for path in others], "files_damaged": _damaged(files, work.progress["counts"]),
        "by_file": {name: dict(found) for name, found in by_file.items()},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | {"plan": plan}, ensure_ascii=False, indent=1), "utf-8")
    return summary


def _write_rows(building: Path, files, weights, origins, of, similarity, counts: Counter, settings: Settings):
    """Writes each row that is no copy, `weight` times; moves the counts of copies from kept to dropped."""
    keys = np.fromfile(building / "prints" / "keys.bin", np.uint64)
    folder = building / "out"
    outputs = {"": open(folder / f"{settings.to}.jsonl", "wb")}
    if settings.heldout:
        outputs["heldout"] = open(folder / f"{settings.to}_heldout.jsonl", "wb")
    if settings.keep_dropped:
        shutil.copyfile(building / "dropped.jsonl", folder / "dropped.jsonl")
        outputs["dropped"] = open(folder / "dropped.jsonl", "ab")
    written, characters = Counter(), Counter()
    with open(building / "rows.jsonl", "rb") as rows:
        for i, line in enumerate(rows):
            source, number, length = origins[i].tolist()
            if of[i] >= 0:
                reason = "exact copy" if similarity[i] == 1.0 and keys[i] == keys[of[i]] else "near copy"
                counts[str(source), ""] -= 1
                counts[str(source), reason] += 1
                if settings.keep_dropped:
                    first, at, _ = origins[of[i]].tolist()
                    detail = f"{similarity[i]:.2f} like {files[first]}:{at}"
                    outputs["dropped"].write(dropped_line(reason, detail, str(files[source]), number, json.loads(line)))
                continue
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
    return False, int(weight) + (share < weight % 1)


def _reasons_in_words(counts: dict) -> str:
    reasons = Counter()
    for key, count in counts.items():
        reasons[key.split(" ", 1)[1]] += count
    return ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(5)) or "the files hold no rows"
