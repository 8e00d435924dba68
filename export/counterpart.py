"""Which class of transformers computes the same as a model of ours, its config, and our weights under its names.

    dense                                    LlamaForCausalLM
    dense, qk_norm                           Qwen3ForCausalLM
    experts with shared ones                 GraniteMoeSharedForCausalLM
    experts without shared ones, qk_norm     Qwen3MoeForCausalLM

Llama's and Qwen3's parameters have our names. Those of the experts are renamed and split. No number is changed.
Legend: E experts, I width of one, D width of the model.
"""

from torch import Tensor, cat

from model.convert import GRANITE_NAMES
from model.LMConfig import LMConfig

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def model_type(config: LMConfig) -> str:
    """transformers' name of the class that computes the same; ValueError, in a sentence, where there is none."""
    if not config.use_moe:
        return "qwen3" if config.qk_norm else "llama"
    if config.n_shared_experts and not config.qk_norm:
        if not config.norm_topk_prob:
            raise ValueError(
                "experts whose top-k weights are not normalised (norm_topk_prob False) beside shared experts have no "
                "counterpart in transformers: GraniteMoeShared always normalises them"
            )
        return "granitemoeshared"
    if config.qk_norm and not config.n_shared_experts:
        return "qwen3_moe"
    which = "shared experts and qk_norm" if config.qk_norm else "neither shared experts nor qk_norm"
    raise ValueError(
        f"a model with experts, {which} has no counterpart in transformers; with experts, what can be exported has "
        "shared experts without qk_norm (GraniteMoeShared) or qk_norm without shared experts (Qwen3Moe)"
    )


def transformers_config(config: LMConfig, dtype: str) -> dict:
    """The content of config.json. dtype: torch's name of the weights' type, such as "float32"."""
    kind = model_type(config)
    rope = {key: value for key, value in config.rope_parameters.items() if value is not None}
    fields = {
        "architectures": [CLASSES[kind]], "model_type": kind,
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len, "attention_bias": False, "attention_dropout": 0.0,
        "initializer_range": config.initializer_range, "use_cache": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
        # transformers 5 reads rope_parameters and dtype; transformers 4 and the servers built on it the other three.
        "rope_parameters": rope, "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else {k: rope[k] for k in rope if k != "rope_theta"},
        "dtype": dtype, "torch_dtype": dtype,
    }  # fmt: skip
    if kind == "llama":
        fields |= {"mlp_bias": False}
    elif kind == "qwen3":
        fields |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.n_layers}
    elif kind == "granitemoeshared":
        fields |= {
            "intermediate_size": config.moe_hidden_dim,
            "shared_intermediate_size": config.n_shared_experts * config.moe_hidden_dim,
            "num_local_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok,
            "num_experts": config.n_routed_experts,  # the name under which trl looks for it
            "router_aux_loss_coef": config.aux_loss_alpha, "output_router_logits": False,
            # Granite multiplies at four places; ours divides attention scores by sqrt(head width) and nothing else.
            "attention_multiplier": config.head_dim**-0.5,
            "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        }  # fmt: skip
    else:
        fields |= {
            "moe_intermediate_size": config.moe_hidden_dim, "num_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok, "norm_topk_prob": config.norm_topk_prob,
            "router_aux_loss_coef": config.aux_loss_alpha, "output_router_logits": False,
            "decoder_sparse_step": 1, "mlp_only_layers": [],  # experts in every layer
            "use_sliding_window": False, "sliding_window": None, "max_window_layers": config.n_layers,
        }  # fmt: skip
    return fields


def transformers_state(model) -> dict[str, Tensor]:
    """The model's weights under the names of its transformers class; a tied head is left out, as transformers does."""
    kind, state = model_type(model.config), dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if kind == "granitemoeshared":
        return _granite_state(state)
    if kind == "qwen3_moe":
        return split_experts(state)  # Qwen3Moe's files hold each expert's three matrices apart
    return state


def _granite_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Granite keeps the stacks of experts as ours, (E, 2I, D) and (E, D, I), and joins the shared gate and up."""
    out = {}
    for name, tensor in state.items():
        layer, found, which = name.partition("mlp.shared_experts.")
        if found and which == "gate_proj.weight":
            up = state[f"{layer}mlp.shared_experts.up_proj.weight"]
            out[f"{layer}shared_mlp.input_linear.weight"] = cat([tensor, up])
        elif which != "up_proj.weight":
            for ours, theirs in GRANITE_NAMES:
                name = name.replace(ours, theirs)
            out[name] = tensor
    return out


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stacked experts of each layer, (E, 2I, D) and (E, D, I), as three matrices for each expert."""
    out = {}
    for name, tensor in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for e, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):  # (I, D) each
                out[f"{prefix}{e}.gate_proj.weight"], out[f"{prefix}{e}.up_proj.weight"] = gate, up
        elif name.endswith("mlp.experts.down_proj"):
            for e, expert in enumerate(tensor):
                out[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = expert
        else:
            out[name] = tensor
    return out
