"""The one place that knows how versions of transformers differ, and which of their keywords our models may ignore.

transformers 5.24 renamed the key/value cache: `cache` where older versions say `past_key_values`, in forward methods,
in their outputs and in the mask's arguments. The same version renamed the switch of activation checkpointing.
"""

import inspect

from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Keywords of transformers' models that change nothing here, with the values they may have (None: any).
# transformers.generate, its Trainer, peft and trl pass them to every model.
HARMLESS = {
    "cache_position": None,  # the cache knows how many tokens it has
    "token_type_ids": None,  # a decoder has one type of token
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
}


def checkpoint_activations(model) -> None:
    """From now on each layer keeps only its input and computes the rest again in the backward pass.

    transformers 5.24 says activation_checkpointing_enable where older versions say gradient_checkpointing_enable.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def check_keywords(keywords: dict) -> None:
    """TypeError for a keyword that a forward method does not know: ignored, it would change the answer unseen.

    keywords: those that are not the method's own.
    """
    for name, value in keywords.items():
        if name not in HARMLESS:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        allowed = HARMLESS[name]
        if allowed is not None and not any(value is one for one in allowed):
            raise TypeError(f"forward() does not support {name}={value!r}")
