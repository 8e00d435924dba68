"""A model as a file of MiniMind's own programs: a bare state dict, which their strict loader takes as it is.

MiniMind 2 and 3 name the tensors as we do, but for the experts of a layer: each has three matrices of its own. The
file says nothing about the shape; their scripts take width, layers and experts as flags and the rest from the defaults
of their config class. Legend: E experts, I width of one, D width of the model.
"""

import math

from torch import Tensor

from export.counterpart import split_experts
from export.transformers_folder import cast
from model.LMConfig import LMConfig

# What MiniMind's config class assumes unless its code is changed; the width of a block follows from dim.
_COMMON = {"vocab_size": 6400, "n_heads": 8, "rope_theta": 1e6, "n_routed_experts": 4, "norm_topk_prob": True}
DEFAULTS = {
    "MiniMind 2": _COMMON | {"n_kv_heads": 2, "norm_eps": 1e-5, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "MiniMind 3": _COMMON | {"n_kv_heads": 4, "norm_eps": 1e-6, "num_experts_per_tok": 1, "tie_word_embeddings": True},
}
OF_EXPERTS = ("n_routed_experts", "norm_topk_prob", "num_experts_per_tok", "n_shared_experts")


def minimind_release(config: LMConfig) -> str:
    """ "MiniMind 2" or "MiniMind 3": whose class has these tensors. ValueError, in a sentence, where neither has."""
    shared = config.use_moe and config.n_shared_experts > 0
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError("MiniMind's files have no place for stretched positions (rope_parameters)")
    if config.qk_norm and not shared:
        return "MiniMind 3"
    if config.qk_norm:
        raise ValueError("experts with shared ones and qk_norm are in no MiniMind: 2 has no qk_norm, 3 no shared ones")
    if config.head_dim * config.n_heads != config.dim or not config.tie_word_embeddings:
        raise ValueError("MiniMind without qk_norm has tied embeddings and heads of width dim / n_heads only")
    return "MiniMind 2"


def other_settings(config: LMConfig) -> dict:
    """The fields in which the model differs from its MiniMind's defaults, and for which no script there has a flag."""
    release = minimind_release(config)
    # The width of a block: MiniMind 3 takes pi times dim, 2 takes 8/3 of it; both round up to a multiple of 64.
    wide = config.dim * math.pi if release == "MiniMind 3" else int(config.dim * 8 / 3)
    width = 64 * math.ceil(wide / 64)
    wide_name = "moe_hidden_dim" if config.use_moe else "hidden_dim"
    wanted = DEFAULTS[release] | {wide_name: width, "head_dim": config.dim // config.n_heads}
    if not config.use_moe:
        wanted = {key: value for key, value in wanted.items() if key not in OF_EXPERTS}
    return {key: getattr(config, key) for key, value in wanted.items() if getattr(config, key) != value}


def minimind_state(model, dtype: str = "float32") -> dict[str, Tensor]:
    """The model's tensors under MiniMind's names; a tied head is there under both its names, as in its releases."""
    minimind_release(model.config)
    state = split_experts(model.state_dict())
    for name in [name for name in state if ".mlp.shared_experts." in name]:
        joined, n = state.pop(name), model.config.n_shared_experts
        prefix, _, which = name.partition("shared_experts.")
        axis = 1 if which.startswith("down") else 0  # gate and up: (n I, D), down: (D, n I)
        for e, part in enumerate(joined.chunk(n, dim=axis)):
            state[f"{prefix}shared_experts.{e}.{which}"] = part
    state = {name: cast(tensor, dtype, name) for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # the file then holds the numbers once
    return state
