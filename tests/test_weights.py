"""Weights files: what is written comes back; MiniMind's and transformers' weights give their own model's logits; what
cannot be read is refused in a sentence and nothing is lost."""

import contextlib
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model.convert import from_minimind
from model.LMConfig import PRESETS, LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import load_model, save_weights
from model.weights_file import newest_weights, read_header

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 200}


def small(**fields):
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(**(SMALL | {"initializer_range": 0.2} | fields))).eval()


def ids(*shape):
    return torch.randint(3, 200, shape, generator=torch.Generator().manual_seed(1))


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ------------------------------------------------------------------------------------------------------------ our files
@pytest.mark.parametrize("fields", [{}, {"use_moe": True, "n_shared_experts": 2}, {"tie_word_embeddings": False}, {
    "qk_norm": True, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
}])  # fmt: skip
def test_what_is_saved_comes_back_to_the_bit(fields, tmp_path):
    model, record = small(**fields), {"stage": "pretrain", "tokens": 12, "losses": [3.5, 2.25], "parent": None}
    path = tmp_path / "deep" / "pretrain_64.pth"
    save_weights(path, model, load_tokenizer(), record)
    twin, tokenizer, found = load_model(path)
    assert found == record and twin.config.fields() == model.config.fields()
    wanted = model.state_dict()
    assert list(twin.state_dict()) == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in twin.state_dict().items())
    assert tokenizer.get_vocab() == load_tokenizer().get_vocab()
    assert tokenizer.chat_template == load_tokenizer().chat_template
    assert not twin.training and all(p.requires_grad and p.dtype == torch.float32 for p in twin.parameters())
    tied = twin.lm_head.weight is twin.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert torch.load(path, weights_only=True)["format"]  # plain containers and tensors: loading runs no code
    assert os.listdir(path.parent) == [path.name]

    header = read_header(path)
    assert header["record"] == record and LMConfig(**header["config"]).fields() == model.config.fields()
    assert "model" not in header and header["tokenizer"]


def test_without_a_tokenizer_there_is_none(tmp_path):
    save_weights(tmp_path / "a.pth", small(), None, {})
    assert load_model(tmp_path / "a.pth")[1] is None


@contextlib.contextmanager
def disk_with_room_for(size):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # beyond it a write fails, as on a full disk
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "pretrain_64.pth"
    save_weights(path, small(), None, {"step": 1})
    before = path.read_bytes()
    with disk_with_room_for(len(before) // 2), pytest.raises((OSError, RuntimeError)):
        save_weights(path, small(dim=128), None, {"step": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_weights(path, small(), None, {"step": lambda: 2})  # cannot be written at all
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def spoilt(tmp_path, how):
    """A file that cannot be loaded, made from a good one."""
    path = tmp_path / f"{how}.pth"
    if how == "missing":
        return path
    save_weights(path, small(), None, {})
    content = torch.load(path, weights_only=True)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(b"no weights here\n" * 100)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "code":
        torch.save({"format": content["format"], "record": Malicious(tmp_path / "run")}, path)
    elif how == "no tensors":
        torch.save({"a": 1}, path)
    elif how == "foreign":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    else:
        state, config = content["model"], content["config"]
        if how == "shape":
            state["model.norm.weight"] = torch.ones(7)
        elif how == "lacking":
            del state["model.layers.1.mlp.up_proj.weight"]
        elif how == "surplus":
            state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
        elif how == "config":
            config["n_heads"] = 5
        elif how == "newer":
            config["sparse"] = True
        torch.save(content, path)
    return path


@pytest.mark.parametrize("how, sentence", [
    ("missing", "no weights at"),
    ("empty", "cannot be read as weights"),
    ("garbage", "cannot be read as weights"),
    ("truncated", "cannot be read as weights"),
    ("code", "cannot be read as weights"),
    ("no tensors", "holds no state dict"),
    ("foreign", "no MiniMind weights: no embedding among conv.weight"),
    ("shape", r"does not fit .* model.norm.weight is \(7,\), the model needs \(64,\)"),
    ("lacking", "model.layers.1.mlp.up_proj.weight is missing"),
    ("surplus", "model.layers.2.mlp.up_proj.weight is not part of the model"),
    ("config", "5 query heads cannot share 2 key/value heads"),
    ("newer", "no field sparse"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_refused_in_one_sentence(how, sentence, tmp_path):
    path = spoilt(tmp_path, how)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_header_of_another_file_is_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="not one of our weights files"):
        read_header(tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        read_header(spoilt(tmp_path, "garbage"))


def test_newest_weights(tmp_path):
    assert newest_weights(tmp_path) is None and newest_weights(tmp_path / "nowhere") is None
    ages = ["pretrain_512.pth", "single_chat/full_sft_512.pth", "dpo_512_moe.pth", "pretrain_512_resume.pth",
            "lora/identity_512.pth", ".dpo_512.pth.7.tmp", ".hidden_512.pth", "a/b/deep_512.pth"]  # fmt: skip
    for age, name in enumerate(ages):  # each newer than the one before
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    assert newest_weights(tmp_path) == tmp_path / "dpo_512_moe.pth"
    assert newest_weights(tmp_path, want="pretrain") == tmp_path / "pretrain_512.pth"
    assert newest_weights(tmp_path, unwanted="dpo") == tmp_path / "single_chat/full_sft_512.pth"
    assert newest_weights(tmp_path, want="full_sft") == tmp_path / "single_chat/full_sft_512.pth"
    assert newest_weights(tmp_path, want="grpo") is None


# ------------------------------------------------------------------------------------------- MiniMind's own releases
# What each version computes, written from its description with its own names, without any class of this project.
NAMES = {  # ours -> v1's
    "embed": ("model.embed_tokens", "tok_embeddings"), "norm": ("model.norm", "norm"),
    "q": ("self_attn.q_proj", "attention.wq"), "k": ("self_attn.k_proj", "attention.wk"),
    "v": ("self_attn.v_proj", "attention.wv"), "o": ("self_attn.o_proj", "attention.wo"),
    "before_attention": ("input_layernorm", "attention_norm"), "before_ffn": ("post_attention_layernorm", "ffn_norm"),
    "ffn": ("mlp", "feed_forward"), "gate": ("gate_proj", "w1"), "down": ("down_proj", "w2"), "up": ("up_proj", "w3"),
}  # fmt: skip


def release(version, fields):
    """A random state dict of this version of MiniMind, as it was saved, tables included."""
    generator = torch.Generator().manual_seed(3)
    names = {key: pair[version == 1] for key, pair in NAMES.items()}
    config = LMConfig(**fields)
    dim, heads, kv_heads, h = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
    prefix = "layers" if version == 1 else "model.layers"
    shapes = {names["embed"]: (config.vocab_size, dim), names["norm"]: (dim,)}
    for i in range(config.n_layers):
        layer = f"{prefix}.{i}."
        shapes |= {layer + names["q"]: (heads * h, dim), layer + names["k"]: (kv_heads * h, dim),
                   layer + names["v"]: (kv_heads * h, dim), layer + names["o"]: (dim, heads * h),
                   layer + names["before_attention"]: (dim,), layer + names["before_ffn"]: (dim,)}  # fmt: skip
        if version == 3:
            shapes |= {f"{layer}self_attn.q_norm": (h,), f"{layer}self_attn.k_norm": (h,)}
        ffn, width = layer + names["ffn"], config.moe_hidden_dim if config.use_moe else config.hidden_dim
        blocks = [ffn]
        if config.use_moe:
            shapes[f"{ffn}.gate"] = (config.n_routed_experts, dim)
            blocks = [f"{ffn}.experts.{e}" for e in range(config.n_routed_experts)]
            blocks += {1: [f"{ffn}.shared_experts"], 2: [f"{ffn}.shared_experts.0"], 3: []}[version]
        for block in blocks:
            shapes |= {f"{block}.{names['gate']}": (width, dim), f"{block}.{names['up']}": (width, dim),
                       f"{block}.{names['down']}": (dim, width)}  # fmt: skip
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        state[f"{name}.weight"] = 1 + 0.3 * noise if len(shape) == 1 else 2 / shape[-1] ** 0.5 * noise
    state["output.weight" if version == 1 else "lm_head.weight"] = state[f"{names['embed']}.weight"]
    state["pos_cis" if version == 1 else "model.freqs_cos"] = torch.randn(32, h // 2)
    return {name: tensor.half() for name, tensor in state.items()}


def released_logits(version, state, fields, x):
    """The forward pass of MiniMind v1, v2 or v3 (fp32) for one row of ids."""
    config, state = LMConfig(**fields), {name: tensor.float() for name, tensor in state.items()}
    names = {key: pair[version == 1] for key, pair in NAMES.items()}
    prefix = "layers" if version == 1 else "model.layers"
    T, h, eps = x.shape[1], config.head_dim, config.norm_eps

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T

    def feed_forward(x, block):
        return linear(F.silu(linear(x, f"{block}.{names['gate']}")) * linear(x, f"{block}.{names['up']}"),
                      f"{block}.{names['down']}")  # fmt: skip

    angle = torch.outer(torch.arange(T).float(), config.rope_theta ** -(torch.arange(0, h, 2).float() / h))  # (T, h/2)

    def rotate(x):  # (T, heads, h)
        if version == 1:  # neighbours are the two parts of a complex number
            pairs = torch.view_as_complex(x.reshape(T, -1, h // 2, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)
        turned = torch.cat((-x[..., h // 2 :], x[..., : h // 2]), dim=-1)
        both = torch.cat((angle, angle), dim=-1)[:, None]
        return x * both.cos() + turned * both.sin()

    def mixture(x, ffn):
        scores = linear(x, f"{ffn}.gate").softmax(-1)
        out = []
        for token, score in zip(x, scores):
            best = score.topk(config.num_experts_per_tok)
            weights = best.values / (best.values.sum() + 1e-20)
            out.append(sum(w * feed_forward(token, f"{ffn}.experts.{e}") for w, e in zip(weights, best.indices)))
        out = torch.stack(out)
        shared = {1: f"{ffn}.shared_experts", 2: f"{ffn}.shared_experts.0"}.get(version)
        return out if shared is None else out + feed_forward(x, shared)

    hidden = state[f"{names['embed']}.weight"][x[0]]  # (T, dim)
    for i in range(config.n_layers):
        layer = f"{prefix}.{i}."
        y = norm(hidden, layer + names["before_attention"])
        q, k, v = (linear(y, layer + names[key]).view(T, -1, h) for key in "qkv")
        if version == 3:
            q, k = norm(q, f"{layer}self_attn.q_norm"), norm(k, f"{layer}self_attn.k_norm")
        repeats = config.n_heads // config.n_kv_heads
        q, k, v = rotate(q), rotate(k).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / h**0.5 + torch.full((T, T), float("-inf")).triu(1)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(T, -1)
        hidden = hidden + linear(attended, layer + names["o"])
        y = norm(hidden, layer + names["before_ffn"])
        hidden = hidden + (mixture if config.use_moe else feed_forward)(y, layer + names["ffn"])
    return norm(hidden, names["norm"]) @ state[f"{names['embed']}.weight"].T


RELEASES = {  # small, but with each version's heads, rotation, norm and experts
    "v1": (1, {"n_heads": 4, "n_kv_heads": 2, "rope_theta": 1e4}),
    "v1-moe": (1, {"n_heads": 4, "n_kv_heads": 2, "rope_theta": 1e4, "use_moe": True, "moe_hidden_dim": 40}),
    "v2": (2, {"n_heads": 4, "n_kv_heads": 1}),
    "v2-moe": (2, {"n_heads": 4, "n_kv_heads": 1, "use_moe": True, "moe_hidden_dim": 40}),
    "v3": (3, {"n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "qk_norm": True}),
    "v3-moe": (3, {"n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "qk_norm": True, "use_moe": True,
                   "moe_hidden_dim": 40, "num_experts_per_tok": 1, "n_shared_experts": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASES)
@torch.no_grad()
def test_minimind_weights_give_minimind_logits(name, tmp_path, monkeypatch):
    version, fields = RELEASES[name]
    fields = {"dim": 64, "n_layers": 2, "hidden_dim": 96, "vocab_size": 200} | fields
    monkeypatch.setitem(PRESETS, "small", fields)  # so that the shape is recognised as a release's is
    state = release(version, fields)
    torch.save(state, tmp_path / "bare.pth")
    model, tokenizer, record = load_model(tmp_path / "bare.pth")
    assert tokenizer is None and record == {} and model.config.fields() == LMConfig(**fields).fields()
    x = ids(1, 15)
    wanted = released_logits(version, state, fields, x)
    assert difference(model(x).logits[0], wanted) < 1e-5

    wrapped = {"model": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}, "step": 3}
    torch.save(wrapped, tmp_path / "resume.pth")  # as DDP, torch.compile and a resume file leave it
    assert torch.equal(load_model(tmp_path / "resume.pth")[0](x).logits, model(x).logits)
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "bare.safetensors")
    assert torch.equal(load_model(tmp_path / "bare.safetensors")[0](x).logits, model(x).logits)


def test_a_shape_of_ones_own_takes_the_heads_of_the_preset_named(tmp_path):
    fields = {"dim": 64, "n_layers": 3, "hidden_dim": 80, "vocab_size": 200, "n_heads": 8, "n_kv_heads": 2}
    state = release(2, fields)
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(ValueError, match="own.pth: no preset has the shape .*'dim': 64.*--preset"):
        load_model(tmp_path / "own.pth")
    model = load_model(tmp_path / "own.pth", preset="minimind2-small")[0]
    assert difference(model(ids(1, 9)).logits[0], released_logits(2, state, fields, ids(1, 9))) < 1e-5
    with pytest.raises(ValueError, match="have not the heads of minimind3"):
        load_model(tmp_path / "own.pth", preset="minimind3")
    with pytest.raises(ValueError, match="no preset 'minimind4'"):
        load_model(tmp_path / "own.pth", preset="minimind4")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_every_release_is_recognised_by_its_shapes(name):
    with torch.device("meta"):
        model = MiniMindForCausalLM(LMConfig.from_preset(name))
    assert from_minimind(model.state_dict())[0].fields() == LMConfig.from_preset(name).fields()


@pytest.mark.parametrize("damage", ["mlp.experts.2.up_proj", "mlp.shared_experts.0.up_proj", "self_attn.k_proj"])
def test_a_state_dict_with_holes_is_refused(damage, tmp_path):
    fields = SMALL | {"use_moe": True}
    state = {name: tensor for name, tensor in release(2, fields).items() if f"layers.0.{damage}" not in name}
    torch.save(state, tmp_path / "holes.pth")
    with pytest.raises(ValueError, match="holes.pth: "):
        load_model(tmp_path / "holes.pth", preset="minimind2-moe")


# ------------------------------------------------------------------------------------------- transformers' folders
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 96, "vocab_size": 200, "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
FOLDERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON, **THETA, tie_word_embeddings=True)),
    "llama untied": (LlamaForCausalLM, LlamaConfig(**COMMON, head_dim=32)),
    "llama yarn": (LlamaForCausalLM, LlamaConfig(**COMMON, rope_parameters=YARN)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON, **THETA, head_dim=16)),
    "qwen3 moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, **THETA, num_experts=6, num_experts_per_tok=2,
                  moe_intermediate_size=40, norm_topk_prob=True, head_dim=16)),
    "qwen3 moe plain": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=1,
                        moe_intermediate_size=40, head_dim=16)),
    "granite": (GraniteMoeSharedForCausalLM, GraniteMoeSharedConfig(**COMMON, attention_multiplier=0.25,
                num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=2 * 96, tie_word_embeddings=True)),
    "granite no shared": (GraniteMoeSharedForCausalLM, GraniteMoeSharedConfig(**COMMON, attention_multiplier=0.25,
                          num_local_experts=4, num_experts_per_tok=3)),
}  # fmt: skip


def saved_folder(name, folder, **saving):
    kind, config = FOLDERS[name]
    torch.manual_seed(0)
    other = kind(config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.15, mean=float(parameter.dim() == 1))
    other.save_pretrained(folder, **saving)
    return other


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_transformers_folders_load_with_equal_logits(name, tmp_path):
    other = saved_folder(name, tmp_path / "theirs", max_shard_size="100KB")  # in several files
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, tokenizer, record = load_model(tmp_path / "theirs")
    assert tokenizer is None and record == {}
    assert difference(model(ids(2, 50)).logits, other(ids(2, 50)).logits) < 2e-5
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_model(tmp_path / "ours")[0](ids(2, 9)).logits, model(ids(2, 9)).logits)


@torch.no_grad()
def test_transformers_4_folders_load_too(tmp_path):
    """Rotary parameters at the top level, weights in pytorch_model.bin."""
    other = saved_folder("llama yarn", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    file.write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    assert difference(load_model(tmp_path)[0](ids(2, 50)).logits, other(ids(2, 50)).logits) < 1e-5


@pytest.mark.parametrize("name, change, sentence", [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' has no counterpart here, only with 'silu'"),
    ("llama", {"attention_bias": True}, "attention_bias True has no counterpart"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "not 'llama3'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen3 moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
    ("granite", {"attention_multiplier": 1.0}, "attention_multiplier must be"),
    ("granite", {"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
    ("llama", {"model_type": "gpt_neox"}, "type 'gpt_neox' has no counterpart here"),
    ("llama", {"num_hidden_layers": 3}, "model.layers.2.* is missing"),
])  # fmt: skip
def test_a_folder_that_would_compute_something_else_is_refused(name, change, sentence, tmp_path):
    saved_folder(name, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=sentence) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'gpt2' has no counterpart here"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="model.safetensors cannot be read as weights"):
        load_model(tmp_path)
