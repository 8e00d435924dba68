"""Bits per byte by hand: on the documents that a run held out, beside other ways to guess the same text.

    python docs/course/code/bits.py --weight out/course/watch_160.pth --data_path dataset/sample/pretrain.jsonl \
        --val_split 0.05

--val_split must be the run's own, so that the same documents are held out. The last line is a JSON object.
"""

import argparse
import json
import lzma
import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common.errors import run_main, user_errors
from data.rows import split_documents
from data.token_cache import tokenised
from model.weights import load_model


@torch.no_grad()
def nats(model, ids: list[int]) -> list[float]:
    """-log p of each token but the first, given all before it."""
    log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)  # (T - 1, V)
    return (-log_p.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).flatten()).tolist()


def bits_per_byte(total_nats: float, texts: list[str]) -> float:
    return total_nats / math.log(2) / sum(len(text.encode()) for text in texts)


def by_frequency(train: list[list[int]], held_out: list[list[int]], vocabulary: int) -> float:
    """Nats of the held-out tokens, told only how often each token occurs (1 is added to each count)."""
    counts = Counter(token for ids in train for token in ids[1:])
    total = sum(counts.values()) + vocabulary
    return -sum(math.log((counts[token] + 1) / total) for ids in held_out for token in ids[1:])


def by_pairs(train: list[str], texts: list[str]) -> float:
    """Chapter 0's counting with one character of context; 1 is added to each count: nothing is impossible."""
    characters = len(set("".join(train + texts)))
    pairs, firsts = Counter(), Counter()
    for text in train:
        pairs.update(zip(text, text[1:]))
        firsts.update(text[:-1])
    p = [(pairs[a, b] + 1) / (firsts[a] + characters) for text in texts for a, b in zip(text, text[1:])]
    return bits_per_byte(-sum(map(math.log, p)), texts)


def by_compression(train: list[str], texts: list[str]) -> float:
    """The bits that xz needs more for training and held-out text together than for the training text alone."""
    sizes = [len(lzma.compress("\n".join(part).encode(), preset=9)) for part in (train, train + texts)]
    return (sizes[1] - sizes[0]) * 8 / sum(len(text.encode()) for text in texts)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True)
    parser.add_argument("--data_path", required=True, help="what it was trained on")
    parser.add_argument("--val_split", type=float, required=True, help="as in the run")
    args = parser.parse_args(argv)
    with user_errors():
        model, tokenizer, record = load_model(args.weight)
    model.eval()
    cache = tokenised(args.data_path, "text", tokenizer, Path(args.weight).parent / "cache", False)
    documents = [cache.tokens[a:b].tolist() for a, b in zip(cache.offsets, cache.offsets[1:])]
    train, held_out = ([documents[i] for i in part] for part in split_documents([cache], args.val_split))
    train_texts, texts = ([tokenizer.decode(ids[1:-1]) for ids in part] for part in (train, held_out))

    found = [nats(model, ids) for ids in held_out]
    total, tokens = sum(map(sum, found)), sum(map(len, found))
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents held out: {tokens:,} tokens to guess, {n_bytes:,} bytes")
    own = record["result"]
    print(f"loss {total:,.1f} nats / {tokens:,} tokens = {total / tokens:.4f}; the run's own: {own['val_loss']:.4f}")
    bits = bits_per_byte(total, texts)
    print(f"{total:,.1f} / ln 2 / {n_bytes:,} bytes = {bits:.4f} bits a byte; the run's own: "
          f"{own['val_bits_per_byte']:.4f}")  # fmt: skip
    frequency = by_frequency(train, held_out, len(tokenizer))
    others = {"frequency": bits_per_byte(frequency, texts), "pairs": by_pairs(train_texts, texts),
              "xz": by_compression(train_texts, texts)}  # fmt: skip
    print("\nbits a byte of the same text")
    print("  8.00  knows nothing: all 256 bytes alike")
    print(f"  {others['frequency']:.2f}  knows how often each token occurs: loss {frequency / tokens:.2f}")
    print(f"  {others['pairs']:.2f}  counted pairs of characters (chapter 0)")
    print(f"  {others['xz']:.2f}  xz, which may look back at the training text")
    print(f"  {bits:.2f}  this model")

    chosen = next((i for i, text in enumerate(texts) if text.startswith("问")), 0)
    print("\nbits of each token in the first of these documents that begins with a question")
    spent = [x / math.log(2) for x in found[chosen]]
    # A token that is a part of a character only is shown as a dot.
    words = [tokenizer.decode([i]).replace("\ufffd", "·") for i in held_out[chosen][1:]]
    for i in range(0, len(spent), 6):
        line = zip(words[i : i + 6], spent[i : i + 6], strict=True)
        print("  " + "   ".join(f"{word!r} {bits_of:.1f}" for word, bits_of in line))
    result = {
        "loss": total / tokens, "bits": bits, "own": own["val_bits_per_byte"], "tokens": tokens, "bytes": n_bytes,
        "others": others, "frequency": frequency / tokens, "bytes_per_token": n_bytes / tokens,
        "sure": sum(x < 0.1 * math.log(2) for document in found for x in document) / tokens,  # below a tenth of a bit
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
