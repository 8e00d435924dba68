"""Byte-pair encoding in a page: learn merges from text, then watch them put a word together.

    python docs/course/code/bpe.py --data_path dataset/sample/pretrain.jsonl --merges 1000 --word 太阳系

The project's own vocabularies are learned by the tokenizers library (model/vocabulary.py), which does the same, faster;
a test compares the two. Here a text is cut at anything that is not a letter, which is simpler than the library's rule.
The last line is a JSON object.
"""

import argparse
import json
import re
from collections import Counter


def read_pieces(path: str) -> Counter:
    """How often each piece of text occurs: letters that stand together, or one other character."""
    pieces = Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            pieces.update(re.findall(r"[^\W\d_]+|.", json.loads(line)["text"]))
    return pieces


def merge(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The tokens with every occurrence of the pair made one token."""
    merged, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(tokens[i] + tokens[i + 1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def learn_merges(pieces: Counter, n_merges: int):
    """The merges in their order, each with how often its pair occurred when it was chosen; and all pieces as tokens."""
    words = [([bytes([b]) for b in piece.encode()], count) for piece, count in pieces.items()]
    pairs = Counter()  # pair of neighbours: how often it occurs in the text
    for tokens, count in words:
        for pair in zip(tokens, tokens[1:]):
            pairs[pair] += count
    merges = []
    while len(merges) < n_merges and (best := max(pairs, key=pairs.get, default=None)) and pairs[best]:
        merges.append((best, pairs[best]))
        for i, (tokens, count) in enumerate(words):
            if best[0] not in tokens:  # most words have nothing to merge
                continue
            merged = merge(tokens, best)
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] -= count
            for pair in zip(merged, merged[1:]):
                pairs[pair] += count
            words[i] = (merged, count)
    return merges, words


def encode_steps(word: str, merges: list[tuple[bytes, bytes]]) -> list[list[bytes]]:
    """The word as bytes, then after each merge that changes it: always the earliest learned of those that apply."""
    rank = {pair: i for i, pair in enumerate(merges)}
    steps = [[bytes([b]) for b in word.encode()]]
    while known := [pair for pair in zip(steps[-1], steps[-1][1:]) if pair in rank]:
        steps.append(merge(steps[-1], min(known, key=rank.get)))
    return steps


def shown(token: bytes) -> str:
    """A token as text, or as hexadecimal bytes where it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return token.hex(" ").upper()


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help='rows of {"text": ...}')
    parser.add_argument("--merges", type=int, default=1000)
    parser.add_argument("--word", required=True, help="the word to put together")
    args = parser.parse_args(argv)

    pieces = read_pieces(args.data_path)
    print(f"{len(pieces):,} different pieces, {sum(len(p.encode()) * n for p, n in pieces.items()):,} bytes")
    learned, words = learn_merges(pieces, args.merges)
    for i, ((left, right), count) in enumerate(learned, 1):
        if i <= 8 or i in (16, 64, 256) or i == len(learned):
            print(f"merge {i:5}: {shown(left)} + {shown(right)} -> {shown(left + right)}   ({count:,} times)")
    merges = [pair for pair, _ in learned]
    steps = [[shown(token) for token in step] for step in encode_steps(args.word, merges)]
    for step in steps:
        print(" | ".join(step))
    tokens = sum(len(tokens) * count for tokens, count in words)
    characters = sum(len(piece) * count for piece, count in pieces.items())
    result = {"merges": len(merges), "vocabulary": 256 + len(merges), "characters_per_token": characters / tokens,
              "steps": steps}  # fmt: skip
    print(f"vocabulary of {result['vocabulary']}: {result['characters_per_token']:.2f} characters a token")
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    main()
