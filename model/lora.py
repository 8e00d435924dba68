"""Low-rank adapters: a small trainable update beside frozen weights (Hu et al. 2021, arXiv 2106.09685).

    y = W x + (alpha / rank) B A x        W (out, in) frozen, A (rank, in) random, B (out, rank) zero at the start

What fine-tuning adds to W is close to a matrix of low rank, and a matrix of rank r is a product B A, which has r (in +
out) numbers instead of in * out. Only A and B are trained, so only they need gradients and an optimizer's state.

    dL/dB = s dL/dW' A'      dL/dA = s B' dL/dW'      s = alpha / rank, W' = W + s B A

B = 0 at the start, so the model's outputs do not change at first. A must not be zero too: then both gradients would be
zero and stay zero. The division by the rank keeps the size of the update when the rank is changed, so alpha and
learning rate need not change. W' has the shape of W, so a trained adapter can be added to W: then it costs nothing.

A layer is adapted in place: it stays the same module with the same weight and name, and gets any number of adapters by
name, one of which is active. Experts are stacks of matrices, and so are their adapters.

    add_lora(model, rank=8, alpha=16, dropout=0.05)     freeze the model, add an adapter to train
    save_lora(path, model)                              the adapter alone: a few hundred kilobytes
    load_lora(model, path, name="medical")              put a saved one beside those that are there
    use_lora(model, "medical")                          make it the active one; None: none is active
    remove_lora(model, "medical")                       delete it
    merge_lora(model)                                   add the active one to the weights: a plain model again

inference/adapters.py answers with several of them at once, each row of a batch with its own.
"""

import copy
import fnmatch
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe import Experts
from model.weights_file import FREE_FIELDS, LORA_FORMAT, describe, fingerprint, read_file, save_atomically, told_of

LARGEST = torch.finfo(torch.float32).max
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """rank of the update; alpha / rank scales it; dropout on its input in training; targets: see `matches`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"the rank of an adapter must be a whole number of at least 1, not {self.rank!r}")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha <= LARGEST:
            raise ValueError(f"alpha of an adapter must be above 0 and a float32, not {self.alpha!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout of an adapter must lie in [0, 1), not {self.dropout!r}")


# ----------------------------------------------------------------------------------------------------- the modules
class Adapter(nn.Module):
    """The update of one weight (..., out, in): A (..., rank, in) and B (..., out, rank), stacked as the weight is."""

    def __init__(self, weight: Tensor, config: LoraConfig):
        super().__init__()
        *stack, n_out, n_in = weight.shape
        bound = n_in**-0.5  # peft's start: uniform in +-1 / sqrt(in), so A x is about as large as x
        self.A = nn.Parameter(weight.new_empty(*stack, config.rank, n_in).uniform_(-bound, bound))
        self.B = nn.Parameter(weight.new_zeros(*stack, n_out, config.rank))
        self.scaling, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x (..., in) -> what is added to W x, (..., out). expert: which of the stack, where there is one."""
        A, B = (self.A, self.B) if expert is None else (self.A[expert], self.B[expert])
        # B (A x), never (B A) x: the product B A would be as large as W.
        return self.scaling * F.linear(F.linear(F.dropout(x, self.dropout, self.training), A), B)

    def delta(self) -> Tensor:
        """What is added to W, (..., out, in)."""
        return self.scaling * self.B @ self.A


class LoraLayer(nn.Module):
    """What adapted layers share. adapters[name][weight]: the Adapter of the layer's parameter called `weight`."""

    adapters: nn.ModuleDict
    active: str | None

    def add(self, name: str, config: LoraConfig) -> None:
        weights = [(key, p) for key, p in self.named_parameters(recurse=False) if p.ndim >= 2]
        self.adapters[name] = nn.ModuleDict({key: Adapter(p, config) for key, p in weights}).train(self.training)

    @property
    def adapter(self) -> nn.ModuleDict | None:
        """The active adapter, None where none is active."""
        return None if self.active is None else self.adapters[self.active]


class LoraLinear(LoraLayer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out if self.adapter is None else out + self.adapter["weight"](x)


class LoraExperts(LoraLayer, Experts):
    """An A and a B for each expert. The fast ways in expert_loop.py have no adapters, so the plain loop is used."""

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """The arguments of Experts.forward."""
        way = super().forward if self.adapter is None else self.plain_loop
        return way(x, token, weight, counts)

    def expert(self, e: int, x: Tensor) -> Tensor:
        """Expert e with its adapter, as the plain loop calls it: x (n, D) -> (n, D)."""
        gate_up, down = self.adapter["gate_up_proj"], self.adapter["down_proj"]
        gate, up = (F.linear(x, self.gate_up_proj[e]) + gate_up(x, e)).chunk(2, dim=-1)
        inner = F.silu(gate) * up  # (n, I)
        return F.linear(inner, self.down_proj[e]) + down(inner, e)


ADAPTED = {nn.Linear: LoraLinear, Experts: LoraExperts}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


# --------------------------------------------------------------------------------------------------- add and switch
def add_lora(model, rank=8, alpha=16.0, dropout=0.0, targets=PROJECTIONS, name="default"):
    """Adds an adapter to every layer that `targets` name, makes it active, and freezes all else; returns the model.

    targets: see `matches`. Drawn from torch's global random numbers. The model computes what it did before, since B
    is zero. Raises ValueError where a target names no layer, no layer is as large as the rank, or the name is taken.
    """
    config = LoraConfig(rank, alpha, dropout, targets)
    if name in getattr(model, "lora_configs", {}) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"the adapter's name {name!r} is taken; give it another one")
    base = getattr(model, "lora_base", None) or fingerprint(model)  # of the weights, frozen from here on
    # An update of rank r is useful only below the matrix's own largest rank, the smaller of its two sides.
    layers = targeted(model, config.targets)
    largest = max(min(p.shape[-2:]) for layer in layers.values() for p in layer.parameters() if p.ndim >= 2)
    if config.rank > largest:
        raise ValueError(f"rank {config.rank}: no update of these layers can have a rank above {largest}")
    # All mistakes are found above, before anything is changed.
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers.values():
        _adapt(layer).add(name, config)
    model.lora_base = base
    model.lora_configs = getattr(model, "lora_configs", {}) | {name: config}
    return use_lora(model, name)


def _adapt(layer) -> LoraLayer:
    """Changes the class of the layer object. A wrapper module around it would rename its weight in state dicts."""
    if type(layer) in ADAPTED:
        layer.__class__ = ADAPTED[type(layer)]
        layer.adapters, layer.active = nn.ModuleDict(), None
    return layer


def matches(target: str, name: str) -> bool:
    """Whether `target` names this layer: by the end of its dotted name ("q_proj", "self_attn.q_proj") or, with * or
    [...], by a pattern for the whole name ("model.layers.[01].*_proj")."""
    return name == target or name.endswith(f".{target}") or (is_pattern(target) and fnmatch.fnmatchcase(name, target))


def is_pattern(target: str) -> bool:
    return "*" in target or "[" in target


def targeted(model, targets) -> dict[str, nn.Module]:
    """The layers that the targets name, {name: module}; ValueError for a target that names none. Patterns leave out
    head, router and routed experts: these must be named ("lm_head", "mlp.gate", "experts")."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Experts)}
    chosen = {}
    for target in targets:
        found = {name: m for name, m in layers.items() if matches(target, name)}
        if is_pattern(target):
            # An adapted router would change which experts a token is sent to; the head shares the embedding's matrix.
            found = {n: m for n, m in found.items() if not n.endswith(("lm_head", "mlp.gate", "experts"))}
        if not found and not (model.config.use_moe and target in PROJECTIONS):  # there without shared experts
            ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ValueError(f"no layer is called {target!r}; the model's layers are {', '.join(ends)}")
        chosen |= found
    if not chosen:
        raise ValueError(f"no layer of this model is called {' or '.join(targets)}")
    return {name: m for name, m in layers.items() if name in chosen}


def use_lora(model, name: str | None):
    """Makes the adapter called `name` the active one and the only one that is trained; None: none is."""
    if name is not None and name not in getattr(model, "lora_configs", {}):
        raise ValueError(f"no adapter {name!r} is loaded; there are {', '.join(getattr(model, 'lora_configs', {}))}")
    # Adapters may have different targets, so a layer may lack this one: then it computes without any.
    for layer in adapted_layers(model).values():
        layer.active = name if name in layer.adapters else None
        for key, adapter in layer.adapters.items():
            adapter.requires_grad_(key == name)
    return model


def remove_lora(model, name: str):
    """Deletes an adapter. If it was the active one, none is active afterwards."""
    for layer in adapted_layers(model).values():
        if layer.active == name:
            layer.active = None
        if name in layer.adapters:
            del layer.adapters[name]
    del model.lora_configs[name]
    return model


def adapted_layers(model) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def merge_lora(model):
    """Adds the active adapter to the weights: the same outputs without its cost; returns the model.

    The layers are plain ones again, all adapters are gone, and everything can be trained.
    """
    head = model.lm_head
    if isinstance(head, LoraLinear) and model.config.tie_word_embeddings:
        # The head shares the embedding's matrix, which has no adapter. Merged into the shared matrix, the update would
        # change the embeddings too: so the head gets a matrix of its own.
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    for layer in adapted_layers(model).values():
        for key, adapter in (layer.adapter or {}).items():
            getattr(layer, key).add_(adapter.delta())  # W becomes W' = W + s B A, in place
    _forget_adapters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def without_lora(model):
    """A copy of the model, in eval mode and without its adapters. It shares the model's parameters."""
    # deepcopy looks objects up in this memo first: modules are copied, parameters are found there and shared
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    _forget_adapters(twin)
    return twin


def _forget_adapters(model) -> None:
    for layer in adapted_layers(model).values():
        del layer.adapters, layer.active
        layer.__class__ = PLAIN[type(layer)]
    # The fingerprint and the adapters' configs no longer describe this model.
    for attribute in ("lora_base", "lora_configs"):
        model.__dict__.pop(attribute, None)


# ---------------------------------------------------------------------------------------------------- save and load
def adapter_parameters(model, name: str) -> dict[str, nn.Parameter]:
    """{"model.layers.0.self_attn.q_proj.weight.A": ...} of one adapter: the parameter it belongs to, then A or B."""
    return {
        f"{layer_name}.{key}": p
        for layer_name, layer in adapted_layers(model).items() if name in layer.adapters
        for key, p in layer.adapters[name].named_parameters()
    }  # fmt: skip


def save_lora(path, model, record: dict | None = None, name: str | None = None) -> None:
    """Writes one adapter (the active one by default), what it fits on and its training record, atomically."""
    name = name or active_lora(model)
    tensors = {key: p.detach().cpu() for key, p in adapter_parameters(model, name).items()}
    content = {
        "format": LORA_FORMAT, "config": model.config.fields(), "lora": asdict(model.lora_configs[name]),
        "base": model.lora_base, "tokenizer": None, "record": record or {}, "model": tensors,
    }  # fmt: skip
    save_atomically(content, path)


def active_lora(model) -> str:
    """Name of the active adapter; ValueError where there is none."""
    names = {layer.active for layer in adapted_layers(model).values()} - {None}
    if not names:
        raise ValueError("no adapter is active: add or load one first")
    return names.pop()


def load_lora(model, path, name: str | None = None, exact: bool = False):
    """Loads a saved adapter beside those that are there and makes it active.

    name: by default the file's. Raises ValueError for a file that is no adapter or one for another shape. Where it was
    trained on other weights of this shape: warns, or raises ValueError if `exact`.
    """
    path = Path(path)
    name = (name or path.absolute().stem).replace(".", "_")  # of ".", which has no name, the folder's
    with told_of(path):
        content = read_file(path)
        if not isinstance(content, dict) or content.get("format") != LORA_FORMAT:
            raise ValueError(f"{path} is not an adapter")
        return attach(model, content, name, path, exact)


def attach(model, content: dict, name: str, path, exact: bool = False):
    """Adds the adapter that an adapter file holds to the model it fits; exact: see load_lora."""
    # Another shape is an error. Other weights of the same shape are only a warning: an adapter may be tried on a model
    # that was trained further.
    theirs, ours = content["config"], model.config.fields()
    wrong = [f"{key} {theirs.get(key)} (here: {ours.get(key)})" for key in sorted(theirs.keys() | ours.keys())
             if theirs.get(key) != ours.get(key) and key not in FREE_FIELDS]  # fmt: skip
    if wrong:
        raise ValueError(f"{path} is an adapter for another shape: {', '.join(wrong)}")
    if content["base"] != (getattr(model, "lora_base", None) or fingerprint(model)):
        other = f"{path} was trained on other weights of this shape ({describe(model.config)})"
        if exact:
            raise ValueError(f"{other}: {content['record'].get('came_from') or 'the file does not say which'}")
        warnings.warn(other, stacklevel=3)
    config = LoraConfig(**content["lora"])
    add_lora(model, config.rank, config.alpha, config.dropout, config.targets, name)
    return fill(model, name, content["model"], path)


@torch.no_grad()
def fill(model, name: str, tensors: dict[str, Tensor], path):
    """Copies tensors, named as in adapter_parameters, into the adapter `name`; ValueError where they do not fit."""
    own = adapter_parameters(model, name)
    # Names first, then shapes. The new adapter is removed again where they do not fit: the model stays as it was.
    odd = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if odd:
        remove_lora(model, name)
        raise ValueError(f"{path} does not fit this model: {odd[0]} (and {len(odd) - 1} more) differ")
    for key, parameter in own.items():
        parameter.copy_(tensors[key])
    return model
