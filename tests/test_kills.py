"""A run of any stage that is killed with SIGKILL and resumed equals the run that was not: weights, losses, result."""

import json
import os
import signal
import time

import pytest
from stage import STAGES, Forked, after_a_save, last_json, load, popen, run_flags, same_after_a_kill, with_loss

BASE = ["pretrain", "full_sft"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(stage): the folder of an uninterrupted run, made once for all kills of the stage, and its seconds."""
    top, made = tmp_path_factory.mktemp("kills"), {}

    def of(stage):
        if stage not in made:
            folder = top / stage
            flags, begin = run_flags(stage, folder), time.monotonic()
            assert Forked(STAGES[stage], [*flags, "--out_dir", folder / "whole"], folder / "log.txt").wait() == 0
            made[stage] = folder, time.monotonic() - begin
        return made[stage]

    return of


@pytest.mark.parametrize("stage", [*BASE, "lora"])
def test_a_killed_command_goes_on_as_if_nothing_had_happened(stage, tmp_path):
    printed = same_after_a_kill(stage, tmp_path, after_a_save)
    assert "resumed   at step" in printed
    flags, log = [*run_flags(stage, tmp_path), "--out_dir", tmp_path / "whole", "--resume"], tmp_path / "third.txt"
    assert popen(STAGES[stage], flags, log).wait() == 0
    assert last_json(log.read_text(encoding="utf-8"))["steps"] == 12  # a finished run prints its result again


class KilledInAStep(Forked):
    """The stage's main(), which ends by SIGKILL in its `calls`-th micro-batch."""

    def __init__(self, script, flags, log, calls):
        self.calls = calls
        super().__init__(script, flags, log)

    def run(self):
        left = [self.calls]

        def fatal(plain):
            def loss_fn(model, batch):
                left[0] -= model.training
                if model.training and not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(model, batch)

            return loss_fn

        with_loss(load(self.script), fatal).main(self.flags)


def test_two_kills_between_the_same_saves_lose_no_step_of_the_log(tmp_path):
    """The second one before the resumed run has saved: the log still has what the first run did, each step once."""
    flags, log = [*run_flags("pretrain", tmp_path, 7), "--save_interval", "4", "--eval_interval", "3"], tmp_path / "log"
    for out, resume, calls in (("o", [], 11), ("o", ["--resume"], 3), ("o", ["--resume"], 0), ("twin", [], 0)):
        process = KilledInAStep(STAGES["pretrain"], [*flags, "--out_dir", tmp_path / out, *resume], log, calls)
        assert process.wait() == (-signal.SIGKILL if calls else 0)
        lines = (tmp_path / out / "pretrain_32.jsonl").read_text().splitlines()
        assert sum("tokens" in json.loads(line) for line in lines) >= 4  # those of the save
    logs = [(tmp_path / out / "pretrain_32.jsonl").read_bytes() for out in ("o", "twin")]
    assert logs[0] == logs[1]
    pictures = [(tmp_path / out / "pretrain_32.png").read_bytes() for out in ("o", "twin")]
    assert pictures[0] == pictures[1]  # the whole curve


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.15, 0.5, 0.85])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment(stage, part, whole):
    """`part` of the time the run takes: in its start, its cache, its steps, its saves, its end."""
    folder, seconds = whole(stage)
    same_after_a_kill(stage, folder, lambda process, out: process.join(part * seconds), Forked)


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "delay"), [
    (".*.tmp", 0), (".*.tmp", 0.005),  # inside a save
    ("cache/*.building-*", 0), ("cache/*.building-*", 0.01),  # inside the cache's build
])  # fmt: skip
@pytest.mark.parametrize("stage", BASE)
def test_killed_while_a_file_is_written(stage, sign, delay, whole):
    """`delay` seconds after the unfinished file or folder appears in --out_dir."""

    def moment(process, out):
        while process.poll() is None and not list(out.glob(sign)):
            time.sleep(0.0005)
        time.sleep(delay)

    same_after_a_kill(stage, whole(stage)[0], moment, Forked)
