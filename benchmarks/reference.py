"""What speeds are compared with: transformers' model of the same mathematics."""

from transformers import AutoConfig, AutoModelForCausalLM

from export.counterpart import transformers_config
from model.LMConfig import LMConfig


def counterpart(config: LMConfig):
    """transformers' model of the same mathematics (Llama, Qwen3, GraniteMoeShared or Qwen3Moe), random weights."""
    fields = transformers_config(config, "float32") | {"use_cache": False}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
