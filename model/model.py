"""The decoder, dense or with experts, as a transformers PreTrainedModel.

    tokens -> embedding -> n_layers x (x + attention(norm(x)), then x + feed_forward(norm(x))) -> norm -> head -> logits

Attention and positions are in attention.py, the feed-forward blocks in moe.py; here they are put together. Parameter
names and mathematics are transformers' Llama (Qwen3 with `qk_norm`), so a dense state dict moves between the two
without renaming. Nothing about training lives here.

Legend: B rows, T tokens of a row, S tokens a query may look back on (cache included), D width of the model,
V vocabulary.
"""

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
from model.attention import Attention, DocumentLengths, RMSNorm, RotaryEmbedding, packed_mask, packed_positions
from model.compat import CACHE, check_keywords
from model.LMConfig import LMConfig
from model.moe import Experts, FeedForward, MoEFeedForward

LOSS_CHUNK_CPU, LOSS_CHUNK_GPU = 512, 2048  # tokens whose logits are computed together for a loss


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    The sum x itself is never normalised between layers, so the gradient flows back through it unchanged.
    """

    def __init__(self, config: LMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config.dim, config.hidden_dim)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.config = config

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None, cache=None, documents: Tensor | None = None):
        # Dropout is applied to what a block adds to x and never to x itself: the residual path stays intact.
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

        The stream is a sum of 2 n_layers such outputs. The variance of a sum of independent numbers is the sum of their
        variances, so with the smaller std it does not grow with depth. These projections have an attribute
        `writes_residual`, because transformers calls this for one module at a time without its name.
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
        # In training no cache by default: it would hold all keys and values, which are never used again there.
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None and segment_ids is None:
            cache = DynamicCache(config=self.config)
        # Positions: in packed rows they restart with each document, else they count on from the cache.
        if position_ids is None and segment_ids is not None:
            position_ids = packed_positions(segment_ids)
        elif position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0) + past
        mask = self._mask(x, attention_mask, position_ids, cache, segment_ids, document_ends)
        documents = self._documents(attention_mask, segment_ids) if self.config.use_moe and self.training else None

        cos, sin = self.rotary_emb(position_ids, x.dtype)  # once: the angles are the same in all layers
        aux_loss = None  # the experts' balance losses; each layer has a router of its own
        for layer in self.layers:
            x, layer_loss = layer(x, cos, sin, mask=mask, cache=cache, documents=documents)
            if layer_loss is not None:
                aux_loss = layer_loss if aux_loss is None else aux_loss + layer_loss
        out = MoeModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: cache})
        out["aux_loss"] = aux_loss
        return out

    def _mask(self, x, attention_mask, position_ids, cache, segment_ids, document_ends):
        """The mask for attention.attend, built once for all layers. A 4-D attention_mask is used as it is."""
        if segment_ids is not None:  # packed rows: lengths where a kernel takes them, else the mask
            lengths = DocumentLengths.of(segment_ids, document_ends, compute_dtype(x), self.config.head_dim)
            return packed_mask(segment_ids) if lengths is None else lengths
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        # Without padding this is None: plain causal attention, for which there are faster kernels.
        return create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids,
            **{CACHE: cache},
        )  # fmt: skip

    def _documents(self, attention_mask, segment_ids):
        """(B, T): the number of each token's document within the batch, -1 for padding. The balance loss needs it."""
        if segment_ids is not None:
            T = segment_ids.shape[1]  # a row has at most T documents: row r has the numbers from r T on
            row = torch.arange(segment_ids.shape[0], device=segment_ids.device).unsqueeze(-1) * T
            return torch.where(segment_ids > 0, row + segment_ids - 1, -1)
        if attention_mask is not None and attention_mask.dim() == 2:
            row = torch.arange(attention_mask.shape[0], device=attention_mask.device).unsqueeze(-1)
            return torch.where(attention_mask > 0, row, -1)
        return None


def recomputes(hidden: Tensor) -> bool:
    """Whether the backward pass computes logits again: only on a GPU, see next_token_losses."""
    return hidden.is_cuda


def next_token_losses(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Cross-entropy (nats) of each next token: hidden (B, T, D), labels (B, T) -> (B, T - 1), 0 at labels of -100.

    The logits head(hidden), V numbers a token, would be the largest tensor of a training step: 32 rows of 512 tokens
    and 6,400 words make 420 MB in float32, and cross-entropy and its gradient as much again. So they are computed for a
    chunk of tokens at a time. On a CPU a chunk stays in the processor's cache. On a GPU, where memory bounds the batch,
    a chunk's logits are dropped after its loss, and the backward pass computes them again (gradient checkpointing).
    """
    B, T = labels.shape
    states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # position t predicts token t + 1
    chunk, again = LOSS_CHUNK_GPU if hidden.is_cuda else LOSS_CHUNK_CPU, recomputes(hidden)

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, ignore_index=-100, reduction="none")

    losses = []
    for part in zip(states.split(chunk), targets.split(chunk), strict=True):
        if again:  # nothing random happens in a chunk, so no random state is kept for computing it again
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
        document_ends   what attention.document_ends makes of segment_ids, computed on the CPU beforehand: made here,
                        it would have the CPU wait for the GPU
        reduction       "mean", or "none": `loss` is then each target's cross-entropy alone, (B, T - 1), 0 where
                        nothing is learned; there are no logits, which would be a step's largest tensor
        Returns loss, logits (B, T, V), the cache, and aux_loss: the experts' balance loss summed over layers, a
        mean over real tokens, None without experts or outside training.
        """
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=past_key_values if cache is None else cache, use_cache=use_cache, segment_ids=segment_ids,
            document_ends=document_ends, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip
        loss, aux_loss = None, hidden["aux_loss"]
        if reduction == "none":  # our own training loop: it divides the sums itself
            loss = next_token_losses(hidden.last_hidden_state, self.lm_head, labels)
            return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden.last_hidden_state[:, keep])
        if labels is not None:
            items = num_items_in_batch  # transformers' Trainer: learned targets of all micro-batches of the step
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=items)
            if aux_loss is not None:
                # The balance loss is a mean over this micro-batch, so it is weighted by the micro-batch's share of the
                # step's targets.
                share = 1 if items is None else (labels[:, 1:] != -100).sum() / items
                loss = loss + share * aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **{CACHE: getattr(hidden, CACHE)})
