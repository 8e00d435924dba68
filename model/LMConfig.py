"""The shape of a model: all fields that decide what it computes, the presets, and the parameter counts.

Field names are MiniMind's; transformers' names for the same things are accepted as aliases (`hidden_size` for `dim`
and so on), so a config reads the same from either side. `python -m model.LMConfig` prints the presets.
"""

import json

from transformers import PretrainedConfig

from common.flags import out_of_bounds

_BASE_FIELDS = set(PretrainedConfig().to_dict()) | {
    "attn_implementation", "auto_map", "dtype", "name_or_path", "torch_dtype", "rope_scaling", "head_dim",
}  # fmt: skip


def _is_number(value) -> bool:
    return isinstance(value, int | float)


# What values must be, see common.flags.out_of_bounds. None is allowed: it stands for a default computed from others.
_COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len",
           "num_experts_per_tok", "n_routed_experts", "head_dim", "hidden_dim", "moe_hidden_dim")  # fmt: skip
_COUNT_BOUNDS = [(_COUNTS, "be a whole number of at least 1", lambda x: type(x) is int and x >= 1)]
_BOUNDS = [
    (("n_shared_experts",), "be 0 or more", lambda x: isinstance(x, int) and x >= 0),
    (("scoring_func",), 'be "softmax"', lambda x: x == "softmax"),
    (("qk_norm", "use_moe", "norm_topk_prob", "seq_aux", "tie_word_embeddings"), "be True or False",
     lambda x: x in (True, False)),
    (("dropout",), "be a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1),
    (("aux_loss_alpha",), "be a number of at least 0", lambda x: _is_number(x) and x >= 0),
    (("initializer_range", "norm_eps"), "be a number above 0", lambda x: _is_number(x) and x > 0),
    (("rope_theta",), "be a number above 1", lambda x: _is_number(x) and x > 1),
]  # fmt: skip
ROPE_KEYS = {  # what each kind of rotary positions reads besides its type and theta
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"},
}


class LMConfig(PretrainedConfig):
    """Configuration of a MiniMind decoder.

    dim                  width of the residual stream                                      (hidden_size)
    n_layers             decoder layers                                                    (num_hidden_layers)
    n_heads              query heads                                                       (num_attention_heads)
    n_kv_heads           key/value heads, shared by n_heads / n_kv_heads queries           (num_key_value_heads)
    head_dim             width of one head; dim / n_heads if None
    vocab_size           entries of the vocabulary
    hidden_dim           width of a feed-forward block; None: 8/3 dim rounded up to multiple_of  (intermediate_size)
    multiple_of          see hidden_dim
    norm_eps             added to the mean square in RMSNorm                                (rms_norm_eps)
    max_seq_len          positions the model promises to handle                             (max_position_embeddings)
    rope_theta           base of the rotary wavelengths
    rope_parameters      None, or transformers' dict for longer contexts: {"rope_type": "linear" | "yarn", "factor"}
    dropout              probability of zeroing an activation of a block's output in training
    qk_norm              RMSNorm on each query and key head before the rotation, as Qwen3 has
    use_moe              routed experts in place of each feed-forward block
    num_experts_per_tok  experts a token is sent to (top-k)
    n_routed_experts     experts a token can be sent to                                    (num_experts)
    n_shared_experts     experts every token passes through
    moe_hidden_dim       width of one expert; hidden_dim if None                           (moe_intermediate_size)
    scoring_func         how the router turns logits into weights; "softmax" only
    norm_topk_prob       divide a token's top-k weights by their sum
    aux_loss_alpha       weight of the balance loss                                        (router_aux_loss_coef)
    seq_aux              balance loss for each document (True) or over the whole batch (False)

    Raises ValueError, in a sentence, for unknown fields and for values no model can have.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "hidden_dim",
        "rms_norm_eps": "norm_eps",
        "max_position_embeddings": "max_seq_len",
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "moe_intermediate_size": "moe_hidden_dim",
        "router_aux_loss_coef": "aux_loss_alpha",
    }

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = 2
    head_dim: int | None = None
    vocab_size: int = 6400
    hidden_dim: int | None = None
    multiple_of: int = 64
    norm_eps: float = 1e-5
    max_seq_len: int = 32768
    rope_theta: float = 1e6
    rope_parameters: dict | None = None
    dropout: float = 0.0
    qk_norm: bool = False
    use_moe: bool = False
    num_experts_per_tok: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    moe_hidden_dim: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    aux_loss_alpha: float = 0.1
    seq_aux: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self, **kwargs):
        # Aliases first: what is left in kwargs after them must be a field of transformers' own.
        for alias, field in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, field, kwargs.pop(alias))
        unknown = sorted(key for key in kwargs if key not in _BASE_FIELDS and not key.startswith("_"))
        if unknown:
            raise ValueError(f"LMConfig has no field {', '.join(unknown)}")
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}  # the older of transformers' names
        if not isinstance(rope, dict):
            raise ValueError(f'rope_parameters must be a dict {{"rope_type": ..., "factor": ...}}, not {rope!r}')
        self.rope_parameters = {"rope_type" if key == "type" else key: value for key, value in rope.items()}
        self.rope_theta = self.rope_parameters.get("rope_theta", self.rope_theta)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        self._check_numbers()
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads
        if self.hidden_dim is None:
            # SwiGLU has three matrices, a plain block of width 4 dim two: 2/3 of the width gives as many parameters.
            self.hidden_dim = self.multiple_of * -(-int(8 * self.dim / 3) // self.multiple_of)
        if self.moe_hidden_dim is None:
            self.moe_hidden_dim = self.hidden_dim
        super().__post_init__(**kwargs)
        self._check_rope()

    def _check_numbers(self):
        faults = out_of_bounds(self, _COUNT_BOUNDS, prefix="")
        if faults:  # first: the checks below compute with these numbers
            raise ValueError("; ".join(faults))
        faults = out_of_bounds(self, _BOUNDS, prefix="")
        if self.head_dim is None and self.dim % self.n_heads:
            faults.append(f"dim {self.dim} does not divide into {self.n_heads} heads")
        elif (self.head_dim or self.dim // self.n_heads) % 2:
            faults.append(f"the head width {self.head_dim or self.dim // self.n_heads} must be even to be rotated")
        if self.n_heads % self.n_kv_heads:
            faults.append(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.use_moe and self.num_experts_per_tok > self.n_routed_experts:
            faults.append(f"a token cannot go to {self.num_experts_per_tok} of {self.n_routed_experts} experts")
        if faults:
            raise ValueError("; ".join(faults))

    def _check_rope(self):
        rope = self.rope_parameters
        if rope["rope_type"] not in ROPE_KEYS:
            raise ValueError(f'rope_type must be "default", "linear" or "yarn", not {rope["rope_type"]!r}')
        known = {"rope_type", "rope_theta", *ROPE_KEYS[rope["rope_type"]]}
        for key, value in rope.items():
            if key not in known:
                raise ValueError(f'rope_parameters of type "{rope["rope_type"]}" have no {key}')
            if key not in ("rope_type", "attention_factor") and not isinstance(value, int | float):
                raise ValueError(f"{key} of rope_parameters must be a number, not {value!r}")
        if rope["rope_type"] != "default" and not rope.get("factor", 0) >= 1:
            raise ValueError(f'rope_parameters of type "{rope["rope_type"]}" need a factor of at least 1')

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "LMConfig":
        """The named shape with any fields changed; a name that does not exist is refused with the ones that do."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; presets are {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    def fields(self) -> dict:
        """The fields of this class alone, as plain numbers and strings: what a weights file stores."""
        names = [name for name in LMConfig.__annotations__ if name != "rope_parameters"]
        fields = {name: getattr(self, name) for name in names}
        if self.rope_parameters["rope_type"] != "default":
            fields["rope_parameters"] = dict(self.rope_parameters)
        return fields

    def parameter_count(self) -> int:
        """Learned numbers of the whole model, the tied embedding counted once."""
        return self._count(self.n_routed_experts)

    def active_parameter_count(self) -> int:
        """Learned numbers that one token meets: with experts, only the top-k and the shared ones."""
        return self._count(self.num_experts_per_tok)

    def _count(self, routed: int) -> int:
        heads = self.n_heads + self.n_kv_heads
        attention = 2 * self.dim * heads * self.head_dim + (2 * self.head_dim if self.qk_norm else 0)
        feed_forward = 3 * self.dim * self.hidden_dim
        if self.use_moe:
            experts = (routed + self.n_shared_experts) * 3 * self.dim * self.moe_hidden_dim
            feed_forward = experts + self.n_routed_experts * self.dim  # the router scores all experts
        embedding = self.vocab_size * self.dim * (1 if self.tie_word_embeddings else 2)
        return embedding + self.n_layers * (attention + feed_forward + 2 * self.dim) + self.dim


# Shapes of MiniMind's releases, whose weights load into them. v1 rotated with theta 1e4.
_V1 = {"n_heads": 16, "n_kv_heads": 8, "rope_theta": 1e4}
_V3 = {"dim": 768, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 2432, "norm_eps": 1e-6, "qk_norm": True}
PRESETS = {
    "tiny": {"dim": 160, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 2048},
    "minimind-v1-small": {"dim": 512, "n_layers": 8, **_V1},
    "minimind-v1-moe": {"dim": 512, "n_layers": 8, "use_moe": True, **_V1},
    "minimind-v1": {"dim": 768, "n_layers": 16, **_V1},
    "minimind2-small": {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2},
    "minimind2-moe": {"dim": 640, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "use_moe": True},
    "minimind2": {"dim": 768, "n_layers": 16, "n_heads": 8, "n_kv_heads": 2},
    "minimind3": _V3,
    "minimind3-moe": _V3 | {"use_moe": True, "n_shared_experts": 0, "num_experts_per_tok": 1,
                            "aux_loss_alpha": 5e-4, "seq_aux": False},
}  # fmt: skip
DEFAULT_PRESET = "minimind2-small"


def main():
    counts = {}
    print(f"{'preset':<18} {'parameters':>12} {'active':>12}   shape")
    for name in PRESETS:
        config = LMConfig.from_preset(name)
        counts[name] = config.parameter_count()
        shape = f"dim {config.dim}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"
        if config.use_moe:
            shape += f", {config.num_experts_per_tok} of {config.n_routed_experts} experts + {config.n_shared_experts}"
        print(f"{name:<18} {counts[name]:>12,} {config.active_parameter_count():>12,}   {shape}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
