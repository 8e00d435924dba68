"""From logits to the next token: temperature, top-k and top-p by hand, beside what the project's sampler does.

    python docs/course/code/sampling.py --weight out/course/pretrain_160.pth --text 法国的

Prints the most probable next tokens at three temperatures, how many tokens each filter keeps, how often tokens come in
1,000 draws, and texts written at several temperatures. The last line is a JSON object.
"""

import argparse
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from common.errors import run_main, user_errors
from inference.engine import Engine
from inference.sampling import SamplingParams, filtered
from inspection.trace import trace
from model.tokenizer import encode_document
from model.weights import load_model

TEMPERATURES = (0.5, 1.0, 2.0)
FILTERS = ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9})
WRITTEN = (
    {"temperature": 0}, {"temperature": 0.5}, {"temperature": 1}, {"temperature": 1, "top_p": 0.9}, {"temperature": 2},
)  # fmt: skip
DRAWS, SAMPLES, MAX_TOKENS = 1000, 3, 16
TAIL = 50  # a draw outside so many best tokens counts as one of the tail
PATH = 8  # tokens of the greedy text whose rivals are kept for the picture


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits (V,) -> (V,): what the next token is drawn from. top_k 0 and top_p 1 keep every token."""
    p = (logits / temperature).softmax(dim=-1)
    order = p.argsort(descending=True)  # the most probable token first
    if top_k:
        p[order[top_k:]] = 0
        p = p / p.sum()
    before = p[order].cumsum(dim=-1) - p[order]  # for each token: what the more probable ones hold together
    if top_p < 1:
        p[order[before >= top_p]] = 0
    return p / p.sum()


def draw(p: Tensor, uniform: float) -> int:
    """Lays the probabilities (V,) side by side from 0 to 1: the token on whose piece `uniform` falls."""
    return int(torch.searchsorted(p.double().cumsum(dim=-1), uniform, right=True).clamp(max=len(p) - 1))


def best(p: Tensor, tokenizer, n: int = 5) -> list[tuple[str, float]]:
    return [(tokenizer.decode([i]), round(p[i].item(), 4)) for i in p.topk(n).indices.tolist()]


def shown(pairs: list[tuple[str, float]]) -> str:
    return "   ".join(f"{token!r} {p:.1%}" for token, p in pairs)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a weights file of the project")
    parser.add_argument("--text", required=True)
    args = parser.parse_args(argv)

    with user_errors():
        model, tokenizer, _ = load_model(args.weight)
    model.eval()
    logits = trace(model, encode_document(tokenizer, args.text)[:-1]).logits[-1]  # (V,), after the last token
    result = {"best": [], "perplexity": [], "kept": [], "drawn": [], "texts": [], "path": []}

    print(f"after {args.text!r}: the five most probable of {len(logits):,} tokens; last, e^entropy")
    for temperature in TEMPERATURES:
        p = probabilities(logits, temperature)
        result["best"].append(best(p, tokenizer))
        result["perplexity"].append(torch.special.entr(p).sum().exp().item())
        print(f"temperature {temperature:g}: {shown(result['best'][-1])}   {result['perplexity'][-1]:,.1f}")

    print("\nat temperature 1: tokens kept, and by hand - the sampler's own")
    for options in FILTERS:
        p = probabilities(logits, **options)
        ours = filtered(logits.unsqueeze(0), [SamplingParams(**options)])[0].softmax(dim=-1)
        name, kept, apart = ", ".join(f"{k} {v}" for k, v in options.items()) or "all", int((p > 0).sum()), p - ours
        result["kept"].append({"filter": name, "tokens": kept, "difference": apart.abs().max().item()})
        print(f"{name:<20} {kept:>6,} tokens   at most {apart.abs().max().item():.0e} apart")

    rng, p = random.Random(1), probabilities(logits)
    counts = Counter(draw(p, rng.random()) for _ in range(DRAWS))
    print(f"\n{DRAWS:,} draws, and what the probability says")
    for token in p.topk(5).indices.tolist():
        result["drawn"].append((tokenizer.decode([token]), counts[token]))
        print(f"{tokenizer.decode([token])!r:<12} {counts[token]:>5}   {p[token].item() * DRAWS:6.1f}")
    others = sum(n for token, n in counts.items() if token not in p.topk(TAIL).indices)
    result["tail"] = others / DRAWS
    print(f"{others} draws outside the best {TAIL}, of {len(p):,} tokens")

    print("\nthree texts each")
    engine = Engine(model, tokenizer)
    for options in WRITTEN:
        params = SamplingParams(max_tokens=MAX_TOKENS, n=SAMPLES, seed=1, **options)
        result["texts"].append([c.text for c in engine.generate([args.text], params)])
        name = ", ".join(f"{k} {v:g}" for k, v in options.items())
        for text in result["texts"][-1]:
            print(f"{name:<27} {args.text + text!r}")
    path = engine.generate([args.text], SamplingParams(max_tokens=PATH, temperature=0, logprobs=5))[0].logprobs
    for at in path:
        rivals = [(tokenizer.decode([i]), round(math.exp(x), 4)) for i, x in at.top]
        result["path"].append({"token": tokenizer.decode([at.token]), "best": rivals})
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    run_main(main)
