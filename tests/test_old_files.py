"""What an earlier version wrote (weights, adapter, resume state) still loads and resumes: tests/files/README.md."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from stage import ROOT, STAGES, load

from model.weights import load_model

FILES = Path(__file__).parent / "files"
EXPECTED = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))
FLAGS = """
--seq_len 64 --batch_size 2 --accumulation_steps 2 --max_steps 12 --val_split 0.2 --eval_interval 5 --log_interval 1
--device cpu
""".split()  # noqa: SIM905


@pytest.mark.filterwarnings("error:.*was trained on other weights")  # the fingerprint of weights stays, too
@pytest.mark.parametrize("name", ["pretrain_32.pth", "lora/small_32.pth"])
def test_old_weights_give_their_old_logits(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # the adapter names its weights by a path from here
    model, tokenizer, _ = load_model(FILES / name)
    assert len(tokenizer) == 320
    with torch.no_grad():
        logits = model(torch.tensor([EXPECTED["ids"]])).logits[0, -1, EXPECTED["entries"]]
    assert logits.tolist() == pytest.approx(EXPECTED["logits"][name], rel=1e-4, abs=1e-5)


def test_an_old_state_resumes_to_the_end_its_run_would_have_had(tmp_path):
    """Optimizer, random numbers (there is dropout), data order and log go on where the old code stopped."""
    out = tmp_path / "out"
    shutil.copytree(FILES, out)
    flags = [*FLAGS, "--data_path", FILES / "texts.jsonl", "--out_dir", out, "--resume"]
    result = load(STAGES["pretrain"]).main(list(map(str, flags)))
    assert result["steps"] == 12 and result["tokens"] == EXPECTED["tokens"]
    for name in ("loss", "val_loss", "val_bits_per_byte"):
        assert result[name] == pytest.approx(EXPECTED[name], rel=1e-4), name
    rows = [json.loads(line) for line in (out / "pretrain_32.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {str(row["step"]): row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-4)
    assert not (out / "pretrain_32_resume.pth").exists()  # the run is finished
