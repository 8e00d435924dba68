"""A disk that takes no more: one line that names file and disk, exit 1, and what was written before is whole."""

import errno
import gc
import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from stage import STAGES, history, load, run_flags, with_loss, write_texts

from common.errors import RunFailed, disk_fault, run_main
from common.files import named, replaced
from model.weights_file import save_atomically
from trainer.log import Log
from trainer.preference import Reference
from trainer.world import World

WORLD = World(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def disk(tmp_path):
    """An empty disk of 12 MB, with fill(): another program takes what is free of it, and free(): it goes away."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here: it needs Linux and root")

    def fill(but=0):
        with pytest.raises(OSError), open(place / "other", "ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(place / "other", (place / "other").stat().st_size - but)

    yield SimpleNamespace(place=place, fill=fill, free=(place / "other").unlink)
    subprocess.run(["umount", "-l", str(place)], check=True)


def full(disk, name: str) -> str:
    """What is said of a file on it."""
    return rf"{disk.place}/{name}: No space left on device \(the disk at {disk.place}\)"


def hidden_files(folder) -> list:
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".npy"))]


def test_what_is_replaced_is_there_whole_or_as_it_was(disk):
    path = disk.place / "x.bin"
    with replaced(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), replaced(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    disk.fill()
    for write in (lambda: save_atomically({"a": torch.zeros(100_000)}, path), lambda: write_text(path)):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert caught.value.filename == str(path) and disk_fault(caught.value).endswith(f"(the disk at {disk.place})")
    assert path.read_bytes() == b"old" and not hidden_files(disk.place)


def write_text(path):
    with replaced(path, text=True) as file:
        file.write("字" * 100_000)


def test_other_errors_keep_their_kind():
    for error in (RuntimeError("of a kernel"), OSError("of no number"), OSError(errno.ENOENT, "gone", "a.txt")):
        with pytest.raises(type(error)) as caught, named("b.txt"):
            raise error
        assert caught.value is error
    assert disk_fault(OSError(errno.ENOENT, "gone", "a.txt")) is None


def test_run_main_tells_of_a_full_disk_in_one_line(capsys):
    def main(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "/x.bin")

    with pytest.raises(SystemExit) as left:
        run_main(main)
    told = "failed: /x.bin: No space left on device (the disk at /); see to it and give the same command again\n"
    assert left.value.code == 1 and capsys.readouterr().err == told


def test_run_main_tells_of_a_name_that_no_disk_takes_in_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        run_main(lambda argv: open("n" * 300).close())
    assert left.value.code == 2 and capsys.readouterr().err == f"error: {'n' * 300}: File name too long\n"


def flags_of(stage, folder, disk) -> list[str]:
    return [*run_flags(stage, folder, steps=8), "--out_dir", str(disk.place / "out")]


def test_while_tokenising(disk, tmp_path):
    disk.fill(but=2**17)
    flags = [*flags_of("pretrain", tmp_path, disk), "--data_path", str(write_texts(tmp_path / "t.jsonl", 2000))]
    with pytest.raises(RunFailed, match=full(disk, r"out/cache/t-\w+\.building-\S+")):
        load(STAGES["pretrain"]).main(flags)
    assert not list((disk.place / "out" / "cache").iterdir())


def test_filled_by_another_program_between_two_saves(disk, tmp_path):
    """The state of step 4 can be resumed when there is room again, and the run ends as one that was never stopped."""
    stage, calls = load(STAGES["pretrain"]), []

    def filling(plain):
        def loss_fn(model, batch):
            calls.append(1)
            if len(calls) == 10:  # in the fifth step
                disk.fill()
            return plain(model, batch)

        return loss_fn

    flags = flags_of("pretrain", tmp_path, disk)
    with pytest.raises(RunFailed, match=full(disk, r"out/pretrain_32(_resume)?\.\w+") + ". What was saved is whole"):
        with_loss(load(STAGES["pretrain"]), filling).main([*flags, "--eval_interval", "0"])
    out = disk.place / "out"
    assert torch.load(out / "pretrain_32_resume.pth", weights_only=True)["step"] == 4 and not hidden_files(out)
    disk.free()
    stage.main([*flags, "--eval_interval", "0", "--resume"])
    stage.main([*flags, "--eval_interval", "0", "--out_dir", str(tmp_path / "twin")])
    one, two = (torch.load(d / "pretrain_32.pth", weights_only=True)["model"] for d in (out, tmp_path / "twin"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert history(out / "pretrain_32.jsonl") == history(tmp_path / "twin" / "pretrain_32.jsonl")


def test_the_reference_of_preferences(disk, tmp_path):
    stage = load(STAGES["dpo"])

    class Filling(Reference):
        def ready(self, rows, world):
            disk.fill()
            super().ready(rows, world)

    stage.Reference = Filling
    with pytest.raises(RunFailed, match=full(disk, r"out/cache/reference-\w+\.npy")):
        stage.main(flags_of("dpo", tmp_path, disk))
    assert not hidden_files(disk.place)
    disk.free()
    stage.Reference = Reference
    assert stage.main(flags_of("dpo", tmp_path, disk))["steps"] == 8


def test_the_log_and_the_curve(disk, capfd):
    files = SimpleNamespace(log=disk.place / "x.jsonl", curve=disk.place / "x.png", name="x")
    log = Log(files, WORLD, 100, 1.0, 100, 0)
    log.step(1, 10, loss=1.0, lr=0.1)
    log.draw_curve()
    picture = files.curve.read_bytes()
    disk.fill()
    with pytest.raises(OSError, match="No space left") as caught:
        for step in range(2, 1000):  # until the block that the file has is used up
            log.step(step, 10, loss=1.0, lr=0.1)
    assert caught.value.filename == str(files.log)
    with pytest.raises(OSError, match="No space left") as caught:
        log.draw_curve()
    assert caught.value.filename == str(files.curve) and files.curve.read_bytes() == picture
    assert not hidden_files(disk.place)
    lines = files.log.read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, len(lines)))
    del log
    assert capfd.readouterr().err == ""


def test_the_answers_of_an_evaluation(disk):
    target, keep = disk.place / "answers.jsonl", load("2-eval.py").keep
    args = SimpleNamespace(answers_file=str(target))
    keep(args, target, target, ["old\n"])
    disk.fill()
    with pytest.raises(OSError, match="No space left") as caught:  # of which run_main makes exit code 1
        keep(args, target, target, ["new" * 1000])
    assert disk_fault(caught.value).startswith(str(target)) and target.read_text() == "old\n"


def test_a_programs_last_words_are_one_line(tmp_path, capfd):
    """Of one that may let no file grow past a limit."""
    flags = [*run_flags("pretrain", tmp_path), "--out_dir", str(tmp_path / "out")]
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(SystemExit) as left:
            run_main(load(STAGES["pretrain"]).main, flags)
        gc.collect()
        os._exit(left.value.code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    told = f"failed: {tmp_path}/out/pretrain_32_resume.pth: File too large (the disk at /"
    err = capfd.readouterr().err
    assert err.startswith(told) and err.count("\n") == 1, err
    assert (tmp_path / "out" / "pretrain_32.jsonl").read_text().count("\n") == 2
