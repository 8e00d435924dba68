"""Attention: how a token reads the tokens before it. RMSNorm, rotary positions, heads and masks.

Legend: B rows, T tokens of a row, S tokens a query may look back on (cache included), H query heads, G key/value
heads, h width of a head, D width of the model.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import compute_dtype
from model.LMConfig import LMConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast: computed in float32, the type of the weights, and rounded once at the end. Were the result
        # float32, each matrix product that reads it would make a rounded copy of its own and keep it for backward.
        normed = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return normed.to(compute_dtype(x))


# ------------------------------------------------------------------------------------------------ rotary positions
# A head's h numbers are taken as h/2 points in a plane. At position p the i-th point of each query and key is rotated
# by the angle p f_i. The angles of a query at p and a key at q then differ by (p - q) f_i, so their dot product depends
# on the distance p - q alone. The f_i fall from 1 radian a token (it tells near tokens apart) to almost 0 (far ones).
def inverse_frequencies(config: LMConfig, device=None) -> tuple[Tensor, float]:
    """-> (f (h/2,): radians by which each point is rotated per position; a factor on cos and sin).

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

    # Yarn. A point that makes many turns within the trained length was trained at every angle. It is left alone: if it
    # were divided, near tokens would be harder to tell apart. A point that never completes a turn would reach untrained
    # angles at new positions: it is divided by the factor, as "linear" does. Between the two there is a linear ramp.
    trained = rope.get("original_max_position_embeddings") or config.max_seq_len

    def point_that_turns(times: float) -> float:
        """i for which trained * f_i = times * 2 pi, with f_i = theta^(-2i/h)."""
        return width * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(point_that_turns(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(point_that_turns(rope.get("beta_slow") or 1)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32, device=device) - low) / (max(high - low, 0) or 0.001)
    ramp = ramp.clamp(0, 1)  # 0: left alone; 1: divided
    # The softmax over more tokens is flatter. A factor on both q and k multiplies the scores by its square and sharpens
    # it again.
    scale = rope.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return frequency * (1 - ramp) + frequency / factor * ramp, scale


class RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles.

    Computed at each forward pass and not kept in a table: right for any length, and no buffer that loading could leave
    empty (transformers builds models without memory and then fills in the saved tensors only).
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids (B or 1, T) -> cos, sin (B or 1, 1, T, h/2), the 1 for all heads."""
        frequency, scale = inverse_frequencies(self.config, position_ids.device)
        angle = position_ids[:, None, :, None].float() * frequency  # float32: half precision rounds large positions
        return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the points of each head by their position's angle; x (B, H, T, h) -> the same shape.

    Point i is (x_i, x_{i + h/2}), one number from each half, as in Llama's weights for transformers. RoFormer pairs
    neighbours, (x_2i, x_2i+1). The two differ in the order of the rows of q_proj and k_proj, so weights of the other
    kind must be reordered before use (model/convert.py).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ------------------------------------------------------------------------------------------------------- attention
class Attention(nn.Module):
    """Grouped-query attention: n_heads / n_kv_heads query heads share a key/value head (Ainslie et al. 2023, arXiv
    2305.13245). Fewer keys and values make the cache smaller, and the cache limits long answers and large batches.
    """

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.o_proj.writes_residual = True  # drawn smaller, see _init_weights in model.py
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache=None) -> Tensor:
        """x (B, T, D) -> (B, T, D). mask: see `attend`. cache: takes this layer's new keys and values."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, h)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, G, h)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, h), (B, G, T, h)
        # cos and sin may be float32 and so may be the products with them, while under autocast v is in half precision.
        # Attention kernels and cache need one type for all three.
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            # The cache holds keys after rotation: a token's position never changes, so each is rotated once.
            k, v = cache.update(k, v, self.layer_idx)  # (B, G, S, h)
        out = attend(q, k, v, mask)  # (B, H, T, h)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """softmax(q k' / sqrt(h)) v; q (B, H, T, h), k and v (B, G, S, h) -> (B, H, T, h).

    mask: None (causal, each token looks at itself and all before it), a tensor broadcast to (B, H, T, S) that is True
    where a query may look, or DocumentLengths.
    """
    if isinstance(mask, DocumentLengths):
        return mask.attend(q, k, v)
    B, H, T, h = q.shape
    if T == 1 and (mask is None or mask.shape[1] == 1):
        # One new token. The H / G queries that share a key take the place of the T axis, as if they were H / G tokens,
        # so no key is repeated (twice as fast on a CPU). The new token may look at all S: no causal mask is needed.
        out = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, h), k, v, attn_mask=mask)
        return out.view(B, H, 1, h)
    shared = k.shape[1] != H
    if shared and q.is_cuda:
        # With enable_gqa CUDA has no fast kernel that takes a mask, and the slow one stores all B x H x T x S scores.
        k, v, shared = repeat_heads(k, H), repeat_heads(v, H), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)


def repeat_heads(x: Tensor, H: int) -> Tensor:
    """Keys or values (B, G, S, h) -> (B, H, S, h): each head is repeated for the H / G query heads that share it."""
    return x.repeat_interleave(H // x.shape[1], dim=1)


# ----------------------------------------------------------------------------------- packed rows: several documents
# A row of 8 tokens that holds a document of 3, one of 2, one of 1, and padding:
#
#     segment_ids        1 1 1 2 2 3 0 0
#     packed_positions   0 1 2 0 1 0 0 1       each document begins at position 0, as if it stood alone
#     document_ends      0 3 5 6 8             where they end, after a 0; padding counts as one more
#
# The mask is made from segment_ids and never from token ids: a document may hold the padding token as text.
def packed_mask(segment_ids: Tensor) -> Tensor:
    """segment_ids (B, T) -> (B, 1, T, T), True where a query may look: its own document, up to itself.

    Padding (0) may look at padding: for a query that may look nowhere the softmax would be 0 / 0, and its NaN would
    spread through the gradients.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same.tril()


def packed_positions(segment_ids: Tensor) -> Tensor:
    """segment_ids (B, T) -> position of each token in its document, (B, T)."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    # The index where a document starts and 0 elsewhere: the running maximum is the start of the current document.
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def document_ends(segment_ids: Tensor, size: int | None = None) -> Tensor:
    """segment_ids (B, T) -> (size,) int32: a 0, then where each document ends when the rows are laid end to end.

    Each run of padding counts as a document. Up to `size` the last end is repeated, which adds empty documents. So all
    batches have ends of one shape, however many documents they hold, and a compiled model is not compiled again.
    Compute this on the CPU: on a GPU it would have to wait for the values.
    """
    starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True).flatten()
    begin = starts.nonzero().flatten().to(torch.int32)
    missing = 1 if size is None else size - len(begin)
    return F.pad(begin, (0, missing), value=segment_ids.numel())  # a document ends where the next one begins


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    VARLEN_ARGUMENTS = frozenset()
else:
    VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters)


class DocumentLengths:
    """The documents of a packed batch as cumulative lengths, for torch's variable-length attention on a GPU.

    With packed_mask, attention computes all T x T scores of a row and discards those between documents. This kernel
    computes only the scores within documents. It is flash attention, which needs half precision and compute capability
    8 or more. Elsewhere `of` returns None, and the mask is used.
    """

    def __init__(self, ends: Tensor, longest: int):
        self.ends, self.longest = ends, longest  # longest: an upper bound is enough for the kernel, so the row length

    @classmethod
    def of(cls, segment_ids: Tensor, ends: Tensor | None, dtype: torch.dtype, head_dim: int):
        """segment_ids (B, T); ends: from document_ends, computed here where they are None."""
        if not cls.served(segment_ids.device, dtype, head_dim):
            return None
        return cls(document_ends(segment_ids) if ends is None else ends, segment_ids.shape[1])

    @staticmethod
    def served(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether there is a kernel for these: NVIDIA's GPUs from Ampere on, and torch 2.11 and later."""
        half = dtype in (torch.bfloat16, torch.float16)
        if device.type != "cuda" or torch.version.hip or not half or head_dim > 256 or head_dim % 8:
            return False
        # torch 2.10 has the kernel too, with other arguments.
        return "window_size" in VARLEN_ARGUMENTS and torch.cuda.get_device_capability(device) >= (8, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, h), k and v (B, G, T, h) of one half-precision type -> (B, H, T, h)."""
        B, H, T, h = q.shape
        more = {}
        if k.shape[1] != H and "enable_gqa" in VARLEN_ARGUMENTS:
            more["enable_gqa"] = True
        elif k.shape[1] != H:  # torch 2.11
            k, v = repeat_heads(k, H), repeat_heads(v, H)
        # The rows laid end to end: the kernel knows documents only, and no document crosses the end of a row.
        flat = [x.transpose(1, 2).reshape(B * T, -1, h) for x in (q, k, v)]
        look_back = (-1, 0)  # as far back as the document goes and not ahead: causal
        out = varlen_attn(*flat, self.ends, self.ends, self.longest, self.longest, window_size=look_back, **more)
        return out.view(B, T, H, h).transpose(1, 2)
