"""Near copies by hand: shingles, their Jaccard similarity, and MinHash's estimate of it.

    python docs/course/code/copies.py --data_path docs/course/code/dirty.jsonl

The last line is a JSON object.
"""

import argparse
import json
import random
import zlib

PRIME = 2**61 - 1


def shingles(text: str) -> set[str]:
    """All runs of three characters, without spaces and marks."""
    plain = "".join(filter(str.isalnum, text.lower()))
    return {plain[i : i + 3] for i in range(max(len(plain) - 2, 1))}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def minhash(items: set[str], functions: list[tuple[int, int]]) -> list[int]:
    """For each hash function the smallest value that an item of the set has."""
    values = [zlib.crc32(item.encode()) for item in items]
    return [min((a * x + b) % PRIME for x in values) for a, b in functions]


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help='rows of {"text": ...}')
    parser.add_argument("--functions", type=int, default=160, help="hash functions of a signature (160)")
    args = parser.parse_args(argv)
    rng = random.Random(0)
    functions = [(rng.randrange(1, PRIME), rng.randrange(PRIME)) for _ in range(args.functions)]
    with open(args.data_path, encoding="utf-8") as file:
        texts = [json.loads(line).get("text", "") for line in file]
    sets = {number: shingles(text) for number, text in enumerate(texts, start=1) if len(text) > 64}
    signatures = {number: minhash(items, functions) for number, items in sets.items()}
    print(f"{len(sets)} texts of more than 64 characters; a signature is {args.functions} numbers, whatever the length")
    print("lines   shingles in both / in either   similarity   MinHash")
    pairs = []
    for a in sets:
        for b in (b for b in sets if b > a):
            estimate = sum(x == y for x, y in zip(signatures[a], signatures[b], strict=True)) / args.functions
            pairs.append((jaccard(sets[a], sets[b]), estimate, a, b))
    for similarity, estimate, a, b in sorted(pairs, reverse=True)[:6]:
        common, either = len(sets[a] & sets[b]), len(sets[a] | sets[b])
        print(f"{a:2}, {b:2}  {common:16} / {either:<14}  {similarity:8.2f}  {estimate:8.2f}")
    similarity, estimate, a, b = next(pair for pair in sorted(pairs, reverse=True) if pair[0] < 1)
    result = {"functions": args.functions, "near": [a, b], "similarity": similarity, "estimate": estimate}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
