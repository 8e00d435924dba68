"""Converts state dicts of other programs into ours: MiniMind v1, v2, v3 and transformers' classes.

Tensors are renamed and reshaped; no number changes. Our names are Llama's, the experts of a layer are stacked into two
tensors, and its shared experts are one block.
"""

import math
import re

import torch
from torch import Tensor

from model.LMConfig import PRESETS, ROPE_KEYS, LMConfig

_DROPPED = ("pos_cis", "freqs_cos", "freqs_sin", "mask", "rotary_emb.inv_freq")  # tables, recomputed here
_V1_NAMES = [
    ("tok_embeddings.", "model.embed_tokens."), ("output.", "lm_head."), ("attention.wq", "self_attn.q_proj"),
    ("attention.wk", "self_attn.k_proj"), ("attention.wv", "self_attn.v_proj"), ("attention.wo", "self_attn.o_proj"),
    ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"), ("feed_forward.", "mlp."),
    (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
]  # fmt: skip
# Ours and GraniteMoeShared's. Its gate and up of the shared experts are one tensor, `shared_mlp.input_linear.weight`.
GRANITE_NAMES = [
    ("mlp.gate.weight", "block_sparse_moe.router.layer.weight"),
    ("mlp.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
    ("mlp.experts.down_proj", "block_sparse_moe.output_linear.weight"),
    ("mlp.shared_experts.down_proj.weight", "shared_mlp.output_linear.weight"),
]
_ONLY = {  # settings of transformers' classes that change what is computed, and the one value known here
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "partial_rotary_factor": 1, "decoder_sparse_step": 1, "mlp_only_layers": [], "embedding_multiplier": 1,
    "logits_scaling": 1, "residual_multiplier": 1,
}  # fmt: skip


def state_dict_of(content, path) -> dict[str, Tensor]:
    """The tensors of a loaded file by name, without wrappers' prefixes and tables; ValueError if it has none."""
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # a resume file: {"model": ..., ...}
        content = content["model"]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict")
    state = {}
    for name, tensor in content.items():
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)
        if isinstance(tensor, Tensor) and not name.endswith(_DROPPED):
            state[name] = tensor
    return state


def from_minimind(state: dict[str, Tensor], preset: str | None = None) -> tuple[LMConfig, dict[str, Tensor]]:
    """A bare MiniMind state dict of any version -> (config, our state dict).

    The shapes of tensors do not tell the number of heads. So they must be the shapes of a preset, or `preset` names one
    with the same heads and rotation; width, layers and experts are then taken from the tensors.
    """
    interleaved = "tok_embeddings.weight" in state  # MiniMind v1: other names, and it rotates neighbouring numbers
    if interleaved:
        state = {_v1_name(name): tensor for name, tensor in state.items()}
    if "model.embed_tokens.weight" not in state:
        raise ValueError(f"these are no MiniMind weights: no embedding among {', '.join(list(state)[:3])}, ...")
    state = stack_experts(state)  # before the shapes are read, which are those of stacked experts
    try:
        shape, kv_width = _seen_shape(state)
    except KeyError as missing:
        raise ValueError(f"these are no whole MiniMind weights: {missing.args[0]} is missing") from None
    config = _config_of(shape, kv_width, preset)
    if interleaved:
        for name in state:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                state[name] = interleaved_to_halves(state[name], config.head_dim)
    return config, state


def _config_of(shape: dict, kv_width: int, preset: str | None) -> LMConfig:
    """The preset of this shape, or this shape with the heads of the preset that is named."""
    if preset is not None:
        config = LMConfig.from_preset(preset, **shape)
        if config.n_kv_heads * config.head_dim != kv_width:
            raise ValueError(f"weights of {shape} with keys of width {kv_width} have not the heads of {preset}")
        return config
    for name in PRESETS:  # the first preset with these shapes; the vocabulary may have another size
        config = LMConfig.from_preset(name, vocab_size=shape["vocab_size"])
        same = all(getattr(config, field) == value for field, value in shape.items())
        if same and config.n_kv_heads * config.head_dim == kv_width:
            return config
    raise ValueError(f"no preset has the shape {shape}; name one with the same number of heads by --preset")


class NoCounterpart(ValueError):
    """A transformers model that computes something else than ours."""


def from_transformers(raw: dict, state: dict[str, Tensor]) -> tuple[LMConfig, dict[str, Tensor]]:
    """config.json and state dict of a transformers folder -> (config, our state dict).

    Llama, Qwen3, Qwen3Moe, GraniteMoeShared and MiniMind's own class are known; NoCounterpart names any other.
    """
    kind = raw.get("model_type")
    if kind not in ("minimind", "llama", "qwen3", "qwen3_moe", "granitemoeshared"):
        raise NoCounterpart(f"a transformers model of type {kind!r} has no counterpart here")
    for key, value in _ONLY.items():
        if raw.get(key) is not None and raw[key] != value:
            raise NoCounterpart(f"a model with {key} {raw[key]!r} has no counterpart here, only with {value!r}")
    # A field that config.json leaves out has the default of transformers' class, which may differ from ours.
    fields = {key: value for key, value in raw.items() if value is not None}
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if rope:
        rope.setdefault("rope_type", rope.pop("type", "default"))
        if rope["rope_type"] not in ROPE_KEYS:
            raise NoCounterpart(f"rope_type must be {', '.join(ROPE_KEYS)}, not {rope['rope_type']!r}")
        rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
        fields["rope_parameters"] = rope
    elif kind != "minimind":
        fields.setdefault("rope_theta", 10000.0)
    fields["qk_norm"] = any(name.endswith("q_norm.weight") for name in state)
    fields.setdefault("tie_word_embeddings", kind == "minimind")
    # The kinds with experts name and count them in their own ways.
    if kind in ("qwen3_moe", "granitemoeshared"):
        fields["use_moe"] = True
    if kind == "qwen3_moe":
        fields.setdefault("num_experts_per_tok", 8)
        fields["norm_topk_prob"] = bool(raw.get("norm_topk_prob", False))
        fields["n_shared_experts"] = 0
    if kind == "granitemoeshared":
        # Granite has free factors, which the export sets so that it computes what our model does.
        width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        if not math.isclose(raw.get("attention_multiplier", 1), width**-0.5, rel_tol=1e-6):
            raise NoCounterpart(f"attention_multiplier must be {width}**-0.5, as everywhere but in Granite")
        fields["moe_hidden_dim"] = raw["intermediate_size"]
        fields["n_shared_experts"] = raw.get("shared_intermediate_size", 0) // raw["intermediate_size"]
        state = _from_granite(state)
    if kind == "minimind" and fields.get("use_moe") and "n_shared_experts" not in fields:
        fields["n_shared_experts"] = int(any(".shared_experts." in name for name in state))
    state = stack_experts(state)
    # config.json has many other keys, such as token ids and versions, that do not change what is computed.
    known = {k: v for k, v in fields.items() if k in LMConfig.__annotations__ or k in LMConfig.attribute_map}
    return LMConfig(**known), state


def stack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mlp.experts.E.{gate,up,down}_proj.weight -> mlp.experts.{gate_up_proj, down_proj}; shared experts joined."""
    out, experts, shared = {}, {}, {}
    for name, tensor in state.items():
        routed = re.fullmatch(r"(.+\.mlp\.)experts\.(\d+)\.(gate|up|down)_proj\.weight", name)
        one_shared = re.fullmatch(r"(.+\.mlp\.)shared_experts\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if routed:
            experts.setdefault(routed[1], {})[int(routed[2]), routed[3]] = tensor
        elif one_shared:
            shared.setdefault(one_shared[1], {})[int(one_shared[2]), one_shared[3]] = tensor
        else:
            out[name] = tensor
    # gate above up: one product computes both, see moe.Experts.
    for prefix, parts in experts.items():
        n = _whole(parts, f"{prefix}experts")
        gate_up = [torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in range(n)]
        out[f"{prefix}experts.gate_up_proj"] = torch.stack(gate_up)  # (E, 2I, D)
        out[f"{prefix}experts.down_proj"] = torch.stack([parts[e, "down"] for e in range(n)])  # (E, D, I)
    # n shared experts side by side are one block n times as wide: rows of gate and up, columns of down.
    for prefix, parts in shared.items():
        n = _whole(parts, f"{prefix}shared_experts")
        for which, axis in (("gate", 0), ("up", 0), ("down", 1)):
            joined = torch.cat([parts[e, which] for e in range(n)], dim=axis)
            out[f"{prefix}shared_experts.{which}_proj.weight"] = joined
    return out


def _whole(parts: dict, name: str) -> int:
    """The number of experts, each of which must have its three matrices."""
    n = 1 + max(index for index, _ in parts)
    if len(parts) != 3 * n:
        raise ValueError(f"{name}: {len(parts)} matrices are no {n} experts of three")
    return n


def interleaved_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of a q or k projection from pairs (0,1), (2,3), ... to pairs (0, h/2), (1, h/2+1), ...

    MiniMind v1 rotates neighbouring numbers as a pair, transformers' Llama numbers half a head apart. The pairs and
    their angles are the same, only their places in the head differ. q and k are reordered alike, so their dot product
    stays the same.
    """
    rows = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, pair, which of the pair, D)
    return rows.transpose(1, 2).reshape(weight.shape)


def _v1_name(name: str) -> str:
    for old, new in _V1_NAMES:
        name = name.replace(old, new)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _from_granite(state):
    """GraniteMoeShared's tensors under our names; its joined gate and up of the shared experts split again."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in GRANITE_NAMES:
            name = name.replace(theirs, ours)
        layer, found, _ = name.partition("shared_mlp.input_linear.weight")
        if found:
            gate, up = (half.clone() for half in tensor.chunk(2))  # two tensors, not two views of one
            out[f"{layer}mlp.shared_experts.gate_proj.weight"] = gate
            out[f"{layer}mlp.shared_experts.up_proj.weight"] = up
        else:
            out[name] = tensor
    return out


def _seen_shape(state) -> tuple[dict, int]:
    """-> (the fields of LMConfig that follow from the tensors' shapes, the width of all key heads together)."""
    numbers = [int(match[1]) for name in state if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    vocab_size, dim = state["model.embed_tokens.weight"].shape
    first = "model.layers.0."
    shape = {"dim": dim, "n_layers": 1 + max(numbers, default=0), "vocab_size": vocab_size,
             "qk_norm": f"{first}self_attn.q_norm.weight" in state,
             "use_moe": f"{first}mlp.experts.down_proj" in state}  # fmt: skip
    if shape["use_moe"]:
        n_experts, _, hidden = state[f"{first}mlp.experts.down_proj"].shape
        shared = state.get(f"{first}mlp.shared_experts.down_proj.weight")
        shape |= {"n_routed_experts": n_experts, "moe_hidden_dim": hidden,
                  "n_shared_experts": 0 if shared is None else shared.shape[1] // hidden}  # fmt: skip
    else:
        shape["hidden_dim"] = state[f"{first}mlp.gate_proj.weight"].shape[0]
    return shape, state[f"{first}self_attn.k_proj.weight"].shape[0]
