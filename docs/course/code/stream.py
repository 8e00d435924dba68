"""Follows one text through a model: the embedding, what each layer adds to the residual stream, what it would guess.

    python docs/course/code/stream.py --weight out/course/pretrain_160.pth --text 夏至是夏 --near 三 北京

For the last token it prints the length of the stream and of what attention and feed-forward add to it, and which token
the head would choose if the model ended there. Then, for each text of --near, the tokens whose embeddings point most
nearly the same way. The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from common.errors import run_main, user_errors
from inspection.embeddings import neighbours
from inspection.trace import Trace, trace
from model.tokenizer import encode_document, encode_text
from model.weights import load_model


def written(traced: Trace) -> list[tuple[str, Tensor]]:
    """All that is written into the stream of the last token, in order: (what wrote it, (D,))."""
    parts = [("embedding", traced.residuals[0, -1])]
    for i, (attended, fed) in enumerate(zip(traced.attended, traced.fed, strict=True)):
        parts += [(f"layer {i} attention", attended[-1]), (f"layer {i} feed-forward", fed[-1])]
    return parts


@torch.no_grad()
def guess(model, stream: Tensor) -> tuple[int, float]:
    """The token that the head would choose for this stream (D,), and its probability."""
    p = model.lm_head(model.model.norm(stream)).softmax(dim=-1)  # (V,)
    best = p.argmax().item()
    return best, p[best].item()


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a weights file of the project")
    parser.add_argument("--text", required=True)
    parser.add_argument("--near", nargs="+", default=[], help="texts whose first token's neighbours are shown")
    args = parser.parse_args(argv)

    with user_errors():
        model, tokenizer, _ = load_model(args.weight)
    config = model.config
    ids = encode_document(tokenizer, args.text)[:-1]  # a document that has begun and not yet ended
    print(f"text: {args.text}   tokens: {' | '.join(tokenizer.decode([i]) for i in ids)}")
    print(f"ids ({len(ids)},) -> embedding ({len(ids)}, {config.dim}) -> {config.n_layers} layers, each "
          f"({len(ids)}, {config.dim}) -> logits ({len(ids)}, {config.vocab_size})")  # fmt: skip
    traced = trace(model, ids)
    print(f"\n{'what is added':<22} {'its length':>10} {'stream':>8}   guess")
    stream, steps = torch.zeros(config.dim), []
    for name, update in written(traced):
        stream = stream + update
        token, p = guess(model, stream)
        steps.append({"name": name, "added": update.norm().item(), "stream": stream.norm().item(),
                      "guess": tokenizer.decode([token]), "p": p})  # fmt: skip
        print(f"{name:<22} {steps[-1]['added']:10.2f} {steps[-1]['stream']:8.2f}   {steps[-1]['guess']!r} {p:.0%}")
    difference = (stream - traced.residuals[-1, -1]).abs().max().item()
    print(f"embedding + all additions - what leaves the last layer: at most {difference:.0e}\n")
    near = {}
    for text in args.near:
        near[text] = [tokenizer.decode([x.token]) for x in neighbours(model, encode_text(tokenizer, text)[0], 6)]
        print(f"near {text}: {'  '.join(near[text])}")
    print(json.dumps({"difference": difference, "steps": steps, "near": near}, ensure_ascii=False))
    return {"difference": difference, "steps": steps, "near": near}


if __name__ == "__main__":
    run_main(main)
