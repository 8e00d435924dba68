"""Files that a disk has damaged, or that somebody else has made: refused in one sentence that names the file."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage import SMALL, STAGES, chat_weights, load, run_flags

from common.errors import UserError, run_main
from model.LMConfig import LMConfig
from model.lora import LoraConfig, add_lora, load_lora, save_lora
from model.model import MiniMindForCausalLM
from model.peft_folder import CONFIG, TENSORS, load_peft, save_peft
from model.tokenizer import load_tokenizer
from model.tokenizer_files import DEFAULT_FOLDER, tokenizer_from_dict
from model.weights import load_model
from model.weights_file import FORMAT, LORA_FORMAT, all_weights
from trainer.checkpoint import read_state


def small():
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(**SMALL))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights, an adapter, an adapter as a peft folder, and the state of a run, by name."""
    top = tmp_path_factory.mktemp("foreign")
    model = add_lora(small(), 4)
    save_lora(top / "adapter.pth", model)
    save_peft(top / "peft", model)
    state = {"format": "minimind-resume-1", "step": 4, "model": {"a": torch.arange(3000.0)}}
    torch.save(state, top / "x_32_resume.pth")
    readers = {"weights": load_model, "adapter": lambda path: load_lora(small(), path), "state": read_state}
    paths = {"weights": chat_weights(top), "adapter": top / "adapter.pth", "state": top / "x_32_resume.pth"}
    return {name: (paths[name], readers[name]) for name in paths} | {
        "peft": (top / "peft", lambda path: load_peft(small(), path))
    }


@pytest.mark.parametrize("name", ["weights", "adapter", "state"])
def test_a_bit_that_turned_is_noticed(name, files, tmp_path):
    """In a tensor it would be another weight, and nothing else would tell."""
    path, read = files[name]
    whole, damaged = path.read_bytes(), tmp_path / path.name
    damaged.write_bytes(whole)
    read(damaged)
    tensor = list(torch.load(path, weights_only=True)["model"].values())[-1].numpy().tobytes()
    places, start = random.Random(0), whole.index(tensor)
    for _ in range(12):
        content = bytearray(whole)
        content[start + places.randrange(len(tensor))] ^= 1 << places.randrange(8)
        damaged.write_bytes(content)
        with pytest.raises((ValueError, UserError), match=f"^{damaged} "):
            read(damaged)


@pytest.mark.parametrize("change", [
    None, {"config": [1]}, {"config": {"n_layers": 10**9}}, {"model": {"a": 5}}, {"model": None}, {"model": [1]},
    {"tokenizer": {"tokenizer.json": "{}"}}, {"record": ...},
], ids=str)  # fmt: skip
def test_weights_of_another_make(change, files, tmp_path):
    content = torch.load(files["weights"][0], weights_only=True)
    content = {"format": FORMAT} if change is None else content | change
    torch.save({key: value for key, value in content.items() if value is not ...}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"^{tmp_path}/w.pth"):
        load_model(tmp_path / "w.pth")


def test_names_that_are_no_text(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"^{tmp_path}/w.pth"):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize("text", [
    "[]", "null", "[" * 100_000, '{"model_type": "granitemoeshared"}', '{"model_type": "llama", "rope_scaling": [1]}',
], ids=lambda text: text[:40])  # fmt: skip
def test_folders_of_another_make(text, tmp_path):
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        load_model(tmp_path)


@pytest.mark.parametrize("change", [
    None, {"config": []}, {"lora": []}, {"lora": {"rank": 4, "bias": 1}}, {"lora": {"alpha": "x"}},
    {"lora": {"targets": [3]}}, {"model": None}, {"model": {"a": 1}},
], ids=str)  # fmt: skip
def test_adapters_of_another_make(change, files, tmp_path):
    content = torch.load(files["adapter"][0], weights_only=True)
    torch.save({"format": LORA_FORMAT} if change is None else content | change, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.pth"):
        load_lora(small(), tmp_path / "a.pth")


@pytest.mark.parametrize("change", [
    {"r": True}, {"lora_alpha": float("inf")}, {"lora_alpha": 10**400}, {"lora_dropout": "0.1"}, {"lora_dropout": None},
], ids=str)  # fmt: skip
def test_peft_folders_of_another_make(change, files, tmp_path):
    content = json.loads((files["peft"][0] / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(content | change))
    save_file(load_file(files["peft"][0] / TENSORS), tmp_path / TENSORS)
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        load_peft(small(), tmp_path)


def test_an_adapter_is_named_after_its_folder(files, monkeypatch):
    monkeypatch.chdir(files["peft"][0])
    assert load_peft(small(), ".").lora_configs.keys() == {"peft"}
    with pytest.raises(ValueError, match="'training' is taken"):  # a name that every module has
        add_lora(small(), name="training")
    with pytest.raises(ValueError, match="whole number"):
        LoraConfig(rank=True)


def test_tokenizers_of_another_make(tmp_path):
    """Where its library panics in Rust, that is no Exception for Python."""
    names = ("tokenizer.json", "tokenizer_config.json")
    good = {name: (DEFAULT_FOLDER / name).read_text("utf-8") for name in names}
    vocabulary = json.loads(good["tokenizer.json"])
    vocabulary["model"]["vocab"] = dict.fromkeys(vocabulary["model"]["vocab"], 0)
    for name, text, sentence in (
        ("tokenizer.json", json.dumps(vocabulary), "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token of tokenizer_config.json must be a text, not 5"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tokenizer_from_dict(good | {name: text})
    for name, text in good.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{tmp_path}"):
        load_tokenizer(tmp_path)


def test_the_newest_weights_are_a_file(tmp_path):
    """No folder, no link to nothing, no export; of equal age, as an unpacked archive leaves them, always the same."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "d_32.pth").write_bytes(b"")
    for name in ("c_32.pth", "a_32.pth", "b_32.pth"):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    (tmp_path / "folder_32.pth").mkdir()
    (tmp_path / "link_32.pth").symlink_to(tmp_path / "nothing.pth")
    assert [path.name for path in all_weights(tmp_path)] == ["c_32.pth", "b_32.pth", "a_32.pth"]


def test_a_name_too_long_is_told_before_the_work(tmp_path, capsys):
    """Every file of the run has a longer name than its weights."""
    for flags in (["--save_weight", "x" * 235], ["--from_weight", "x" * 300]):
        with pytest.raises(SystemExit) as left:
            run_main(
                load(STAGES["pretrain"]).main, [*run_flags("pretrain", tmp_path), "--out_dir", str(tmp_path), *flags]
            )
        err = capsys.readouterr().err
        assert left.value.code == 2 and "too long" in err and err.count("\n") == 1, err
