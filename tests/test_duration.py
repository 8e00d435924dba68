"""How long a run will take: estimated before it starts, told once while it runs."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from stage import load, run_flags

from model.LMConfig import LMConfig
from trainer.duration import REACHED, in_words, operations, time_line
from trainer.log import Log, product_flops
from trainer.world import World

CONFIG = LMConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16, vocab_size=10)
GPU = World(0, 2, torch.device("cuda:0"), torch.bfloat16)


def arguments(**changed):
    return SimpleNamespace(**({"stage": "pretrain", "seq_len": 4, "gradient_checkpointing": False} | changed))


def test_operations_by_hand():
    """embedding 10 x 8; queries and output 8 x 8, key and value 8 x 4; gate, up and down 8 x 16; norms 3 x 8."""
    parameters = 80 + 2 * 64 + 2 * 32 + 3 * 128 + 24
    attention = 6 * 2 * 4 * 4  # 6 x layers x heads x head width x row length
    all_learned = 6 * parameters + attention
    assert operations(CONFIG, arguments(), 1000) == 1000 * all_learned
    assert operations(CONFIG, arguments(), 1, learned_share=0.0) == 4 * parameters + attention
    assert operations(CONFIG, arguments(), 1, others=7) == all_learned + 14
    assert operations(CONFIG, arguments(gradient_checkpointing=True), 3) == pytest.approx(4 * all_learned)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7140, "119 minutes"), (7200, "2.0 hours")],
)
def test_spans_are_told_in_the_unit_one_would_use(seconds, words):
    assert in_words(seconds) == words


def test_the_estimate_is_operations_by_speed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    tokens = 3600 * 2 * REACHED["cuda"] * 71e12 / operations(CONFIG, arguments(), 1)  # an hour of two such GPUs
    told = "about 60 minutes (estimate: 30% of the device's 142,000 GFLOP/s; without validation)"
    assert time_line(CONFIG, arguments(), GPU, tokens) == told
    assert time_line(CONFIG, arguments(), GPU, 3 * tokens).startswith("about 3.0 hours (estimate")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unheard-of 1")
    assert time_line(CONFIG, arguments(), GPU, tokens).startswith("not estimated: this GPU")
    assert time_line(CONFIG, arguments(stage="grpo"), GPU, tokens).startswith("not estimated: sampling")


def test_a_dry_run_tells_it_and_a_resumed_run_counts_what_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["trainer.log"], "product_flops", lambda device: 1e6)  # a slow device: long spans
    flags = [*run_flags("pretrain", tmp_path), "--max_steps", "8", "--out_dir", str(tmp_path / "o")]

    def told(*more):
        load("1-pretrain.py").main([*flags, *more])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  time "))
        span, unit = line.split("about ")[1].split()[:2]
        return float(span) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]

    whole = told("--dry_run")
    with pytest.raises(RuntimeError, match="the power went"), monkeypatch.context() as patch:
        patch.setattr(Log, "validation", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("the power went")))
        load("1-pretrain.py").main([*flags, "--save_interval", "2", "--eval_interval", "6"])
    capsys.readouterr()
    assert told("--resume", "--dry_run") == pytest.approx(whole / 2, rel=0.1)  # saved at 4 of 8


def test_a_terminal_is_told_one_time_left(tmp_path, monkeypatch):
    """The bar says where the run stands; when it will end is said by the line of the log alone."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    log = Log(SimpleNamespace(log=tmp_path / "a.jsonl"), World(0, 1, torch.device("cpu"), torch.float32), 40, 1.0,
              log_interval=10, start_step=0)  # fmt: skip
    for step in range(1, 21):
        log.bar.last_print_t = 0  # as if the last drawing were long ago
        log.step(step, 100, lr=1e-3, loss=1.0)
    log.close()
    assert "step 20/40" in screen.getvalue()
    assert not {"<", "it/s", "?"} & set(screen.getvalue()) and "left" not in screen.getvalue()


def test_the_device_is_measured_once():
    product_flops.cache_clear()
    product_flops(torch.device("cpu"))
    product_flops(torch.device("cpu"))
    assert product_flops.cache_info().misses == 1
