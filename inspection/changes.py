"""What training changed: an adapter's size by layer, preferences token by token, two checkpoints on one text.

Legend: T tokens, V vocabulary.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, user_errors
from inference.engine import Engine
from inspection.tokens import MOST_TOKENS
from inspection.trace import Trace
from model.lora import active_lora, adapted_layers, load_lora
from model.tokenizer import render
from model.tokenizer_files import tokenizer_hash
from model.weights import load_model
from model.weights_file import read_header


# ---------------------------------------------------------------------------------------------------------- adapters
@dataclass
class Change:
    """How much an adapter changes one weight: Frobenius norms of W and of what is added to it."""

    layer: int  # -1: a weight outside the layers
    projection: str  # "self_attn.q_proj", "mlp.experts.down_proj"
    weight: float
    added: float

    @property
    def relative(self) -> float:
        return self.added / max(self.weight, 1e-30)


def open_adapter(path):
    """The model an adapter's file was trained on, with the adapter beside its weights and not merged into them."""
    with user_errors():
        record = read_header(Path(path)).get("record", {})
        base = record.get("came_from")
        if not base or not Path(base).exists():
            raise UserError(f"{path} is an adapter for the weights {base}, which are not there")
        return load_lora(load_model(base, record.get("preset"))[0], path)


@torch.no_grad()
def adapter_changes(model) -> list[Change]:
    """||s B A|| and ||W|| of every weight that the active adapter changes, in the model's order; UserError without
    one."""
    with user_errors():
        active_lora(model)
    found = []
    for name, layer in adapted_layers(model).items():
        number, _, projection = re.sub(r"^model\.layers\.", "", name).partition(".")
        inside = number.isdigit()
        for key, adapter in (layer.adapter or {}).items():
            weight = getattr(layer, key)
            # Experts have two stacks of matrices under one name, so the parameter's name is told with it.
            what = (projection if inside else name) + ("" if key == "weight" else f".{key}")
            found.append(
                Change(int(number) if inside else -1, what, weight.norm().item(), adapter.delta().norm().item())
            )
    return found


# ------------------------------------------------------------------------------------------------------- preferences
@dataclass
class AnswerTokens:
    """One answer of a pair. ids: its tokens, the one that ends it too; log-probabilities (nats) of each under the
    trained model and under the one it is compared with, (tokens,) each."""

    ids: list[int]
    policy: np.ndarray
    reference: np.ndarray

    @property
    def gained(self) -> float:
        """How much likelier training made the answer, in nats: log policy - log reference."""
        return float((self.policy - self.reference).sum())


@dataclass
class Preference:
    chosen: AnswerTokens
    rejected: AnswerTokens

    @property
    def margin(self) -> float:
        """What DPO raises, without beta: how much more the chosen answer gained than the rejected one."""
        return self.chosen.gained - self.rejected.gained


def preference(policy: Engine, reference: Engine, chosen: list[dict], rejected: list[dict]) -> Preference:
    """Both answers of a pair, token by token, under two models of one vocabulary.

    chosen, rejected: whole conversations, as in DPO's data; the answer is the last message, which the assistant says.
    """
    if note := tokenizers_differ(policy, reference):
        raise UserError(note)
    return Preference(*(answer_tokens(policy, reference, messages) for messages in (chosen, rejected)))


def answer_tokens(policy: Engine, reference: Engine, messages: list[dict]) -> AnswerTokens:
    with user_errors():
        ids, mask = render(policy.tokenizer, messages)
        if messages[-1].get("role") != "assistant":
            raise UserError("the last message of a pair's conversation must be the assistant's: it is the answer")
        before = len(render(policy.tokenizer, messages[:-1], add_generation_prompt=True)[0])
        # Of a conversation of several turns the mask tells all that the assistant says: the answer is the last of it.
        places = [i for i, said in enumerate(mask) if said and i >= before]
        if len(ids) > min(MOST_TOKENS, policy.context, reference.context):
            raise UserError(f"the conversation has {len(ids)} tokens; {MOST_TOKENS} at most can be looked at")
        prompt, answer = ids[: places[0]], ids[places[0] : places[-1] + 1]
        scores = [np.array(engine.score([prompt], [answer])[0].tokens) for engine in (policy, reference)]
    return AnswerTokens(answer, *scores)


# --------------------------------------------------------------------------------------------------- two checkpoints
@dataclass
class SideBySide:
    """The same look at two models. note: "", or how their vocabularies differ: tokens then do not stand side by
    side."""

    first: object
    second: object
    note: str


def side_by_side(first: Engine, second: Engine, look: Callable[[Engine], object]) -> SideBySide:
    """look(engine) for each of two models, such as lambda engine: trace(own_model(engine), read(engine, text))."""
    return SideBySide(look(first), look(second), tokenizers_differ(first, second))


def tokenizers_differ(first: Engine, second: Engine) -> str:
    """ "", or a sentence that says that two models do not read the same tokens."""
    if tokenizer_hash(first.tokenizer) == tokenizer_hash(second.tokenizer):
        return ""
    return (f"the tokenizers differ ({len(first.tokenizer)} and {len(second.tokenizer)} entries): the two models do "
            "not read the same tokens")  # fmt: skip


def divergence(first: Trace, second: Trace) -> np.ndarray:
    """KL(first || second) of what two models expect after each token of the same ids, in nats, (T,)."""
    if first.ids != second.ids:
        raise UserError("the two models did not read the same tokens, so their expectations cannot be compared")
    log_p, log_q = first.logits.log_softmax(dim=-1), second.logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).numpy()
