"""A model as one GGUF file, the format of llama.cpp and of all that is built on it (Ollama, LM Studio, ...).

The file names an architecture that llama.cpp already has, so it needs no code of ours:

    ours                                     llama.cpp
    dense                                    llama
    dense, qk_norm                           qwen3
    experts with shared ones                 granitemoe
    experts without shared ones, qk_norm     qwen3moe

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Legend: H heads, h width of a head, D width of the
model, E experts, I width of one.
"""

import torch

from export.counterpart import model_type
from export.tokenizer_files import exported_template
from export.transformers_folder import cast
from model.LMConfig import LMConfig
from model.tokenizer_files import backend_json
from model.vocabulary import SPLIT_PATTERN

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "granitemoeshared": "granitemoe", "qwen3_moe": "qwen3moe"}
STORED = ("float32", "float16", "bfloat16", "q8_0", "q4_0")
BLOCK = 32  # q8_0 and q4_0 keep 32 numbers of a row as 8 or 4 bits each, with one common scale


def write_gguf(path, model, tokenizer, name: str, dtype: str = "float32", base: bool = False) -> str:
    """Writes the file and returns the name of its architecture. dtype: of the matrices, one of STORED.

    base: a model that continues text: prompts begin with the start token, and no chat template says that it chats.
    Raises ValueError where llama.cpp has no such model or no such way to cut text, or `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("writing GGUF needs a package: pip install -r requirements-export.txt") from None
    config = model.config
    architecture = ARCHITECTURES[model_type(config)]
    splitter = splitter_name(tokenizer)
    scaling = rope_scaling(config)
    if config.use_moe and not config.norm_topk_prob:
        raise ValueError("llama.cpp always normalises the weights of a token's experts; this model does not")
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_name(name)
        write_shape(writer, config, scaling)
        write_vocabulary(writer, config, tokenizer, splitter, base)
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}[dtype]
        writer.add_file_type(gguf.LlamaFileType[f"ALL_{kind}" if kind == "F32" else f"MOSTLY_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor_name, tensor in gguf_tensors(model):
            stored = gguf.GGMLQuantizationType[storage(tensor_name, tensor, kind)]
            cast(tensor, "float16" if stored.name == "F16" else "float32", tensor_name)  # refuses what overflows
            data = gguf.quants.quantize(tensor.float().numpy(), stored)
            writer.add_tensor(tensor_name, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return architecture


# ----------------------------------------------------------------------------------------------------------- numbers
def write_shape(writer, config: LMConfig, scaling: tuple | None) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if scaling is not None:
        import gguf

        kind, factor, trained = scaling
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(trained)
    writer.add_feed_forward_length(config.moe_hidden_dim if config.use_moe else config.hidden_dim)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if config.n_shared_experts:  # Granite, with its four multipliers; see export/counterpart.py
            writer.add_expert_shared_feed_forward_length(config.n_shared_experts * config.moe_hidden_dim)
            writer.add_attention_scale(config.head_dim**-0.5)
            writer.add_embedding_scale(1.0)
            writer.add_residual_scale(1.0)
            writer.add_logit_scale(1.0)
        else:
            writer.add_expert_feed_forward_length(config.moe_hidden_dim)


def rope_scaling(config: LMConfig) -> tuple[str, float, int] | None:
    """(kind, factor, trained length) of positions stretched for longer texts, None where they are not."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    changed = [key for key in ("attention_factor", "beta_fast", "beta_slow") if rope.get(key) is not None]
    if changed:
        raise ValueError(f"llama.cpp's {rope['rope_type']} has no {changed[0]}; leave it out of rope_parameters")
    return rope["rope_type"], rope["factor"], rope.get("original_max_position_embeddings") or config.max_seq_len


def gguf_tensors(model):
    """Yields (GGUF's name, tensor) of all weights; a tied head is left out."""
    import gguf

    config, state = model.config, dict(model.state_dict())
    kind = model_type(config)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind])
    names = gguf.get_tensor_name_map(architecture, config.n_layers)  # it knows the names of transformers' classes
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, tensor in state.items():
        parts = {name.removesuffix(".weight"): tensor}
        if name.endswith("experts.gate_up_proj"):  # (E, 2I, D)
            layer, (gate, up) = name.removesuffix("gate_up_proj"), tensor.chunk(2, dim=1)
            parts = {f"{layer}gate_proj": gate.contiguous(), f"{layer}up_proj": up.contiguous()}
        elif kind in ("llama", "granitemoeshared") and name.endswith(("q_proj.weight", "k_proj.weight")):
            parts = {name.removesuffix(".weight"): halves_to_interleaved(tensor, config.head_dim)}
        for ours, part in parts.items():
            yield f"{names.get_name(ours)}.weight", part


def halves_to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders the rows of a q or k projection from pairs (0, h/2), (1, h/2+1), ... to pairs (0, 1), (2, 3), ...

    In these architectures llama.cpp rotates neighbours. The inverse of model.convert.interleaved_to_halves.
    """
    rows = weight.view(-1, 2, head_dim // 2, weight.shape[1])  # (heads, which of the pair, pair, D)
    return rows.transpose(1, 2).reshape(weight.shape)


def storage(name: str, tensor: torch.Tensor, kind: str) -> str:
    """GGML's type for one tensor: vectors and the router stay exact, as in llama.cpp's own converter."""
    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        return "F32"
    if kind.startswith("Q") and tensor.shape[-1] % BLOCK:
        return "F16"
    if kind == "Q4_0" and name in ("token_embd.weight", "output.weight"):
        return "Q8_0"  # the logits are computed with it; in four bits it costs more than all the rest
    return kind


# ------------------------------------------------------------------------------------------------------------- words
def splitter_name(tokenizer) -> str:
    """llama.cpp's name of the way this tokenizer cuts text before merging; ValueError if it has none."""
    content = backend_json(tokenizer)
    if content["model"]["type"] != "BPE" or content["normalizer"] is not None:
        raise ValueError("only byte-level BPE without a normalizer can be written as GGUF")
    cut = content["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers", [cut])
    plain = all(not step.get("add_prefix_space") for step in steps)
    types = [step.get("type") for step in steps]
    if plain and types == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        if steps[0]["pattern"] == {"Regex": SPLIT_PATTERN} and steps[0]["behavior"] == "Isolated":
            return "qwen2"
    elif plain and types == ["ByteLevel"] and steps[0]["use_regex"]:  # MiniMind's vocabularies
        return "gpt-2"
    raise ValueError("llama.cpp has no name for the way this tokenizer cuts text; it must be Qwen2's or GPT-2's")


def write_vocabulary(writer, config: LMConfig, tokenizer, splitter: str, base: bool) -> None:
    """The tokens with their types, the merges, the markers and the chat template."""
    import gguf

    content = backend_json(tokenizer)
    tokens = [f"[UNUSED{i}]" for i in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for text, i in content["model"]["vocab"].items():
        tokens[i], types[i] = text, gguf.TokenType.NORMAL
    for token in content["added_tokens"]:
        # llama.cpp does not print control tokens. It prints user-defined ones (the tags of thinking and tools), and
        # reads them as tokens wherever they stand in a text.
        special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    markers = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
               "unk": tokenizer.unk_token_id}  # fmt: skip
    for which, token_id in markers.items():
        if token_id is not None:
            getattr(writer, f"add_{which}_token_id")(token_id)
    writer.add_add_bos_token(base)  # in chats the template writes the markers
    writer.add_add_eos_token(False)
    if tokenizer.chat_template and not base:
        writer.add_chat_template(exported_template(tokenizer.chat_template))
