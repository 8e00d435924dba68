"""Whole characters: the table against Python's own decoder, and models that would break them."""

import pytest
import torch

from inference.characters import BYTES, FORBIDDEN, WHOLE, Characters, after
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_text, load_tokenizer

PROMPTS = ["从前有座山", "Once", "鱼", "1+1", "你好", "A", "天空", "？"]


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_seq_len=128, initializer_range=0.3)
    return Engine(MiniMindForCausalLM(config).eval(), load_tokenizer())


def test_the_states_are_those_of_utf_8():
    """All beginnings of two bytes: allowed are those with which some character begins, and whole ones end whole."""
    codes = [*range(0x80, 0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 64)]  # no surrogates
    begin = {chr(code).encode()[:2] for code in codes}
    for one in range(0x80, 0x100):
        for two in range(256):
            text = bytes([one, two])
            assert (after(WHOLE, text) != FORBIDDEN) == (text in begin), text
    for code in codes:
        text = chr(code).encode()
        assert [after(WHOLE, text[:n]) == WHOLE for n in range(1, len(text) + 1)] == [False] * (len(text) - 1) + [True]
        assert after(WHOLE, text[:-1] + b"A") == FORBIDDEN
    assert after(WHOLE, bytes(range(128))) == WHOLE


def test_in_every_state_something_may_follow_and_the_end_only_between_characters(engine):
    table = Characters(engine.token_bytes)
    (end,) = engine.end_tokens
    for state in BYTES:
        assert (table.bias[state] == 0).any() and (table.bias[state, end] == 0) == (state == WHOLE)
    ids = encode_text(engine.tokenizer, "饕餮😀")
    assert len(ids) > 3  # spelled in bytes
    for n in range(len(ids) + 1):
        assert (table.state(ids[:n]) == WHOLE) != engine.tokenizer.decode(ids[:n]).endswith("\ufffd")


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_breaks_characters_cannot(engine, temperature):
    def texts(whole):
        params = SamplingParams(max_tokens=30, temperature=temperature, seed=1, whole_characters=whole, n=4)
        return [answer.text for answer in engine.generate(PROMPTS, params)]

    free, bound = texts(False), texts(True)
    assert any("\ufffd" in text for text in free)
    assert not any("\ufffd" in text[:-1] for text in bound)  # the limit of tokens may cut the last character
    same = [(a, b) for a, b in zip(free, bound, strict=True) if "\ufffd" not in a]
    assert temperature or all(a == b for a, b in same)


def test_where_no_character_would_break_nothing_changes(engine):
    """Greedy answers of the first tokens, as many as come before the first broken character."""
    for prompt in PROMPTS:
        free, bound = (
            engine.generate([prompt], SamplingParams(max_tokens=20, temperature=0, whole_characters=whole))[0].token_ids
            for whole in (False, True)
        )
        text = engine.tokenizer.backend_tokenizer.decode
        kept = next((n for n in range(20) if "\ufffd" in text(free[: n + 1])), 20)
        assert bound[:kept] == free[:kept]
