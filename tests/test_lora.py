"""Adapters: nothing at the start, the same merged, alone trained, small on disk, and peft's in both directions."""

import json

import pytest
import torch
from stage import STAGES, chat_weights, load, run_flags, write_chats

from common.errors import UserError
from export.transformers_folder import write_transformers_folder
from model.LMConfig import LMConfig
from model.lora import (
    PROJECTIONS,
    LoraExperts,
    LoraLinear,
    adapted_layers,
    add_lora,
    fingerprint,
    load_lora,
    merge_lora,
    remove_lora,
    save_lora,
    use_lora,
)
from model.model import MiniMindForCausalLM
from model.peft_folder import load_peft, save_peft
from model.weights import load_model

IDS = torch.arange(3, 39).view(2, 18)


def small_model(seed=0, **fields):
    torch.manual_seed(seed)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 48, "vocab_size": 64}
    return MiniMindForCausalLM(LMConfig(**(shape | fields))).eval()


def stirred(model, seed=1):
    """The model with its active adapter far from its zero start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for adapter in (layer.adapter or {}).values():
                adapter.B.normal_(std=0.3, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


KINDS = {
    "dense": ({}, PROJECTIONS),
    "moe": ({"use_moe": True}, PROJECTIONS),
    "experts": ({"use_moe": True, "n_routed_experts": 3}, (*PROJECTIONS, "experts")),
    "head": ({}, ("q_proj", "lm_head")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_nothing_at_the_start_and_the_same_when_merged(kind):
    fields, targets = KINDS[kind]
    model = small_model(**fields)
    plain, state = logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    add_lora(model, rank=4, alpha=6, targets=targets)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-6)
    adapted = logits(stirred(model))
    assert (adapted - plain).abs().max() > 0.1
    own = {name: p for name, p in model.state_dict().items() if ".adapters." not in name}
    assert all(torch.equal(own[name], p) for name, p in state.items())
    merge_lora(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert not adapted_layers(model) and set(model.state_dict()) == set(state)
    assert all(type(m) not in (LoraLinear, LoraExperts) for m in model.modules())


def test_gradients_are_those_of_the_merged_weights():
    """W' = W + s B A, so dL/dB = s dL/dW' A' and dL/dA = s B' dL/dW'; for experts, in each slice of the stack."""
    model = stirred(add_lora(small_model(use_moe=True), rank=3, alpha=6, targets=("k_proj", "experts")))
    twin = merge_lora(load_into(small_model(use_moe=True), model))
    for m in (model, twin):
        m(IDS, labels=IDS).loss.backward()
    weights = dict(twin.named_parameters())
    for name, layer in adapted_layers(model).items():
        for key, adapter in layer.adapter.items():
            d_weight = weights[f"{name}.{key}"].grad
            torch.testing.assert_close(adapter.B.grad, 2 * d_weight @ adapter.A.mT, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(adapter.A.grad, 2 * adapter.B.mT @ d_weight, rtol=1e-3, atol=1e-6)


def load_into(model, adapted):
    """A copy of `adapted`'s adapter on another model of the same weights."""
    config = adapted.lora_configs["default"]
    add_lora(model, config.rank, config.alpha, config.dropout, config.targets)
    model.load_state_dict(adapted.state_dict())
    return model


def test_which_layers_are_adapted_and_what_is_trained():
    model = add_lora(small_model(), rank=2)
    names = {name.rsplit(".", 1)[-1] for name in adapted_layers(model)}
    assert names == set(PROJECTIONS) and len(adapted_layers(model)) == 2 * 7
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapters.default." in name for name in trained)
    moe = small_model(use_moe=True)
    assert not [n for n in adapted_layers(add_lora(moe, rank=2)) if n.endswith(("mlp.gate", "experts", "lm_head"))]
    one = add_lora(small_model(), targets=("model.layers.[1].*_proj",))
    assert all(name.startswith("model.layers.1.") for name in adapted_layers(one))
    both = add_lora(small_model(), targets=("model.layers.[01].self_attn.q_proj",))
    assert list(adapted_layers(both)) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    everything = add_lora(small_model(use_moe=True), targets=("*",))
    assert not [n for n in adapted_layers(everything) if n.endswith(("lm_head", "mlp.gate"))]
    with pytest.raises(ValueError, match="no layer is called 'wq'; the model's layers are down_proj, "):
        add_lora(small_model(), targets=("wq",))
    with pytest.raises(ValueError, match="no layer of this model is called gate_proj"):
        add_lora(small_model(use_moe=True, n_shared_experts=0), targets=("gate_proj",))
    with pytest.raises(ValueError, match="rank"):
        add_lora(small_model(), rank=0)


def test_dropout_is_on_the_adapters_input_and_in_training_only():
    model = stirred(add_lora(small_model(), dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_several_adapters_are_loaded_and_switched(tmp_path):
    for seed, name in ((1, "a"), (2, "b")):
        save_lora(tmp_path / f"{name}.pth", stirred(add_lora(small_model(), rank=seed + 1), seed), {"of": name})
    alone = [logits(load_lora(small_model(), tmp_path / f"{name}.pth")) for name in "ab"]
    model = small_model()
    plain = logits(model)
    load_lora(load_lora(model, tmp_path / "a.pth"), tmp_path / "b.pth", name="second")
    assert torch.equal(logits(model), alone[1])
    assert torch.equal(logits(use_lora(model, "a")), alone[0])
    assert torch.equal(logits(use_lora(model, None)), plain)
    assert torch.equal(logits(use_lora(model, "second")), alone[1])
    with pytest.raises(ValueError, match="no adapter 'third'"):
        use_lora(model, "third")
    with pytest.raises(ValueError, match="the adapter's name 'second' is taken"):
        load_lora(model, tmp_path / "a.pth", name="second")
    with pytest.raises(ValueError, match="name 'items' is taken"):  # by torch's container of modules
        load_lora(model, tmp_path / "a.pth", name="items")
    assert torch.equal(logits(remove_lora(model, "second")), plain)
    assert torch.equal(logits(use_lora(model, "a")), alone[0])
    content = torch.load(tmp_path / "b.pth", weights_only=True)
    content["model"].popitem()
    torch.save(content, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="does not fit this model"):
        load_lora(model, tmp_path / "less.pth")
    assert list(model.lora_configs) == ["a"] and torch.equal(logits(use_lora(model, "a")), alone[0])


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    path = tmp_path / "a.pth"
    save_lora(path, add_lora(small_model()))
    with pytest.raises(ValueError, match=r"another shape: dim 32 \(here: 64\)"):
        load_lora(small_model(dim=64), path)
    with pytest.warns(UserWarning, match="trained on other weights"):
        load_lora(small_model(seed=5), path)
    with pytest.raises(ValueError, match="is not an adapter"):
        load_lora(small_model(), chat_weights(tmp_path))
    with pytest.raises(ValueError, match="no adapter is active"):
        save_lora(path, small_model())


def test_an_adapters_file_stands_for_the_model_with_it(tmp_path):
    base = chat_weights(tmp_path)
    result = run_lora(tmp_path, "--learning_rate", "0.1")
    model, tokenizer, record = load_model(result["weights"])
    by_hand = load_lora(load_model(base)[0], result["weights"])
    torch.testing.assert_close(logits(model), logits(by_hand.eval()), rtol=1e-4, atol=1e-5)
    assert tokenizer is not None and record["stage"] == "lora" and record["result"] == result
    base.unlink()
    with pytest.raises(ValueError, match=r"an adapter for the weights .*full_sft_32.pth, which are not there"):
        load_model(result["weights"])


# ------------------------------------------------------------------------------------------------------------- peft
def test_peft_reads_ours_and_we_read_peft(tmp_path):
    """On the exported dense model, transformers' Llama with the same state dict: the same logits, both ways."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    model = small_model()
    config = model.config
    llama = LlamaForCausalLM(LlamaConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, intermediate_size=config.hidden_dim, vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=True, rope_parameters=dict(config.rope_parameters),
    )).eval()  # fmt: skip
    llama.load_state_dict(model.state_dict())
    stirred(add_lora(model, rank=3, alpha=7, dropout=0.1))
    save_peft(tmp_path / "ours", model, base="x")
    theirs = peft.PeftModel.from_pretrained(llama, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)

    other = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "init_lora_weights": False}
    elsewhere = peft.get_peft_model(theirs.unload(), peft.LoraConfig(r=4, lora_alpha=8, **other))
    elsewhere.eval().save_pretrained(tmp_path / "theirs")
    loaded = load_peft(small_model(), tmp_path / "theirs").eval()
    assert (logits(loaded) - logits(small_model())).abs().max() > 0.01
    torch.testing.assert_close(logits(loaded), logits(elsewhere), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_the_stages_peft_folder_fits_the_exported_base(qk_norm, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    base = chat_weights(tmp_path, qk_norm=qk_norm)
    result = run_lora(tmp_path, "--learning_rate", "0.1", "--peft_dir", tmp_path / "peft")
    (tmp_path / "exported").mkdir()
    write_transformers_folder(tmp_path / "exported", *load_model(base), "x")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), tmp_path / "peft"
    )
    ours = logits(load_model(result["weights"])[0])
    assert (ours - logits(load_model(base)[0])).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "holds a IA3 adapter"),
        ({"use_dora": True}, "has no counterpart here: use_dora=True"),
        ({"bias": "all"}, "has no counterpart here: bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\]"),  # adapts what follows them alone
        ({"invented_tomorrow": {"x": 1}}, "invented_tomorrow"),
        ({"r": None}, "must say r and lora_alpha"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),  # it changes the frozen matrices as well
    ],
)
def test_a_peft_adapter_without_counterpart_is_refused(change, message, tmp_path):
    save_peft(tmp_path, add_lora(small_model()))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_peft(small_model(), tmp_path, "x")


def test_peft_folders_and_models_that_cannot_meet(tmp_path):
    save_peft(tmp_path / "three", add_lora(small_model(n_layers=3)))
    with pytest.raises(ValueError, match=r"does not fit this model: no layer is called 'model\.layers\.2"):
        load_peft(small_model(), tmp_path / "three")
    save_peft(tmp_path / "wide", add_lora(small_model(hidden_dim=96)))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_peft(small_model(), tmp_path / "wide")
    with pytest.raises(ValueError, match="needs a dense model"):
        save_peft(tmp_path / "moe", add_lora(small_model(use_moe=True)))
    with pytest.raises(ValueError, match="no peft folder"):
        load_peft(small_model(), tmp_path)
    (tmp_path / "three" / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no JSON object"):
        load_peft(small_model(), tmp_path / "three")


# ------------------------------------------------------------------------------------------------------- the stage
def run_lora(tmp_path, *more) -> dict:
    flags = [*run_flags("lora", tmp_path, steps=4), "--out_dir", tmp_path / "o", *more]
    return load(STAGES["lora"]).main([str(flag) for flag in flags])


def test_the_base_stays_and_only_the_adapter_is_written(tmp_path):
    base = chat_weights(tmp_path, dim=64)
    before = base.read_bytes()
    result = run_lora(tmp_path, "--learning_rate", "0.1", "--peft_dir", tmp_path / "peft")
    assert base.read_bytes() == before and result["weights"].endswith("o/lora/x_64.pth")
    content = torch.load(result["weights"], weights_only=True)
    assert all(name.endswith((".A", ".B")) for name in content["model"])
    assert content["base"] == fingerprint(load_model(base)[0]) and len(content["model"]) == 2 * 2 * 7
    assert (tmp_path / "o" / "lora" / "x_64.pth").stat().st_size < base.stat().st_size / 10
    ours = load_lora(load_model(base)[0], result["weights"])
    folder = load_peft(load_model(base)[0], tmp_path / "peft")
    assert torch.equal(logits(ours.eval()), logits(folder.eval()))


def test_an_adapter_of_a_bare_state_dict_knows_the_preset_that_told_its_heads(tmp_path):
    shape = {"dim": 64, "n_layers": 2, "hidden_dim": 96}
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(n_heads=8, n_kv_heads=2, **shape))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    flags = [text for name, value in shape.items() for text in (f"--{name}", value)]
    result = run_lora(tmp_path, "--from_weight", tmp_path / "own.pth", "--preset", "minimind2-small", *flags)
    by_hand = load_lora(model.eval(), result["weights"])
    torch.testing.assert_close(logits(load_model(result["weights"])[0]), logits(by_hand), rtol=1e-4, atol=1e-5)


def test_a_stopped_run_keeps_the_adapter_its_optimizer_and_no_more(tmp_path):
    stage, state = load(STAGES["lora"]), tmp_path / "o" / "lora" / "x_32_resume.pth"
    kept = {}
    original = stage.train

    def spy(run, *rest, **named):
        finish = run.files.finish
        run.files.finish = lambda *a: (kept.update(torch.load(state, weights_only=True)), finish(*a))
        return original(run, *rest, **named)

    stage.train = spy
    stage.main([*run_flags("lora", tmp_path, steps=4), "--out_dir", str(tmp_path / "o")])
    assert kept["step"] == 4 and all(".adapters." in name for name in kept["model"])
    sizes = [p.numel() for p in kept["model"].values()]
    moments = [s["exp_avg"].numel() for o in kept["engine"]["optimizers"] for s in o["state"].values()]
    assert sorted(sizes) == sorted(moments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "rank of an adapter must be"),
        (["--rank", "999999999"], "can have a rank above 32"),
        (["--lora_dropout", "1"], "dropout of an adapter must"),
        (["--peft_dir", "/dev/null/p"], "cannot write the folder"),
        (["--targets", "c_attn"], "no layer is called 'c_attn'"),
        (["--targets", "lm_head", "--peft_dir", "p"], "cannot hold an adapter of the head"),
        (["--save_weight", "绿" * 80], "File name too long"),
        (["--from_weight", "nowhere/full_sft_512.pth"], "no weights at nowhere/full_sft_512.pth"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_lora(tmp_path, *flags)
    assert not list(tmp_path.glob("o/lora/*.pth"))


def test_wrong_data_and_missing_weights(tmp_path, monkeypatch):
    data = tmp_path / "identity.jsonl"
    row = {"conversations": [{"role": "user", "content": "谁？"}, {"role": "assistant", "content": "我是{{name}}。"}]}
    data.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"identity.jsonl:1: the placeholder \{\{name\}\} is not filled in; "
        r"`python data_process.py fill \S+identity.jsonl --set name=... --out FILE`",
    ):
        run_lora(tmp_path, "--data_path", data)
    chats = write_chats(tmp_path / "c.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full_sft_32.pth").unlink()
    with pytest.raises(UserError, match=r"no weights of full_sft in o or out; run `python 3-full_sft.py` first"):
        load(STAGES["lora"]).main(["--data_path", str(chats), "--out_dir", "o"])


def test_a_resumed_run_must_stand_on_the_same_base(tmp_path):
    run_lora(tmp_path)
    chat_weights(tmp_path, seed=9)  # other weights under the same name
    with pytest.raises(UserError, match="base was [0-9a-f]{16}, is now [0-9a-f]{16}"):
        run_lora(tmp_path, "--resume")
