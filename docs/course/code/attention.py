"""Attention of one layer by hand, beside what the model computes: scores, mask, softmax, weighted sum.

    python docs/course/code/attention.py --weight out/course/pretrain_160.pth --text 问：法国的首都是哪里？答：

Prints the shapes, the largest difference between the two, where each token of one head looks, what changes when the
last token is another one, and how much memory keys and values take. The last line is a JSON object.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from common.errors import run_main, user_errors
from inspection.trace import trace
from model.attention import rotate
from model.tokenizer import encode_document
from model.weights import load_model


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (H, T, h), k and v (G, T, h) -> scores (H, T, T), weights (H, T, T), what each head reads (H, T, h)."""
    H, T, h = q.shape
    k, v = (x.repeat_interleave(H // len(x), dim=0) for x in (k, v))  # H / G query heads share a key/value head
    scores = q @ k.transpose(-1, -2) / math.sqrt(h)  # row t: how well the key of each token fits the query of token t
    future = torch.ones(T, T, dtype=torch.bool).triu(1)  # True above the diagonal: tokens that have not come yet
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)  # each row sums to 1
    return scores, weights, weights @ v


@torch.no_grad()
def queries_keys_values(model, stream: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """What layer `layer` makes of the residual stream (T, D) that enters it: q (H, T, h), k and v (G, T, h)."""
    block = model.model.layers[layer]
    x = block.input_layernorm(stream)
    q, k, v = (
        projection(x).unflatten(-1, (-1, model.config.head_dim)).transpose(0, 1)
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    )
    cos, sin = (x[0] for x in model.model.rotary_emb(torch.arange(len(stream)).unsqueeze(0), stream.dtype))
    return rotate(q, cos, sin), rotate(k, cos, sin), v  # positions: chapter 5


def cache_bytes(config, kv_heads: int, tokens: int) -> int:
    """Memory of the keys and values of `tokens` tokens in all layers, 2 bytes a number."""
    return 2 * config.n_layers * kv_heads * config.head_dim * tokens * 2


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a weights file of the project")
    parser.add_argument("--text", required=True)
    parser.add_argument("--layer", type=int, default=0, help="which layer, from 0 (0)")
    parser.add_argument("--head", type=int, default=0, help="which of its query heads, from 0 (0)")
    args = parser.parse_args(argv)

    with user_errors():
        model, tokenizer, _ = load_model(args.weight)
    model.eval()
    config, ids = model.config, encode_document(tokenizer, args.text)[:-1]  # a document that has begun
    tokens = [tokenizer.decode([i]) for i in ids]
    traced = trace(model, ids)
    q, k, v = queries_keys_values(model, traced.residuals[args.layer], args.layer)
    print(f"q {tuple(q.shape)}   k {tuple(k.shape)}   v {tuple(v.shape)}: heads, tokens, width")

    scores, weights, read = attend_by_hand(q, k, v)
    joined = read.transpose(0, 1).flatten(1)  # (T, H h): what the heads read, side by side
    with torch.no_grad():
        written = model.model.layers[args.layer].self_attn.o_proj(joined)  # (T, D)
    difference = (written - traced.attended[args.layer]).abs().max().item()
    print(f"by hand - the model's own: at most {difference:.0e}")

    print(f"\nlayer {args.layer}, head {args.head}: where each token looks, in percent")
    for token, row in zip(tokens, weights[args.head], strict=True):
        seen = "".join(f"{weight:6.0%}" for weight in row.tolist()[: len(tokens)])
        print(f"{seen}   {token}")
    with torch.no_grad():
        other = model(torch.tensor([[*ids[:-1], ids[0]]])).logits[0]
    changed = (other - traced.logits).abs().amax(dim=-1)  # (T,)
    print("\nwith another last token the logits after each token change by")
    print("  ".join(f"{token} {change:.2f}" for token, change in zip(tokens, changed.tolist(), strict=True)))

    kept = {G: cache_bytes(config, G, 2048) for G in (config.n_heads, config.n_kv_heads, 1)}
    print("\nkeys and values of 2,048 tokens: " + ", ".join(f"{G} KV heads {n / 1e6:.1f} MB" for G, n in kept.items()))
    result = {"tokens": tokens, "difference": difference, "scores": rounded(scores[args.head]),
              "weights": rounded(weights[args.head]), "changed": rounded(changed)}  # fmt: skip
    print(json.dumps(result, ensure_ascii=False))
    return result


def rounded(x: Tensor) -> list:
    return x.double().mul(1e4).round().div(1e4).tolist()  # in double: 0.1234 is written as 0.1234


if __name__ == "__main__":
    run_main(main)
