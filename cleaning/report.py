"""What is in a stage file: rows, characters, tokens, lengths, languages, copies, turns, samples.

One pass in batches on all cores; fingerprints go to a temporary folder (648 bytes a row), so what grows in memory is
the lengths, 12 bytes a row, and at the end the search for copies, some 200 bytes a row (docs/data.md, section 3).
"""

import heapq
import importlib.util
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cleaning.clean import row_text
from cleaning.dedup import Fingerprints, exact_key, find_copies, signature
from cleaning.filters import language_of
from common.errors import UserError, user_errors
from common.files import named, replaced
from common.workers import ordered_map
from data.reading import check_file, in_batches, raw_rows
from data.row_shapes import BadRow, parse, parse_record
from data.token_cache import encode_batch, worker_tokenizer
from model.tokenizer import load_tokenizer
from model.tokenizer_files import tokenizer_to_dict

KINDS = {"text": "pretraining text", "chat": "conversations", "pair": "preference pairs"}
SAMPLE_CHARS = 300
PLOTS = (".png", ".pdf", ".svg")
BAR = 40  # characters of the longest bar
BATCH_CHARS = 2**17  # handed to a worker at a time


class Measured(NamedTuple):
    """Of the rows of one batch."""

    characters: list[int]
    utf8_bytes: int
    tokens: list[int]
    learned: int
    turns: list[int]
    languages: Counter
    keys: list[int]
    signatures: np.ndarray
    bad: int
    samples: list[tuple[int, str]]  # (rank by the seed, text); the smallest ranks are shown


def kind_of(path) -> str:
    """One of "text", "chat" and "pair", by the keys of the first row."""
    if (first := next(raw_rows(path), None)) is None:
        raise UserError(f"{path} holds no rows")
    line, raw = first
    try:
        record = parse_record(raw)
    except BadRow as error:
        raise UserError(f"{path}:{line}: {error}") from None
    if "chosen" in record:
        return "pair"
    return "text" if "text" in record else "chat"


def describe(path, tokenizer_path=None, samples=3, seed=42, plot=None, workers=1) -> dict:
    """All figures of a file; writes the plot if it is named."""
    path = check_file(path)
    if plot:
        check_plot(plot)
    with user_errors():
        tokenizer = load_tokenizer(tokenizer_path)
    kind = kind_of(path)
    totals, languages, shown = Counter(), Counter(), []
    characters, tokens, turns = [], [], []
    with tempfile.TemporaryDirectory() as folder, named(folder):
        prints = Fingerprints(Path(folder))
        context = (kind, json.dumps(tokenizer_to_dict(tokenizer)), seed, samples)
        with tqdm(desc=f"reading {path.name}", unit=" rows", disable=not sys.stderr.isatty(), leave=False) as bar:
            for found in ordered_map(measure, in_batches(raw_rows(path), BATCH_CHARS), workers, *context):
                bar.update(len(found.keys))
                characters.append(np.asarray(found.characters, np.int32))
                tokens.append(np.asarray(found.tokens, np.int32))
                turns.append(np.asarray(found.turns, np.int32))
                languages += found.languages
                totals.update(bytes=found.utf8_bytes, learned=found.learned, bad=found.bad)
                # The smallest ranks of all rows, so the sample depends on the seed and not on the batches.
                shown = heapq.nsmallest(samples, shown + found.samples)
                if found.keys:
                    prints.append(found.keys, found.signatures)
        prints.close()
        of, _ = find_copies(prints)
        keys = prints.keys()
    if not len(of):
        raise UserError(f"{path} holds no usable rows")
    characters, tokens, turns = map(np.concatenate, (characters, tokens, turns))
    exact = int(((of >= 0) & (keys == keys[of])).sum())  # a near copy can have an equal signature, not an equal key
    result = {
        "stage": "report", "file": str(path), "kind": kind, "rows": len(of), "bad_rows": totals["bad"],
        "characters": int(characters.sum()), "utf8_bytes": totals["bytes"], "tokens": int(tokens.sum()),
        "learned_tokens": totals["learned"], "characters_per_token": round(float(characters.sum() / tokens.sum()), 3),
        "row_tokens": quantiles(tokens), "histogram": histogram(tokens),
        "languages": {name: round(n / len(of), 4) for name, n in languages.most_common()},
        "exact_copies": exact, "near_copies": int((of >= 0).sum()) - exact,
        "turns": histogram_of(turns) if kind != "text" else {}, "samples": [text for _, text in shown],
    }  # fmt: skip
    if plot:
        draw(result, tokens, plot)
        result["plot"] = str(plot)
    return result


def measure(batch, kind: str, tokenizer_files: str, seed: int, samples: int) -> Measured:
    """[(line, raw row), ...] -> figures. Tokens are counted as the training cache counts them."""
    arrays, bad = encode_batch(batch, kind, worker_tokenizer(tokenizer_files))
    unusable = {line for line, _ in bad}
    rows = [parse(raw, kind) for line, raw in batch if line not in unusable]
    if kind != "pair":
        rows = [{"text" if kind == "text" else "conversations": row} for row in rows]
    texts = [row_text(row) for row in rows]
    # A pair is two documents of the cache, side by side.
    tokens = np.reshape(arrays["lengths"], (-1, 2 if kind == "pair" else 1)).sum(axis=1).tolist()
    # A row's rank is its hash times an odd number that the seed gives (one to one modulo 2^64): each seed shows others.
    keys = [exact_key(text) for text in texts]
    ranked = heapq.nsmallest(samples, ((key * (2 * seed + 1) % 2**64, text) for key, text in zip(keys, texts)))
    return Measured(
        [len(text) for text in texts], sum(len(text.encode("utf-8", "replace")) for text in texts),
        tokens, sum(arrays["learned"]), [_turns(row) for row in rows],
        Counter(map(language_of, texts)), keys, np.stack([signature(text) for text in texts]) if texts else None,
        len(bad), [(rank, text[:SAMPLE_CHARS]) for rank, text in ranked],
    )  # fmt: skip


def _turns(row: dict) -> int:
    messages = row.get("conversations", row.get("chosen", []))
    return sum(message["role"] == "user" for message in messages)


# ------------------------------------------------------------------------------------------------------------- output
def quantiles(values: np.ndarray) -> dict:
    names = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
    found = np.quantile(values, list(names.values()), method="inverted_cdf").tolist()
    return dict(zip(names, map(int, found))) | {"mean": round(float(values.mean()), 1)}


def histogram(values: np.ndarray) -> dict[str, int]:
    """Rows by length in powers of two: {"<=32": n, "<=64": n, ...}."""
    power = np.maximum(np.ceil(np.log2(np.maximum(values, 1))).astype(int), 4)  # 16 and fewer together
    counts = np.bincount(power, minlength=5)
    return {f"<={2**p}": int(counts[p]) for p in range(4, len(counts))}


def histogram_of(values: np.ndarray) -> dict[str, int]:
    """Rows by a small count, nine and more together."""
    counts = Counter(np.minimum(values, 9).tolist())
    return {"9+" if n == 9 else str(n): counts[n] for n in sorted(counts)}


def print_report(result: dict) -> None:
    """The figures for a reader."""
    rows = result["rows"]
    print(f"{result['file']}: {rows:,} rows of {KINDS[result['kind']]}"
          + (f", {result['bad_rows']:,} bad rows left out" if result["bad_rows"] else ""))  # fmt: skip
    print(f"{result['characters']:,} characters, {result['tokens']:,} tokens ({result['learned_tokens']:,} learned), "
          f"{result['characters_per_token']} characters a token")  # fmt: skip
    print("tokens of a row: " + ", ".join(f"{name} {value:,}" for name, value in result["row_tokens"].items()))
    for title in ("histogram", "turns"):
        if result[title]:
            print("\nrows by tokens" if title == "histogram" else "\nrows by questions of the user")
            for name, count in result[title].items():
                print(f"{name:>9} {count:>10,} {'#' * round(BAR * count / max(result[title].values()))}")
    print("\nlanguages: " + ", ".join(f"{name} {share:.1%}" for name, share in result["languages"].items()))
    print(f"copies: {result['exact_copies']:,} exact, {result['near_copies']:,} near "
          f"({(result['exact_copies'] + result['near_copies']) / rows:.2%} of the rows)")  # fmt: skip
    for text in result["samples"]:
        print(f"\n--- a row\n{text}")
    print()


def check_plot(path) -> None:
    """UserError where no plot can be drawn there: said before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs the package matplotlib: pip install matplotlib")
    if Path(path).suffix not in PLOTS:
        raise UserError(f"--plot {path}: the name's ending says what is drawn, one of {', '.join(PLOTS)}")
    if Path(path).is_dir():
        raise UserError(f"--plot {path} is a folder")


def draw(result: dict, tokens: np.ndarray, path) -> None:
    """Lengths on a logarithmic axis, beside the shares of the languages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1))
    left.hist(tokens, bins=np.geomspace(max(tokens.min(), 1), tokens.max() + 1, 40))
    left.set(xscale="log", xlabel="tokens of a row", ylabel="rows", title=f"{result['rows']:,} rows")
    right.barh(list(result["languages"]), list(result["languages"].values()))
    right.set(xlabel="share of the rows", title="languages")
    figure.tight_layout()
    with replaced(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)
    pyplot.close(figure)
