"""Near copies are found, strangers are not, and what is written depends on the input and the seed alone."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cleaning.clean import Settings, clean
from cleaning.dedup import (
    BANDS,
    NEAR_UNITS,
    PLACES,
    THRESHOLD,
    UNITS,
    Fingerprints,
    exact_key,
    find_copies,
    shingles,
    signature,
)
from cleaning.filters import PROFILES
from common.errors import UserError

CHARACTERS = [chr(0x4E00 + i) for i in range(3000)]
WORDS = [f"{a}{b}{c}" for a in "bcdfg" for b in ("ar", "en", "il") for c in ("", "s", "ed", "ing", "tion", "ly")]


def documents(count, seed, length=(NEAR_UNITS, 400)):
    """Random texts, three of four Chinese, with the uneven frequencies of language (Zipf)."""
    rng = random.Random(seed)
    weights = {id(pool): [1 / (i + 10) for i in range(len(pool))] for pool in (CHARACTERS, WORDS)}
    for i in range(count):
        pool = WORDS if i % 4 == 0 else CHARACTERS
        units = rng.choices(pool, weights[id(pool)], k=rng.randint(*length))
        yield (" " if pool is WORDS else "").join(units)


def edited(text, share, rng):
    """The text with this share of its units replaced, at random places."""
    spans = [match.span() for match in UNITS.finditer(text)]
    latin = text.isascii()
    for start, end in sorted(rng.sample(spans, round(len(spans) * share)), reverse=True):
        text = text[:start] + rng.choice(WORDS if latin else CHARACTERS) + text[end:]
    return text


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def search(texts, folder, threshold=THRESHOLD):
    prints = Fingerprints(folder)
    prints.append([exact_key(text) for text in texts], np.stack([signature(text) for text in texts]))
    prints.close()
    return find_copies(prints, threshold)


# ----------------------------------------------------------------------------------------------------------- similarity
def test_shingles_and_similarity_by_hand():
    assert UNITS.findall("Hello世界3.14 foo_bar") == ["Hello", "世", "界", "3", "14", "foo", "bar"]
    assert shingles("天地玄黄") == {"天 地 玄", "地 玄 黄"}
    assert exact_key("Hello 世界\n") == exact_key("hello世界") != exact_key("hello世界。")
    assert not signature("短文").any()


def test_signatures_estimate_the_similarity_of_the_sets():
    rng = random.Random(1)
    errors = []
    for text in documents(40, seed=1, length=(200, 300)):
        other = edited(text, rng.choice((0.02, 0.1, 0.2)), rng)
        estimate = (signature(text) == signature(other)).mean()
        errors.append(estimate - jaccard(shingles(text), shingles(other)))
    # of one estimate the standard error is at most sqrt(0.25 / 160) = 0.04; of the mean of forty 0.006
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.05


def test_copies_with_a_tenth_edited_are_found_and_strangers_are_not(tmp_path):
    rng = random.Random(2)
    texts = list(documents(2400, seed=2))
    sources = rng.sample(range(2400), 400)
    of, similarity = search(texts + [edited(texts[i], 0.1, rng) for i in sources], tmp_path)
    assert np.mean(of[2400:] == np.array(sources)) >= 0.95
    assert np.mean(of[:2400] >= 0) <= 0.001
    assert (similarity[of >= 0] >= THRESHOLD).all() and not similarity[of < 0].any()


def test_the_search_finds_what_comparing_all_pairs_finds(tmp_path):
    rng = random.Random(3)
    texts = list(documents(60, seed=3))
    texts += [edited(rng.choice(texts), rng.choice((0.02, 0.05, 0.2, 0.4)), rng) for _ in range(60)] + texts[:5]
    rng.shuffle(texts)
    of, _ = search(texts, tmp_path)
    signatures = [signature(text) for text in texts]
    expected = []
    for j in range(len(texts)):  # the nearest earlier text that stays, or an exact copy's first
        near = [((signatures[i] == signatures[j]).mean(), -i) for i in range(j) if expected[i] < 0]
        best, at = max(near, default=(0, 0))
        expected.append(-at if best >= THRESHOLD else -1)
    # The bands of a pair at the threshold agree with probability 1 - (1 - 0.45^4)^40 = 0.81, of a nearer one with more.
    assert BANDS * PLACES == 160 and np.mean(of == np.array(expected)) > 0.97


def test_real_text_keeps_its_strangers(tmp_path, data_dir):
    texts = []
    for name in ("zh_luxun", "zh_recipes_howtocook", "en_tinyshakespeare"):
        with gzip.open(data_dir / "pretrain" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line, _ in zip(file, range(500))]
    rng = random.Random(4)
    sources = rng.sample([i for i, text in enumerate(texts) if len(UNITS.findall(text)) >= NEAR_UNITS], 200)
    of, _ = search(texts + [edited(texts[i], 0.1, rng) for i in sources], tmp_path)
    assert np.mean(of[len(texts) :] >= 0) >= 0.95
    hits = np.flatnonzero(of[: len(texts)] >= 0)
    false = [i for i in hits if jaccard(shingles(texts[i]), shingles(texts[of[i]])) < 0.3]
    assert len(false) <= 0.001 * len(texts)


# ----------------------------------------------------------------------------------------------- the same output always
@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """5,000 rows in three files of different kinds, with copies among them."""
    folder = tmp_path_factory.mktemp("raw")
    rng = random.Random(5)
    texts = list(documents(4600, seed=5, length=(NEAR_UNITS, 200)))
    texts += [edited(rng.choice(texts), 0.05, rng) for _ in range(300)] + rng.sample(texts, 100)
    rng.shuffle(texts)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines[:3000]), encoding="utf-8")
    (folder / "b.txt").write_text("\n".join(texts[3000:4000]), encoding="utf-8")
    (folder / "c.jsonl").write_text("".join(lines[4000:]) + "{broken\n", encoding="utf-8")
    return folder


ANY = dataclasses.replace(PROFILES["default"], languages=None)  # the made-up words are of no language
SETTINGS = Settings(profile=ANY, heldout=0.1, keep_dropped=True, txt_rows="line", weights=(1.5,))
EXACT = dataclasses.replace(SETTINGS, dedup="exact")


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """The folder that one process writes without being disturbed."""
    out = tmp_path_factory.mktemp("whole") / "one"
    clean([raw], out, SETTINGS, workers=1)
    return out


def in_a_child(function):
    """Runs a function in a process of its own; its number. What it prints is not kept."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.002)


def rows_read(building):
    path = building / "work" / "rows.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def small_batches(monkeypatch):
    """A batch every 30 rows or so; children and workers inherit it."""
    monkeypatch.setattr("cleaning.clean.BATCH_CHARS", 2**12)


def test_any_number_of_workers_gives_the_same_files(raw, whole, tmp_path):
    summary = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    assert summary["reasons"]["near copy"] >= 280 and summary["reasons"]["exact copy"] == 100
    assert summary["reasons"]["not JSON"] == 1 and summary["rows"] == 5001
    assert summary["kept"] + summary["dropped"] == 5001
    clean([raw], tmp_path / "two", SETTINGS, workers=2)
    assert content(tmp_path / "two") == content(whole)


@pytest.mark.parametrize("workers, overwrite", [(1, False), (2, True)])
def test_a_killed_run_leaves_no_output_or_the_earlier_one_and_begins_again(
    raw, whole, tmp_path, small_batches, workers, overwrite
):
    out, building = tmp_path / "out", tmp_path / "out.building"
    if overwrite:  # an earlier output stays until the new one is whole
        clean([raw / "c.jsonl"], out, Settings(dedup="none"))
        earlier = content(out)
    for rows in (300, 3000):
        child = in_a_child(lambda: clean([raw], out, SETTINGS, workers, overwrite))
        wait_for(lambda rows=rows: rows_read(building) >= rows)
        kill(child)
        assert building.exists() and (content(out) == earlier if overwrite else not out.exists())
    clean([raw], out, SETTINGS, workers, overwrite)
    assert content(out) == content(whole) and not building.exists()


def test_a_kill_at_the_end_leaves_the_new_output_whole(raw, tmp_path, monkeypatch):
    """The last things a run does are to delete the earlier OUT and to rename OUT.building."""
    out, building, one = tmp_path / "out", tmp_path / "out.building", raw / "c.jsonl"
    clean([one], out, EXACT)
    whole = content(out)

    def kill_at(name, path):
        """A run that dies when it is about to do this to the path."""
        module, real = {"rename": (os, os.rename), "rmtree": (shutil, shutil.rmtree)}[name]

        def die(first, *args, **flags):
            if first == path:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(first, *args, **flags)

        def run():
            monkeypatch.setattr(module, name, die)
            clean([one], out, EXACT, overwrite=True)

        _, status = os.waitpid(in_a_child(run), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL

    kill_at("rmtree", building / "work")
    assert content(out) == whole  # not touched yet
    kill_at("rmtree", out)
    assert content(building) == whole
    with pytest.raises(UserError, match="was not written by this command"):  # what is left does not pass for finished
        clean([one], out, EXACT)
    shutil.rmtree(out)
    kill_at("rename", building)
    assert content(building) == whole and not out.exists()
    clean([one], out, EXACT)
    assert content(out) == whole and not building.exists()


def test_two_runs_at_once_are_refused_and_a_killed_one_holds_nothing(raw, tmp_path, small_batches):
    out, building = tmp_path / "out", tmp_path / "out.building"
    child = in_a_child(lambda: clean([raw], out, EXACT, 2))
    wait_for(lambda: rows_read(building) >= 100)
    os.kill(child, signal.SIGSTOP)  # so that it cannot end before the others have begun
    for overwrite in (False, True):
        with pytest.raises(UserError, match="another run is at work"):
            clean([raw], out, EXACT, 1, overwrite)
    kill(child)
    assert clean([raw], out, EXACT)["rows"] == 5001  # at once, though its workers may live on for a second


def test_a_folder_that_appears_meanwhile_is_not_replaced(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def copies(*args):
        out.mkdir()
        (out / "mine.txt").write_text("mine", encoding="utf-8")
        return find_copies(*args)

    monkeypatch.setattr("cleaning.clean.find_copies", copies)
    with pytest.raises(UserError, match="appeared during this run"):
        clean([raw / "c.jsonl"], out, EXACT)
    (out / "mine.txt").rename(tmp_path / "mine.txt")
    monkeypatch.undo()
    assert clean([raw / "c.jsonl"], out, EXACT)["rows"] == 1001


def test_a_path_of_weight_0_is_in_no_file(raw, tmp_path):
    settings = dataclasses.replace(SETTINGS, dedup="none", heldout=0.3, weights=(1, 0), keep_dropped=False)
    clean([raw / "c.jsonl", raw / "a.jsonl"], tmp_path / "both", settings)
    clean([raw / "c.jsonl"], tmp_path / "one", dataclasses.replace(settings, weights=(1,)))
    both, one = content(tmp_path / "both"), content(tmp_path / "one")
    assert both["pretrain_heldout.jsonl"] == one["pretrain_heldout.jsonl"] != b""
    assert both["pretrain.jsonl"] == one["pretrain.jsonl"]


def test_weights_and_hold_out_follow_the_seed(raw, tmp_path):
    full = clean([raw / "a.jsonl"], tmp_path / "full", Settings(dedup="exact"))
    mixed = clean([raw / "a.jsonl", raw / "b.txt"], tmp_path / "mixed",
                  Settings(dedup="exact", txt_rows="line", weights=(0.25, 2), heldout=0.2))  # fmt: skip
    other = clean([raw / "a.jsonl"], tmp_path / "other", Settings(dedup="exact", heldout=0.2, seed=1))
    kept = full["kept"]
    assert full["written"] == {"pretrain.jsonl": kept}
    assert abs(other["written"]["pretrain_heldout.jsonl"] - 0.2 * kept) < 4 * (0.16 * kept) ** 0.5
    train = (tmp_path / "mixed" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    held = (tmp_path / "mixed" / "pretrain_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert not set(train) & set(held)
    own = set((tmp_path / "full" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines())
    quarter = [line for line in train if line in own]
    assert abs(len(quarter) - 0.25 * 0.8 * kept) < 4 * (0.16 * kept) ** 0.5
    doubled = [line for line in train if line not in own]
    assert len(doubled) == 2 * len(set(doubled))
    assert mixed["written"]["pretrain_heldout.jsonl"] == len(held)


def test_all_pairs_of_a_prompt_are_held_out_or_none(tmp_path):
    answers = [{"chosen": f"好{n}", "rejected": f"坏{n}"} for n in range(3)]
    rows = [{"prompt": f"第{i}个问题是什么？"} | pair for pair in answers for i in range(80)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean([tmp_path / "p.jsonl"], tmp_path / "out", Settings(to="dpo", dedup="exact", heldout=0.2))
    train, held = ([json.loads(line)["chosen"][0]["content"] for line in (tmp_path / "out" / name).open("rb")]
                   for name in ("dpo.jsonl", "dpo_heldout.jsonl"))  # fmt: skip
    assert len(train) + len(held) == 240 and len(held) > 20 and not set(train) & set(held)


@pytest.mark.slow
def test_the_row_functions_run_under_datasets_too(raw, tmp_path):
    """What docs/data.md shows: the same function over rows, `datasets` doing the processes."""
    import datasets

    from cleaning.clean import clean_row
    from data.row_shapes import BadRow

    settings = Settings(dedup="none")

    def keep(batch):
        rows = []
        for text in batch["text"]:
            try:
                rows.append(clean_row({"text": text}, settings)["text"])
            except BadRow:
                continue
        return {"text": rows}

    clean([raw / "a.jsonl"], tmp_path / "out", settings)
    ours = [json.loads(line)["text"] for line in open(tmp_path / "out" / "pretrain.jsonl", encoding="utf-8")]
    table = datasets.load_dataset("json", data_files=str(raw / "a.jsonl"), cache_dir=str(tmp_path / "cache"))["train"]
    assert table.map(keep, batched=True, num_proc=2)["text"][:] == ours


@pytest.mark.slow
def test_the_row_functions_run_under_datatrove_too(raw, tmp_path, monkeypatch):
    """The code of docs/data.md, as it stands there."""
    pytest.importorskip("datatrove")
    pytest.importorskip("orjson")  # which its reader wants
    page = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    codes = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    imports = codes[0].split("def keep")[0]
    code = next(code for code in codes if "datatrove" in code)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    for i, lines in enumerate(([], [])):  # two files for two workers
        lines += (raw / "a.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[i::2]
        (tmp_path / "raw" / f"{i}.jsonl").write_text("".join(lines), encoding="utf-8")
    exec(imports + code, {"__name__": "docs"})
    clean([tmp_path / "raw"], tmp_path / "out", Settings(dedup="none"))
    ours = [json.loads(line)["text"] for line in open(tmp_path / "out" / "pretrain.jsonl", encoding="utf-8")]
    theirs = []
    for path in sorted((tmp_path / "clean").iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            theirs += [json.loads(line)["text"] for line in file]
    assert theirs == ours and ours
