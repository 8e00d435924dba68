"""LMConfig: names from both sides, refusals in a sentence, exact parameter counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.LMConfig import DEFAULT_PRESET, PRESETS, LMConfig
from model.model import MiniMindForCausalLM

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {  # of MiniMind's releases, and with experts the parameters that one token meets
    "minimind-v1-small": (26_878_464, 26_878_464),
    "minimind-v1-moe": (96_100_864, 61_497_856),
    "minimind-v1": (108_749_568, 108_749_568),
    "minimind2-small": (25_829_888, 25_829_888),
    "minimind2-moe": (145_029_760, 91_945_600),
    "minimind2": (104_030_976, 104_030_976),
    "minimind3": (63_912_192, 63_912_192),
    "minimind3-moe": (198_416_640, 63_936_768),
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_released_counts_by_formula_and_by_instantiation(name):
    config = LMConfig.from_preset(name)
    assert (config.parameter_count(), config.active_parameter_count()) == COUNTS[name]
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name][0]  # parameters() counts the tied matrix once


@pytest.mark.parametrize("overrides", [
    {"tie_word_embeddings": False},
    {"qk_norm": True, "head_dim": 32},
    {"use_moe": True, "n_shared_experts": 3, "moe_hidden_dim": 48, "n_routed_experts": 5},
    {"use_moe": True, "n_shared_experts": 0},
])  # fmt: skip
def test_formula_equals_instantiation_off_the_presets(overrides):
    config = LMConfig.from_preset("tiny", **overrides)
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())


def test_active_count_drops_the_experts_a_token_does_not_meet():
    config = LMConfig.from_preset("minimind2-moe")
    idle = (4 - 2) * 3 * 640 * 1728 * 8  # experts x matrices x their size x layers
    assert config.parameter_count() - config.active_parameter_count() == idle


def test_the_printed_table_ends_in_json_of_the_counts():
    run = subprocess.run([sys.executable, "-m", "model.LMConfig"], cwd=ROOT, capture_output=True, text=True, check=True)
    counts = json.loads(run.stdout.splitlines()[-1])
    assert list(counts) == list(PRESETS)
    assert {name: counts[name] for name in COUNTS} == {name: total for name, (total, _) in COUNTS.items()}


def test_feed_forward_width_is_eight_thirds_rounded_up():
    assert LMConfig(dim=512).hidden_dim == 1408 and LMConfig(dim=512, multiple_of=256).hidden_dim == 1536
    assert LMConfig(dim=640).moe_hidden_dim == LMConfig(dim=640).hidden_dim == 1728


ALIASES = {
    "hidden_size": ("dim", 384), "num_hidden_layers": ("n_layers", 3), "num_attention_heads": ("n_heads", 4),
    "num_key_value_heads": ("n_kv_heads", 1), "intermediate_size": ("hidden_dim", 100),
    "rms_norm_eps": ("norm_eps", 1e-6), "max_position_embeddings": ("max_seq_len", 99),
    "num_experts": ("n_routed_experts", 6), "num_local_experts": ("n_routed_experts", 7),
    "moe_intermediate_size": ("moe_hidden_dim", 50), "router_aux_loss_coef": ("aux_loss_alpha", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
def test_transformers_names_are_read_and_written_as_ours(alias):
    name, value = ALIASES[alias]
    config = LMConfig(**{alias: value})
    assert getattr(config, name) == getattr(config, alias) == value
    changed = LMConfig()
    setattr(changed, alias, value)
    assert getattr(changed, name) == value
    assert getattr(LMConfig.from_preset("tiny", **{alias: value}), name) == value  # an override, whatever it is called


REFUSED = [
    ({"dimm": 3}, "no field dimm"),
    ({"n_heads": 7, "n_kv_heads": 1}, "dim 512 does not divide into 7 heads"),
    ({"n_kv_heads": 3}, "8 query heads cannot share 3 key/value heads evenly"),
    ({"head_dim": 33}, "head width 33 must be even"),
    ({"dim": 0, "n_layers": -1}, "dim must be a whole number of at least 1, not 0; n_layers must be"),
    ({"dim": 512.0}, "dim must be a whole number of at least 1, not 512.0"),
    ({"vocab_size": True}, "vocab_size must be a whole number"),
    ({"hidden_dim": 0}, "hidden_dim must be a whole number"),
    ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), not 1.0"),
    ({"dropout": "a"}, "dropout must be a number"),
    ({"norm_eps": 0}, "norm_eps must be a number above 0"),
    ({"rope_theta": 1}, "rope_theta must be a number above 1"),
    ({"aux_loss_alpha": -0.1}, "aux_loss_alpha must be a number of at least 0"),
    ({"use_moe": "maybe"}, "use_moe must be True or False, not 'maybe'"),
    ({"use_moe": True, "num_experts_per_tok": 5}, "a token cannot go to 5 of 4 experts"),
    ({"n_shared_experts": -1}, "n_shared_experts must be 0 or more"),
    ({"scoring_func": "sigmoid"}, 'scoring_func must be "softmax"'),
    ({"rope_parameters": 3}, "rope_parameters must be a dict"),
    ({"rope_parameters": {"rope_type": "ntk", "factor": 2}}, '"linear" or "yarn", not \'ntk\''),
    ({"rope_parameters": {"rope_type": "yarn"}}, 'type "yarn" need a factor of at least 1'),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "need a factor of at least 1"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "factor of rope_parameters must be a number"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, 'type "yarn" have no mscale'),
    ({"rope_parameters": {"factor": 2}}, 'type "default" have no factor'),
]


@pytest.mark.parametrize("fields, sentence", REFUSED)
def test_impossible_and_unknown_values_are_refused_in_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        LMConfig(**fields)


def test_several_faults_are_told_at_once():
    with pytest.raises(ValueError) as caught:
        LMConfig(n_heads=7, dropout=2)
    assert "7 heads" in str(caught.value) and "dropout" in str(caught.value)


def test_a_preset_with_a_typo_names_those_that_exist():
    with pytest.raises(ValueError, match="no preset 'minimind2-smal'; presets are tiny, .*" + DEFAULT_PRESET):
        LMConfig.from_preset("minimind2-smal")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}


@pytest.mark.parametrize("config", [LMConfig.from_preset(name) for name in PRESETS] + [
    LMConfig(rope_parameters=YARN), LMConfig(hidden_size=64, n_heads=2, dropout=0.1, head_dim=48),
])  # fmt: skip
def test_fields_and_files_give_the_same_config_back(config, tmp_path):
    fields = json.loads(json.dumps(config.fields()))
    assert LMConfig(**fields).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert LMConfig.from_pretrained(tmp_path).fields() == config.fields()


def test_a_fields_dict_stays_the_callers():
    rope = {"rope_type": "linear", "factor": 2.0}
    assert LMConfig(rope_parameters=rope, rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    assert rope == {"rope_type": "linear", "factor": 2.0}


def test_theta_is_one_number_wherever_it_is_given():
    nested = LMConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert nested.rope_theta == LMConfig(rope_theta=1e4).rope_parameters["rope_theta"] == 1e4
    assert LMConfig(rope_scaling={"type": "linear", "factor": 2.0}).rope_parameters["rope_type"] == "linear"
