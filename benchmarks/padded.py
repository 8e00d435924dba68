"""Pretraining by MiniMind's recipe, for comparison: a document a row, cut at 340 tokens and padded; AdamW; no warmup.

    python -m benchmarks.padded --data_path FILE... --steps 500 --learning_rate 5e-4

Its facts are those of MiniMind's third version: rows of 340 slots, AdamW with betas 0.9 and 0.999 and decay 0.01 on
everything, the rate falling by half a cosine to a tenth, gradients clipped at 1. The network, the vocabulary and the
validation are ours, so that nothing but the recipe differs. Prints one JSON object with the curve of held-out bits per
byte.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.stages import loss_on
from data.rows import IGNORED, TextRows, split_documents, token_bytes
from data.token_cache import tokenised
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from trainer.optimizers import learning_rate_factor

CUT, ROWS = 340, 32


def padded_rows(documents) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents (arrays of ids) -> ids and labels, (B, CUT): cut at CUT tokens, the rest padding without a label."""
    ids = torch.zeros(len(documents), CUT, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, document in enumerate(documents):
        tokens = torch.from_numpy(document[:CUT].astype(np.int64))
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
    return ids, labels


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", nargs="+", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", type=int, default=8, help="validations, evenly spread")
    parser.add_argument("--val_split", type=float, default=0.01)
    parser.add_argument("--shape", type=json.loads, help="fields of LMConfig, as JSON")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer()
    caches = [tokenised(path, "text", tokenizer, args.cache) for path in args.data_path]
    train, val = split_documents(caches, args.val_split)
    held_out = TextRows(caches, val, 512, args.seed, training=False)
    documents = [cache.tokens[b:e] for cache in caches for b, e in pairwise(cache.offsets)]  # memory-mapped
    model, table = MiniMindForCausalLM(LMConfig(**args.shape)), token_bytes(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, fused=True)
    order, curve, slots, tokens = np.empty(0, np.int64), [], 0, 0
    random = np.random.default_rng(args.seed)
    for step in range(args.steps):
        if len(order) < ROWS:  # the next epoch, in another order
            order = np.concatenate([order, random.permutation(train)])
        ids, labels = padded_rows([documents[i] for i in order[:ROWS]])
        order = order[ROWS:]
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step, args.steps, 0, "cosine")
        model.train()
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        slots, tokens = slots + ids.numel(), tokens + int((labels != IGNORED).sum())
        # Validated at the same share of its steps as ours is, so both spend the same on it.
        if (step + 1) * args.points // args.steps > step * args.points // args.steps:
            curve.append([step + 1, loss_on(model.eval(), held_out, table)["bits_per_byte"]])
            print(f"step {step + 1}/{args.steps}  val_bits_per_byte {curve[-1][1]:.4f}", flush=True)
    result = {"steps": args.steps, "slots": slots, "tokens": tokens, "real_token_share": tokens / slots, "curve": curve}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
