"""Follows one text through a model: the embedding, what each layer adds to the residual stream, and what it would guess.

    python docs/course/code/stream.py --weight out/course/pretrain_160.pth --text 中国的首都是 --near 三 北京

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
import torch.nn.functional as F

from model.tokenizer import encode_text
from model.weights import load_model


@torch.no_grad()
def follow(model, ids: list[int]) -> tuple[list[tuple[str, torch.Tensor]], torch.Tensor]:
    """What is written into the stream at the last position, in order, (name, (D,)); and what leaves the last layer."""
    written, decoder = [], model.model

    def write_down(name):
        def hook(module, inputs, output):
            update = output[0] if isinstance(output, tuple) else output  # experts return their balance loss too
            written.append((name, update[0, -1]))

        return hook

    handles = [decoder.embed_tokens.register_forward_hook(write_down("embedding"))]
    for i, layer in enumerate(decoder.layers):
        handles.append(layer.self_attn.register_forward_hook(write_down(f"layer {i} attention")))
        handles.append(layer.mlp.register_forward_hook(write_down(f"layer {i} feed-forward")))
    before_norm = []
    handles.append(decoder.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0][0, -1])))
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return written, before_norm[0]


@torch.no_grad()
def guess(model, stream: torch.Tensor) -> tuple[int, float]:
    """The token that the head would choose for this stream (D,), and its probability."""
    p = F.softmax(model.lm_head(model.model.norm(stream)), dim=-1)  # (V,)
    best = p.argmax().item()
    return best, p[best].item()


@torch.no_grad()
def neighbours(model, ids: list[int], n: int) -> list[tuple[int, float]]:
    """The n tokens whose embeddings have the largest cosine with that of the (first) token of ids."""
    E = F.normalize(model.model.embed_tokens.weight, dim=-1)  # (V, D), every row of length 1
    cosine = E @ E[ids[0]]  # (V,)
    cosine[ids[0]] = -1  # itself
    best = cosine.topk(n)
    return list(zip(best.indices.tolist(), best.values.tolist()))


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a weights file of the project")
    parser.add_argument("--text", required=True)
    parser.add_argument("--near", nargs="+", default=[], help="texts whose first token's neighbours are shown")
    args = parser.parse_args(argv)

    model, tokenizer, _ = load_model(args.weight)
    model.eval()
    ids = encode_text(tokenizer, args.text)
    config = model.config
    print(f"text: {args.text}   tokens: {' | '.join(tokenizer.decode([i]) for i in ids)}")
    print(f"ids ({len(ids)},) -> embedding ({len(ids)}, {config.dim}) -> {config.n_layers} layers, each "
          f"({len(ids)}, {config.dim}) -> logits ({len(ids)}, {config.vocab_size})")  # fmt: skip
    written, final = follow(model, ids)
    print(f"\n{'what is added':<22} {'its length':>10} {'stream':>8}   guess")
    stream, steps = torch.zeros(config.dim), []
    for name, update in written:
        stream = stream + update
        token, p = guess(model, stream)
        steps.append({"name": name, "added": update.norm().item(), "stream": stream.norm().item(),
                      "guess": tokenizer.decode([token]), "p": p})  # fmt: skip
        print(f"{name:<22} {steps[-1]['added']:10.2f} {steps[-1]['stream']:8.2f}   {steps[-1]['guess']!r} {p:.0%}")
    difference = (stream - final).abs().max().item()
    print(f"embedding + all additions - what leaves the last layer: at most {difference:.0e}\n")
    near = {}
    for text in args.near:
        near[text] = [tokenizer.decode([i]) for i, _ in neighbours(model, encode_text(tokenizer, text), 6)]
        print(f"near {text}: {'  '.join(near[text])}")
    print(json.dumps({"difference": difference, "steps": steps, "near": near}, ensure_ascii=False))
    return {"difference": difference, "steps": steps, "near": near}


if __name__ == "__main__":
    main()
