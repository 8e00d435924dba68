"""Writes the same text with and without a KV cache, and says what each costs.

    python docs/course/code/cache.py --weight out/course/pretrain_160.pth --text 问：法国的首都是哪里？答： --tokens 400

Prints whether both write the same tokens, how many tokens went through the layers, how many products of a query and a
key attention made, and the processor's seconds. The last line is a JSON object.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from common.errors import run_main, user_errors
from model.compat import CACHE
from model.tokenizer import encode_document
from model.weights import load_model


class SimpleCache:
    """Keys and values of all tokens so far, a pair of tensors for each layer. Attention calls update()."""

    def __init__(self):
        self.kept = {}  # layer -> keys and values, (1, G, S, h) each

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """k, v (1, G, T, h) of the new tokens -> those of all S tokens so far."""
        if layer in self.kept:
            old_k, old_v = self.kept[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.kept[layer] = k, v
        return k, v


def step(model, new: list[int], past: int, cache: SimpleCache | None) -> Tensor:
    """Runs `new` tokens, which stand after `past` tokens in the cache -> the logits (V,) after the last of them."""
    position = torch.arange(past, past + len(new))
    hidden = torch.arange(past + len(new)) > position.unsqueeze(-1)  # (T, S): later tokens
    mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    out = model(torch.tensor([new]), attention_mask=mask[None, None], position_ids=position.unsqueeze(0),
                use_cache=cache is not None, logits_to_keep=1, **{CACHE: cache})  # fmt: skip
    return out.logits[0, -1]


@torch.no_grad()
def write(model, ids: list[int], n: int, cached: bool):
    """Appends the best token n times -> ids, and after each step (tokens through the layers, q k products, seconds)."""
    ids, cache, costs = list(ids), SimpleCache() if cached else None, []
    tokens = products = 0
    past, begin = 0, time.process_time()
    for _ in range(n):
        new = ids[past:]  # without a cache: the whole text, every time
        logits = step(model, new, past, cache)
        tokens, products = tokens + len(new), products + len(new) * len(ids)
        past = len(ids) if cached else 0
        ids.append(int(logits.argmax()))
        costs.append((tokens, products, time.process_time() - begin))
    return ids, costs


def bytes_of(cache_tokens: int, config, bytes_a_number: int = 4) -> int:
    """Memory of the keys and values of so many tokens in all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * cache_tokens * bytes_a_number


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a weights file of the project")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=400, help="tokens to write (400)")
    args = parser.parse_args(argv)

    with user_errors():
        model, tokenizer, _ = load_model(args.weight)
    model.eval()
    ids = encode_document(tokenizer, args.text)[:-1]
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    write(model, ids, 8, cached=True)  # torch prepares its kernels at the first passes
    texts, costs = {}, {}
    for name, cached in (("without", False), ("with", True)):
        texts[name], costs[name] = write(model, ids, args.tokens, cached)
    same = sum(a == b for a, b in zip(texts["without"], texts["with"], strict=True)) - len(ids)
    print(f"{len(ids)} tokens of prompt, {args.tokens} new; the same with and without a cache: {same}")

    print("\n  new   tokens through the layers       q k products a head     CPU seconds")
    print("tokens    without        with         without        with   without   with")
    marks = [n for n in (1, 50, 100, 200, 400, 800) if n <= args.tokens]
    table = {}
    for n in marks:
        (t0, p0, s0), (t1, p1, s1) = costs["without"][n - 1], costs["with"][n - 1]
        table[n] = {"tokens": [t0, t1], "products": [p0, p1], "seconds": [round(s0, 2), round(s1, 2)]}
        print(f"{n:>6} {t0:>10,} {t1:>11,} {p0:>15,} {p1:>11,} {s0:>9.2f} {s1:>6.2f}")
    memory = bytes_of(len(ids) + args.tokens, model.config)
    print(f"\nkeys and values of {len(ids) + args.tokens} tokens, 4 bytes a number: {memory / 1e6:.2f} MB")
    curve = {name: [(tokens, round(s, 3)) for tokens, _, s in cost[9::10]] for name, cost in costs.items()}
    result = {"prompt": len(ids), "same": same, "table": table, "memory": memory, "curve": curve}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
