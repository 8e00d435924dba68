"""What other programs need and our own code knows without being told: in the files, for each fault that was met.

The programs themselves are run by `python scripts/benchmark.py runtimes`, each in an environment of its own.
"""

import json
from argparse import Namespace

import pytest
import torch
from test_export import RECORD, build, export, here  # noqa: F401  (here is a fixture)
from transformers import (
    AutoTokenizer,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from common.errors import UserError
from export.minimind_file import minimind_release, minimind_state, other_settings
from export.transformers_folder import write_transformers_folder
from inference.engine import Engine
from inference.open_model import open_engine
from inference.sampling import SamplingParams
from model.convert import NoCounterpart, from_minimind
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render
from model.tokenizer_files import save_tokenizer, tokenizer_hash
from model.weights import load_model

BASE = {"stage": "pretrain"}
PROMPTS = ["春天", "今天天气很", "从前有一个", "中国的首都是", "def add(a, b):", "The", "1+1="]
ASK = [{"role": "user", "content": "你好"}]


def config_of(folder, name="tokenizer_config.json") -> dict:
    return json.loads((folder / name).read_text("utf-8"))


# --------------------------------------------------------------------------------------------- transformers' folders
def test_the_tokenizer_gives_what_the_model_takes_and_knows_its_context(tmp_path):
    """transformers 4 adds token_type_ids unless the names are there, and `generate` refuses them."""
    write_transformers_folder(tmp_path, build("llama"), load_tokenizer(), RECORD, "chat")
    config = config_of(tmp_path)
    assert config["model_input_names"] == ["input_ids", "attention_mask"] and config["model_max_length"] == 512
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert set(tokenizer("你好")) == {"input_ids", "attention_mask"} and tokenizer.model_max_length == 512


def test_a_base_model_begins_with_its_start_token_everywhere(tmp_path):
    """A plain prompt in transformers' pipeline is continued as our engine continues it."""
    model, ours = build("llama"), load_tokenizer()
    write_transformers_folder(tmp_path, model, ours, BASE, "base")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    engine, greedy = Engine(model, ours), SamplingParams(max_tokens=12, temperature=0)
    continues = pipeline("text-generation", str(tmp_path))
    for prompt in PROMPTS:
        assert theirs(prompt)["input_ids"] == engine.encode(prompt) and engine.encode(prompt)[0] == 1
        text = engine.generate([prompt], greedy)[0].text
        said = continues(prompt, max_new_tokens=12, max_length=None, do_sample=False, return_full_text=False)
        assert said[0]["generated_text"] == text
    chat = theirs.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert chat == render(ours, ASK, add_generation_prompt=True)[0]  # no second start token
    card = (tmp_path / "README.md").read_text("utf-8")
    assert 'tokenizer("春天", return_tensors="pt")' in card


def test_a_chat_model_s_plain_text_has_no_start_token(tmp_path):
    write_transformers_folder(tmp_path, build("llama"), load_tokenizer(), RECORD, "chat")
    assert AutoTokenizer.from_pretrained(tmp_path)("你好")["input_ids"] == load_tokenizer()("你好")["input_ids"]


def test_a_base_model_s_folder_comes_back_with_our_tokenizer(tmp_path):
    """The step that writes the start token is not ours: caches of token ids stay valid, nothing begins twice."""
    write_transformers_folder(tmp_path, build("llama"), load_tokenizer(), BASE, "base")
    _, tokenizer, _ = load_model(tmp_path)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer())
    assert tokenizer("你好")["input_ids"] == load_tokenizer()("你好")["input_ids"]


def test_no_program_switches_thinking_on_by_itself(tmp_path):
    write_transformers_folder(tmp_path, build("llama"), load_tokenizer(), RECORD, "chat")
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer()
    plain = render(ours, ASK, add_generation_prompt=True)[0]
    told = {"add_generation_prompt": True, "return_dict": False}
    assert tokenizer.apply_chat_template(ASK, enable_thinking=True, **told) == plain
    for switch in (True, False):
        asked = tokenizer.apply_chat_template(ASK, open_thinking=switch, **told)
        assert asked == render(ours, ASK, add_generation_prompt=True, enable_thinking=switch)[0] != plain


def test_qwen3_moe_has_the_fields_of_qwen3(tmp_path):
    model = build("qwen3_moe")
    write_transformers_folder(tmp_path, model, load_tokenizer(), RECORD, "moe")
    assert config_of(tmp_path, "config.json")["max_window_layers"] == model.config.n_layers


# ------------------------------------------------------------------------------------- what transformers' class runs
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500000.0}  # fmt: skip
SMALL = {"vocab_size": 6400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 512}  # fmt: skip
GRANITE = {"attention_multiplier": 0.5, "num_local_experts": 2, "num_experts_per_tok": 1,
           "shared_intermediate_size": 48}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "config", "words"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3), "llama3"),
        (GraniteMoeSharedForCausalLM, GraniteMoeSharedConfig(**SMALL, **GRANITE), "attention_multiplier"),
    ],
)
def test_other_rotations_and_multipliers_are_run_by_transformers(network, config, words, tmp_path):
    torch.manual_seed(0)
    network(config).save_pretrained(tmp_path)
    save_tokenizer(load_tokenizer(), tmp_path)
    with pytest.raises(NoCounterpart, match=words):
        load_model(tmp_path)
    args = Namespace(preset=None, rope_scaling=None, tokenizer=None, device="cpu", dtype="float32")
    engine, _ = open_engine(args, tmp_path, foreign=True)
    assert type(engine.model) is network
    assert len(engine.generate([ASK], SamplingParams(max_tokens=3, temperature=0))[0].token_ids) == 3


# ---------------------------------------------------------------------------------------------- MiniMind's own format
V3 = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "qk_norm": True, "norm_eps": 1e-6}
V3_MOE = V3 | {"use_moe": True, "n_shared_experts": 0, "num_experts_per_tok": 1}
V2 = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2}
V2_MOE = V2 | {"use_moe": True}


def minimind_shapes(vocab=6400, d=64, layers=2, heads=8, kv=4, wide=256, norms=True, experts=0, shared=0) -> dict:
    """{name: shape} of a state dict of MiniMind 2 (no norms) or 3, as a strict loader wants it: all, and no other."""
    head, shapes = d // heads, {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d),
                                "model.norm.weight": (d,)}  # fmt: skip
    block = {"gate_proj": (wide, d), "up_proj": (wide, d), "down_proj": (d, wide)}
    for layer in (f"model.layers.{i}." for i in range(layers)):
        shapes |= {f"{layer}input_layernorm.weight": (d,), f"{layer}post_attention_layernorm.weight": (d,)}
        out = {"q_proj": (d, d), "k_proj": (kv * head, d), "v_proj": (kv * head, d), "o_proj": (d, d)}
        out |= {"q_norm": (head,), "k_norm": (head,)} if norms else {}
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in out.items()}
        blocks = [f"experts.{e}." for e in range(experts)] + [f"shared_experts.{e}." for e in range(shared)] or [""]
        shapes |= {f"{layer}mlp.{one}{name}.weight": shape for one in blocks for name, shape in block.items()}
        shapes |= {f"{layer}mlp.gate.weight": (experts, d)} if experts else {}
    return shapes


@pytest.mark.parametrize(
    ("ours", "theirs", "release"),
    [
        (V3 | {"hidden_dim": 256}, {}, "MiniMind 3"),
        (V3_MOE | {"moe_hidden_dim": 256}, {"experts": 4}, "MiniMind 3"),
        (V2 | {"hidden_dim": 192}, {"kv": 2, "wide": 192, "norms": False}, "MiniMind 2"),
        (V2_MOE | {"moe_hidden_dim": 192, "n_shared_experts": 2},
         {"kv": 2, "wide": 192, "norms": False, "experts": 4, "shared": 2}, "MiniMind 2"),
    ],
)  # fmt: skip
def test_minimind_s_strict_loader_finds_every_tensor(ours, theirs, release):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(**ours))
    state = minimind_state(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == minimind_shapes(**theirs)
    assert minimind_release(model.config) == release
    preset = {"MiniMind 3": "minimind3", "MiniMind 2": "minimind2-small"}[release]
    _, again = from_minimind(dict(state), preset)
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_what_minimind_s_scripts_have_no_flag_for_is_told():
    assert other_settings(LMConfig.from_preset("minimind3")) == {}
    assert other_settings(LMConfig.from_preset("minimind3-moe")) == {}
    assert other_settings(LMConfig.from_preset("minimind2-small")) == {}
    assert other_settings(LMConfig.from_preset("minimind2-moe")) == {}
    assert other_settings(LMConfig(**V3, hidden_dim=100, vocab_size=6404)) == {"vocab_size": 6404, "hidden_dim": 100}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_moe": True, "qk_norm": True}, "in no MiniMind"),
        ({"tie_word_embeddings": False}, "tied"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "stretched"),
    ],
)
def test_what_no_minimind_has_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        minimind_release(LMConfig(**(V2 | change)))


def test_a_minimind_file_from_the_program(here, capsys):  # noqa: F811
    result = export(
        capsys, "--format", "minimind", "--dtype", "f16", "--weight", "out/pretrain_64.pth", "--out", "m.pth"
    )
    assert result["architecture"] == "MiniMind 3" and result["files"] == ["m.pth"]
    state = torch.load("m.pth", weights_only=True)  # a bare state dict, in half precision as MiniMind's own
    assert all(type(tensor) is torch.Tensor and tensor.dtype == torch.float16 for tensor in state.values())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert result["bytes"] < 2.2 * build("qwen3").config.parameter_count()
    with pytest.raises(UserError, match="--format gguf"):
        export(capsys, "--format", "minimind", "--dtype", "q4_0")
