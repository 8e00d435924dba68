"""Held-out bits per byte of one model at 1, 2 and 4 times the length it was trained on, with and without scaling.

The same tokens are predicted at each length, a quarter of the trained length of them; the lengths differ in how much
text stands before them. `linear` and `yarn` take the factor of the length.
"""

import copy
import json
import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from data.rows import token_bytes
from inference.open_model import stretch
from model.model import MiniMindForCausalLM
from model.tokenizer import encode_document
from model.weights import load_model
from model.weights_file import newest_weights
from trainer.losses import learned_bytes

FACTORS = (1, 2, 4)


def add_flags(parser) -> None:
    parser.add_argument("--weight", metavar="PATH", help="model (the newest pretrain_* in out/)")
    parser.add_argument("--data_path", required=True, metavar="FILE", help="documents no run has seen, {'text'} rows")
    parser.add_argument("--trained_length", type=int, default=512, metavar="TOKENS", help="(%(default)s)")
    parser.add_argument("--windows", type=int, default=40, help="of the longest length (%(default)s)")


def windows_of(path, tokenizer, length: int, count: int) -> torch.Tensor:
    """(count, length): the beginnings of documents that are long enough, shorter ones joined to their neighbours."""
    found, ids = [], []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        ids += encode_document(tokenizer, json.loads(line)["text"])
        if len(ids) >= length:
            found.append(ids[:length])
            ids = []
        if len(found) == count:
            break
    return torch.tensor(found)


def bits_per_byte(model, windows: torch.Tensor, length: int, learned: int, table) -> float:
    """Of each window's last `learned` tokens, read after as many before them as make up `length`."""
    nats, n_bytes = 0.0, 0
    with torch.inference_mode():
        for window in windows:
            ids = window[None, -length:]
            logits = model(ids).logits[0, -learned - 1 : -1].float()
            nats += cross_entropy(logits, ids[0, -learned:], reduction="sum").item()
            n_bytes += int(learned_bytes(ids[:, -learned - 1 :], table))
    return nats / math.log(2) / n_bytes


def run(args) -> dict:
    weights, trained = args.weight or newest_weights("out", want="pretrain"), args.trained_length
    model, tokenizer, _ = load_model(weights)
    windows = windows_of(args.data_path, tokenizer, trained * max(FACTORS), args.windows)
    table, result = token_bytes(tokenizer), {}
    for factor in FACTORS:
        for kind in ("none",) if factor == 1 else ("none", "linear", "yarn"):
            config = copy.deepcopy(model.config)
            config.max_position_embeddings = factor * trained
            if kind != "none":
                stretch(config, kind, factor, trained)
            scaled = MiniMindForCausalLM(config).eval()
            scaled.load_state_dict(model.state_dict())
            name = f"{factor * trained} {kind}"
            result[name] = bits_per_byte(scaled, windows, factor * trained, trained // 4, table)
            print(f"{factor * trained:>6} tokens, scaling {kind:<6} {result[name]:.4f} bits per byte", flush=True)
    return {"weights": str(weights), "windows": len(windows), "bits_per_byte": result}
