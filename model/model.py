"""The decoder, dense or with experts, as a transformers PreTrainedModel.

Legend: B rows, T tokens of a row, S tokens a query may look back on (cache included), H query heads, G key/value
heads, h width of a head, D width of the model, V vocabulary.

Parameter names and mathematics are transformers' Llama (Qwen3 with `qk_norm`), so a dense state dict moves between
the two without renaming. Nothing about training lives here.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from common.device import compute_dtype
from model.compat import CACHE, check_keywords
from model.LMConfig import LMConfig
from model.moe import Experts, FeedForward, MoEFeedForward

LOSS_CHUNK_CPU, LOSS_CHUNK_GPU = 512, 2048  # tokens whose logits are computed together for a loss


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Under autocast computed in float32, the weights' type, and rounded once: else each product that reads the
        result would round it for itself, and keep its own copy for the backward pass."""
        normed = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return normed.to(compute_dtype(x))


# ------------------------------------------------------------------------------------------------ rotary positions
def inverse_frequencies(config: LMConfig, device=None) -> tuple[Tensor, float]:
    """Angle a position turns each pair of a head's numbers, in radians (h/2,), and a factor on cos and sin.

    RoFormer (Su et al. 2021, arXiv 2104.09864). For rows longer than those trained on: "linear" divides all angles
    (Chen et al. 2023, arXiv 2306.15595); "yarn" divides those of long wavelengths only and sharpens attention
    (Peng et al. 2023, arXiv 2309.00071).
    """
    rope, width = config.rope_parameters, config.head_dim
    frequency = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    if rope["rope_type"] == "default":
        return frequency, 1.0
    factor = rope["factor"]
    if rope["rope_type"] == "linear":
        return frequency / factor, 1.0

    trained = rope.get("original_max_position_embeddings") or config.max_seq_len

    def dimension_of(rotations: float) -> float:  # the pair that turns so many times within the trained length
        return width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(dimension_of(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension_of(rope.get("beta_slow") or 1)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32, device=device) - low) / (max(high - low, 0) or 0.001)
    ramp = ramp.clamp(0, 1)  # 0: many turns, left alone; 1: less than one turn, interpolated
    scale = rope.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return frequency * (1 - ramp) + frequency / factor * ramp, scale


class RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles. Recomputed at each forward: exact for any length, nothing to save."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids (B or 1, T) -> cos, sin (B or 1, 1, T, h/2)."""
        frequency, scale = inverse_frequencies(self.config, position_ids.device)
        angle = position_ids[:, None, :, None].float() * frequency
        return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + h/2}) of each head by their position's angle; x (B, H, T, h)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ------------------------------------------------------------------------------------------------------- attention
class Attention(nn.Module):
    """Causal attention in which n_heads / n_kv_heads queries share a key (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.o_proj.writes_residual = True  # drawn smaller, see _init_weights
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache=None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, h)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, G, h)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, h), (B, G, T, h)
        # Angles are float32 and so are the products with them; under autocast the values are not, and neither the
        # attention kernels nor the cache take two types.
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, G, S, h)
        out = attend(q, k, v, mask)  # (B, H, T, h)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """softmax(q k' / sqrt(h)) v. mask: None (causal), a tensor broadcast to (B, H, T, S), or DocumentLengths."""
    if isinstance(mask, DocumentLengths):
        return mask.attend(q, k, v)
    B, H, T, h = q.shape
    if T == 1 and (mask is None or mask.shape[1] == 1):
        # One new token: the queries that share a key stand in its rows, so no key is repeated (twice as fast on a CPU).
        out = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, h), k, v, attn_mask=mask)
        return out.view(B, H, 1, h)
    shared = k.shape[1] != H
    if shared and q.is_cuda:
        # With enable_gqa CUDA has no kernel that takes a mask, and would write out all B x H x T x S scores.
        k, v, shared = repeat_heads(k, H), repeat_heads(v, H), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """Keys or values (B, G, S, h) -> (B, H, S, h), each head as often as queries share it."""
    return x.repeat_interleave(H // x.shape[1], dim=1)


def packed_mask(segment_ids: Tensor) -> Tensor:
    """segment_ids (B, T) -> (B, 1, T, T), True where a query may look: its own document, up to itself.

    Padding (0) looks at padding only, so no row of the softmax is empty.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same.tril()


def packed_positions(segment_ids: Tensor) -> Tensor:
    """segment_ids (B, T) -> position of each token in its document, (B, T)."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def document_ends(segment_ids: Tensor, size: int | None = None) -> Tensor:
    """segment_ids (B, T) -> (size,) int32: where each document ends if the rows stand end to end, after a 0.

    Padding counts as documents of its own. `size` repeats the last end, which adds empty documents: so batches of one
    shape have ends of one shape, whatever documents they hold. On a GPU it waits for the values: compute it on the CPU.
    """
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True).flatten()
    begin = starts.nonzero().flatten().to(torch.int32)
    missing = 1 if size is None else size - len(begin)
    return F.pad(begin, (0, missing), value=segment_ids.numel())


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    VARLEN_ARGUMENTS = frozenset()
else:
    VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters)


class DocumentLengths:
    """The documents of a packed batch as cumulative lengths, for torch's variable-length attention on a GPU.

    It skips the pairs of tokens that `packed_mask` would compute and throw away. Flash attention underneath: half
    precision and compute capability 8 or more; `of` returns None where that is missing and the mask is used.
    """

    def __init__(self, ends: Tensor, longest: int):
        self.ends, self.longest = ends, longest  # the row's length: an upper bound serves

    @classmethod
    def of(cls, segment_ids: Tensor, ends: Tensor | None, dtype: torch.dtype, head_dim: int):
        """segment_ids (B, T), ends: as document_ends has them, which are computed here where they are None."""
        if not cls.served(segment_ids.device, dtype, head_dim):
            return None
        return cls(document_ends(segment_ids) if ends is None else ends, segment_ids.shape[1])

    @staticmethod
    def served(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether a kernel is there for such numbers: NVIDIA's GPUs from Ampere on, and torch 2.11 and later."""
        half = dtype in (torch.bfloat16, torch.float16)
        if device.type != "cuda" or torch.version.hip or not half or head_dim > 256 or head_dim % 8:
            return False
        return "window_size" in VARLEN_ARGUMENTS and torch.cuda.get_device_capability(device) >= (8, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, h), k and v (B, G, T, h) of one half-precision type -> (B, H, T, h)."""
        B, H, T, h = q.shape
        more = {}
        if k.shape[1] != H and "enable_gqa" in VARLEN_ARGUMENTS:
            more["enable_gqa"] = True
        elif k.shape[1] != H:  # torch 2.11
            k, v = repeat_heads(k, H), repeat_heads(v, H)
        flat = [x.transpose(1, 2).reshape(B * T, -1, h) for x in (q, k, v)]
        look_back = (-1, 0)  # as far back as the document goes and not ahead: causal
        out = varlen_attn(*flat, self.ends, self.ends, self.longest, self.longest, window_size=look_back, **more)
        return out.view(B, T, H, h).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------- decoder
class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config.dim, config.hidden_dim)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.config = config

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None, cache=None, documents: Tensor | None = None):
        dropout = self.config.dropout
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache), dropout, self.training)
        normed, aux_loss = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoEFeedForward):
            update, aux_loss = self.mlp(normed, documents)
        else:
            update = self.mlp(normed)
        return x + F.dropout(update, dropout, self.training), aux_loss


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = LMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        """N(0, 0.02); the projections that write into the residual stream smaller by sqrt(2 layers) (GPT-2).

        They are told apart by a mark on the Linear: transformers passes only modules that own parameters themselves.
        """
        std = self.config.initializer_range
        narrow = std / math.sqrt(2 * self.config.n_layers)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=narrow if hasattr(module, "writes_residual") else std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=narrow)


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                segment_ids=None, document_ends=None, inputs_embeds=None, cache=None,
                **kwargs) -> MoeModelOutputWithPast:  # fmt: skip
        """The decoder without its head; arguments as in MiniMindForCausalLM.forward."""
        check_keywords(kwargs)
        cache = past_key_values if cache is None else cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None and segment_ids is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None and segment_ids is not None:
            position_ids = packed_positions(segment_ids)
        elif position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0) + past
        mask = self._mask(x, attention_mask, position_ids, cache, segment_ids, document_ends)
        documents = self._documents(attention_mask, segment_ids) if self.config.use_moe and self.training else None

        cos, sin = self.rotary_emb(position_ids, x.dtype)
        aux_loss = None
        for layer in self.layers:
            x, layer_loss = layer(x, cos, sin, mask=mask, cache=cache, documents=documents)
            if layer_loss is not None:
                aux_loss = layer_loss if aux_loss is None else aux_loss + layer_loss
        out = MoeModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})
        out["aux_loss"] = aux_loss
        return out

    def _mask(self, x, attention_mask, position_ids, cache, segment_ids, document_ends):
        """What `attend` takes, built once for all layers. A 4-D attention_mask is used as it is."""
        if segment_ids is not None:
            lengths = DocumentLengths.of(segment_ids, document_ends, compute_dtype(x), self.config.head_dim)
            return packed_mask(segment_ids) if lengths is None else lengths
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        return create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids,
            **{CACHE: cache},
        )  # fmt: skip

    def _documents(self, attention_mask, segment_ids):
        """(B, T) number of each token's document within the batch, -1 for padding: for the balance loss."""
        if segment_ids is not None:
            T = segment_ids.shape[1]
            row = torch.arange(segment_ids.shape[0], device=segment_ids.device).unsqueeze(-1) * T
            return torch.where(segment_ids > 0, row + segment_ids - 1, -1)
        if attention_mask is not None and attention_mask.dim() == 2:
            row = torch.arange(attention_mask.shape[0], device=attention_mask.device).unsqueeze(-1)
            return torch.where(attention_mask > 0, row, -1)
        return None


def recomputes(hidden: Tensor) -> bool:
    return hidden.is_cuda


def next_token_losses(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Cross-entropy (nats) of each next token: hidden (B, T, D), labels (B, T) -> (B, T - 1), 0 at labels of -100.

    The logits head(hidden), V numbers a token, would be the largest tensor of a training step. A part of the tokens at
    a time, they stay in a CPU's cache; on a GPU, whose memory is what bounds the batch, the backward pass computes each
    part again rather than find it kept.
    """
    B, T = labels.shape
    states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # position t predicts token t + 1
    chunk, again = LOSS_CHUNK_GPU if hidden.is_cuda else LOSS_CHUNK_CPU, recomputes(hidden)

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, ignore_index=-100, reduction="none")

    losses = []
    for part in zip(states.split(chunk), targets.split(chunk), strict=True):
        if again:
            losses.append(checkpoint(of_chunk, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            losses.append(of_chunk(*part))
    return torch.cat(losses).view(B, T - 1)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The decoder with its vocabulary head, whose matrix is the embedding's where the config ties them."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, segment_ids=None, document_ends=None, reduction="mean", cache=None,
                inputs_embeds=None, num_items_in_batch=None, **kwargs) -> MoeCausalLMOutputWithPast:  # fmt: skip
        """
        input_ids       (B, T)
        attention_mask  (B, S) with 0 at padding, or (B, 1, T, S) ready for attention
        position_ids    (B, T); by default they count on from the cache, and restart with each document of segment_ids
        labels          (B, T), at their own token's position, -100 where nothing is learned: `loss` is then the mean
                        cross-entropy in nats (or the sum / num_items_in_batch), in training with aux_loss added
        cache           keys and values of earlier tokens; past_key_values is its name in transformers before 5.24
        logits_to_keep  logits of the last so many positions only (0: all), or of the positions in a tensor
        segment_ids     (B, T) packed rows: 0 padding, 1.. the document a token belongs to
        document_ends   the same as the function document_ends gives it, which spares a GPU to ask for the values
        reduction       "mean", or "none": `loss` is then each target's cross-entropy alone, (B, T - 1), 0 where
                        nothing is learned, and there are no logits: all of them at once are the most a step would hold
        Returns loss, logits (B, T, V), the cache, and aux_loss: the experts' balance loss summed over layers, a
        mean over real tokens, None without experts or outside training.
        """
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=past_key_values if cache is None else cache, use_cache=use_cache, segment_ids=segment_ids,
            document_ends=document_ends, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip
        loss, aux_loss = None, hidden["aux_loss"]
        if reduction == "none":
            loss = next_token_losses(hidden.last_hidden_state, self.lm_head, labels)
            return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden.last_hidden_state[:, keep])
        if labels is not None:
            items = num_items_in_batch  # of all micro-batches: this one adds its share of the mean
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=items)
            if aux_loss is not None:
                share = 1 if items is None else (labels[:, 1:] != -100).sum() / items
                loss = loss + share * aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **{CACHE: getattr(hidden, CACHE)})
