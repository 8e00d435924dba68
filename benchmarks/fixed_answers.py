"""train_grpo.py with answers that no model gave.

    python -m benchmarks.fixed_answers [flags of train_grpo.py]

Sampled answers cannot show whether two devices learn alike: where two tokens are nearly as probable, half precision
takes the other one, and everything after it differs. From these answers both learn the same.
"""

import torch

import train_grpo
from common.errors import run_main
from inference.stream_text import Completion


def same_answers(model, prompts, seeds, temperature) -> list[Completion]:
    """GRPO's rollout: random tokens, and texts of which every other one is well-formed; a function of the seeds."""
    generator = torch.Generator().manual_seed(seeds[0])
    V = model.config.vocab_size
    tokens = [torch.randint(20, V, (5 + seed % 7,), generator=generator).tolist() for seed in seeds]
    texts = [f"<think>\n1\n</think>\n<answer>\n{seed % 9}\n</answer>" if seed % 2 else "?" for seed in seeds]
    return [Completion(text, t, "stop", len(p), len(t)) for text, t, p in zip(texts, tokens, prompts, strict=True)]


def main(argv=None) -> dict:
    train_grpo.sampler = lambda tokenizer, max_new_tokens: same_answers
    return train_grpo.main(argv)


if __name__ == "__main__":
    run_main(main)
