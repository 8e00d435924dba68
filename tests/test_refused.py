"""Files and folders that are another user's, or of another kind than is expected: one line, exit code 2."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  what a child imports when it is another user, it may not be able to read
import pytest
from stage import STAGES, load, run_flags, write_texts

import data_process
from common.errors import run_main

NOBODY = 65534
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="rights are another matter there")


@pytest.fixture
def place():
    """A folder that every user can reach, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def refused(capfd):
    """refused(main, argv, user): what main(argv) says when it leaves with exit code 2, run by a user who is not root
    (who may read everything), or by root where `user` is None."""

    def run(main, argv, user=NOBODY):
        capfd.readouterr()
        if (child := os.fork()) == 0:
            code = 99
            with contextlib.suppress(BaseException):
                if user is not None and os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(user)
                    os.setuid(user)
                try:
                    run_main(main, [str(word) for word in argv])
                except SystemExit as left:
                    code = left.code
            os._exit(code)
        code, err = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), capfd.readouterr().err
        assert code == 2 and err.count("\n") == 1, (code, err)
        return err

    return run


def pretrain(place, *more) -> list:
    return [*run_flags("pretrain", place / "data", 2), "--out_dir", place / "o", *more]


def test_data_that_may_not_be_read(place, refused):
    flags, main = pretrain(place), load(STAGES["pretrain"]).main
    data = place / "data" / "pretrain.jsonl"
    data.chmod(0)
    assert refused(main, flags) == f"error: {data} cannot be read: Permission denied\n"
    assert refused(data_process.main, ["report", data]) == f"error: {data} cannot be read: Permission denied\n"
    for command in (
        ["fill", data, "--set", "a=b"],
        ["distill", data, "--base_url", "http://127.0.0.1:9/", "--model", "m"],
    ):
        said = refused(data_process.main, [*command, "--out", place / "x.jsonl"])
        assert said == f"error: {data} cannot be read: Permission denied\n"
    text = place / "prompts.txt"
    text.write_text("一", "utf-8")
    text.chmod(0)
    said = refused(
        data_process.main, ["distill", text, "--out", place / "x.jsonl", "--base_url", "http://h/", "--model", "m"]
    )
    assert said == f"error: {text} cannot be read: Permission denied\n"


def test_a_folder_that_may_not_be_read_is_not_passed_over_by_cleaning(place, refused):
    write_texts(place / "a.jsonl")
    (place / "b").mkdir(mode=0o700)
    write_texts(place / "b" / "c.jsonl")
    (place / "b").chmod(0)
    said = refused(data_process.main, ["clean", "--data_path", place, "--out_dir", place.parent / "never"])
    assert said == f"error: {place}/b cannot be read: Permission denied\n"


@pytest.mark.parametrize("how", ["read-only", "a file", "another user's", "another user's cache"])
def test_a_cache_that_cannot_be_used(how, place, refused):
    flags, main, cache = pretrain(place), load(STAGES["pretrain"]).main, place / "o" / "cache"
    cache.parent.mkdir()
    cache.parent.chmod(0o777)
    if how == "a file":
        cache.write_bytes(b"")
    elif how == "another user's cache":
        main([str(flag) for flag in flags])
        for file in (place / "o").glob("pretrain_32*"):
            file.unlink()
        (place / "o" / ".pretrain_32.lock").unlink()
        next(cache.iterdir()).chmod(0o700 if os.geteuid() == 0 else 0)
    else:
        cache.mkdir(mode=0o700 if how == "another user's" and os.geteuid() == 0 else 0o555)
    said = refused(main, flags)
    assert said.startswith(f"error: the cache {cache}/pretrain-") and said.endswith("; name another --out_dir\n")
    assert f"({cache}" in said and ("File exists" if how == "a file" else "Permission denied") in said


def test_a_cache_that_one_user_made_serves_another(place, capfd):
    """It was for its owner alone, whatever umask said."""
    main = load(STAGES["pretrain"]).main
    main([str(flag) for flag in pretrain(place)])
    mask = os.umask(0)
    os.umask(mask)
    (cache,) = (place / "o" / "cache").iterdir()
    assert cache.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {file.stat().st_mode & 0o777 for file in cache.iterdir()} == {0o666 & ~mask}


def test_what_report_refuses(place, refused):
    texts, blank = write_texts(place / "a.jsonl"), place / "blank.jsonl"
    blank.write_text("\n \n\n")
    (place / "d.png").mkdir()
    for argv, said in (
        ([texts, "--tokenizer", place / "none"], f"no tokenizer folder at {place}/none"),
        ([blank], f"{blank} holds no rows"),
        ([texts, "--plot", place / "x.doc"],
         f"--plot {place}/x.doc: the name's ending says what is drawn, one of .png, .pdf, .svg"),
        ([texts, "--plot", place / "d.png"], f"--plot {place}/d.png is a folder"),
    ):  # fmt: skip
        assert refused(data_process.main, ["report", *argv, "--workers", 1], user=None) == f"error: {said}\n"


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_plot_is_of_the_kind_its_name_says(ending, begins, tmp_path, capsys):
    plot = tmp_path / "new" / f"x.{ending}"
    data_process.main(["report", str(write_texts(tmp_path / "a.jsonl", 9)), "--plot", str(plot), "--workers", "1"])
    assert plot.read_bytes().startswith(begins) and [plot] == list(plot.parent.iterdir())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["plot"] == str(plot)
