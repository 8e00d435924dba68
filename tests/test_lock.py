"""The same command twice at once: the second one is refused in one line, and a dead one holds nothing."""

import os
import signal
import time

import pytest
from stage import STAGES, Forked, load, run_flags, with_loss

from cleaning.distill import distill
from common.chat_api import ChatApi
from common.errors import UserError, run_main
from common.files import lock
from scripts.download_data import ITEMS, HuggingFace, Remote


def in_a_child(function) -> int:
    """function() in a copy of this process, which then stands still until it is killed -> its id, when it stands."""
    ready, done = os.pipe()
    if (child := os.fork()) == 0:
        try:
            function()
            os.write(done, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_ends_with_its_process_though_its_workers_live_on(tmp_path):
    held, workers = [], []
    path = tmp_path / "lock"

    def take():
        held.append(lock(path, "taken"))
        ready, done = os.pipe()
        if os.fork() == 0:
            os.write(done, str(os.getpid()).encode())
            time.sleep(60)
            os._exit(0)
        (tmp_path / "worker").write_bytes(os.read(ready, 9))

    child = in_a_child(take)
    workers.append(int((tmp_path / "worker").read_text()))
    with pytest.raises(UserError, match="^taken$"):
        lock(path, "taken")
    kill(child)
    lock(path, "taken").close()
    os.kill(workers[0], signal.SIGKILL)


def test_a_lock_on_a_file_that_its_owner_has_deleted_counts_for_nothing(tmp_path, monkeypatch):
    path, stat = tmp_path / "lock", os.stat

    def deleted_meanwhile(name):
        path.unlink()
        return stat(name)

    monkeypatch.setattr(os, "stat", deleted_meanwhile)
    with pytest.raises(UserError, match="^taken$"):
        lock(path, "taken")


class Waiting(Forked):
    """The stage's main(), which stands still in its tenth micro-batch."""

    def run(self):
        calls = []

        def waiting(plain):
            def loss_fn(model, batch):
                calls.append(1)
                if len(calls) == 10:
                    time.sleep(600)  # until it is killed
                return plain(model, batch)

            return loss_fn

        with_loss(load(self.script), waiting).main(self.flags)


def test_a_second_run_into_the_same_files_is_refused(tmp_path, capsys):
    main, out = load(STAGES["pretrain"]).main, tmp_path / "o"
    flags = [*run_flags("pretrain", tmp_path), "--eval_interval", "0", "--out_dir", str(out)]
    first = Waiting(STAGES["pretrain"], flags, tmp_path / "log.txt")
    while first.poll() is None and not (out / "pretrain_32_resume.pth").exists():
        time.sleep(0.02)
    for more in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(SystemExit) as left:
            run_main(main, [*flags, *more])
        told = f"error: another run is at work on {out}/pretrain_32.pth; wait for it, or use --save_weight NAME, "
        assert left.value.code == 2 and capsys.readouterr().err == f"{told}or --out_dir\n"
    assert main([*flags, "--save_weight", "other", "--max_steps", "1"])["steps"] == 1
    main([*flags, "--dry_run", "--overwrite"])
    first.kill()
    first.wait()
    assert main([*flags, "--resume"])["steps"] == 12


def test_a_second_run_of_distill_or_of_a_download_touches_nothing(tmp_path):
    """The file that both add to is the lock."""
    (tmp_path / "p.txt").write_text("一加一？\n", encoding="utf-8")
    journal, part = tmp_path / "out.jsonl.answers", tmp_path / "dpo.jsonl.part"
    held = []
    child = in_a_child(lambda: held.extend(lock(path, "taken") for path in (journal, part)))
    teacher = ChatApi("http://127.0.0.1:9/v1", "m", retries=0)
    with pytest.raises(UserError, match=r"another run is asking for .*out.jsonl; wait for it, or name another --out"):
        distill(tmp_path / "p.txt", tmp_path / "out.jsonl", teacher)
    with pytest.raises(UserError, match=r"another download of .*dpo.jsonl is under way; wait for it"):
        HuggingFace().fetch(ITEMS["dpo"], Remote("dpo.jsonl", 5, None), tmp_path)
    kill(child)
    assert distill(tmp_path / "p.txt", tmp_path / "out.jsonl", teacher)["asked"] == 1
