"""What a model that is being trained writes: the best token each time, so texts of different steps can be compared."""

from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import text_with_markers

NEW_TOKENS = 64


def continue_texts(model, tokenizer, prompts: list[str]) -> list[str]:
    """How the model, in eval mode, goes on with each text."""
    return written(model, tokenizer, list(prompts))


def answer_questions(model, tokenizer, prompts: list[str]) -> list[str]:
    """What the model, in eval mode, answers to each question of a user; tags such as <think> are part of it."""
    return written(model, tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts])


def written(model, tokenizer, prompts: list) -> list[str]:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    return [text_with_markers(tokenizer, c) for c in Engine(model, tokenizer).generate(prompts, params)]
