"""What speeds are compared with: transformers' model of the same mathematics, and a bare matrix product."""

import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from export.counterpart import transformers_config
from model.LMConfig import LMConfig


def counterpart(config: LMConfig):
    """transformers' model of the same mathematics (Llama, Qwen3, GraniteMoeShared or Qwen3Moe), random weights."""
    fields = transformers_config(config, "float32") | {"use_cache": False}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


def matmul_flops(size=2048) -> float:
    """FLOPs a CPU second of one square product: the most a training step could reach on this machine now."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    begin = time.process_time()
    a @ b
    return 2 * size**3 / (time.process_time() - begin)
