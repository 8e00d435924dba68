"""A language model without a network: count which character follows, then continue a text by the counts.

    python docs/course/code/next_char.py --data_path dataset/sample/pretrain.jsonl --text 中国的首都是

Prints, for contexts of one character, two characters and so on, how the next character is distributed, and continues
the text. Pure Python, nothing to install. The last line is a JSON object.
"""

import argparse
import json
import random
from collections import Counter, defaultdict


def read_texts(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def count_next(texts: list[str], length: int) -> dict[str, Counter]:
    """For each context of `length` characters, how often each character follows it."""
    following = defaultdict(Counter)
    for text in texts:
        for i in range(len(text) - length):
            following[text[i : i + length]][text[i + length]] += 1
    return following


def continue_text(following: dict[str, Counter], text: str, length: int, steps: int, rng: random.Random) -> str:
    """Draws one character after the other, each from the counts of its context; stops at a context never seen."""
    for _ in range(steps):
        counts = following.get(text[-length:])
        if not counts:
            break
        text += rng.choices(list(counts), weights=list(counts.values()))[0]
    return text


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help='rows of {"text": ...}')
    parser.add_argument("--text", required=True, help="the beginning to continue")
    parser.add_argument("--longest", type=int, default=6, help="characters of context in the last table (6)")
    parser.add_argument("--steps", type=int, default=40, help="characters to draw (40)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    texts = read_texts(args.data_path)
    held_out, training = texts[::20], [text for i, text in enumerate(texts) if i % 20]
    result = {"characters": sum(map(len, training)), "contexts": {}, "seen": {}, "choices": {}}
    print(f"{len(training)} texts, {result['characters']:,} characters; {len(held_out)} texts held out")
    for length in range(1, args.longest + 1):
        following = count_next(training, length)
        places = [text[i : i + length] for text in held_out for i in range(len(text) - length)]
        result["contexts"][length] = len(following)
        result["seen"][length] = sum(place in following for place in places) / len(places)
        counts = following.get(args.text[-length:], Counter())
        result["choices"][length] = len(counts)
        best = "  ".join(f"{char!r} {n / counts.total():.0%}" for char, n in counts.most_common(5))
        print(f"\ncontext of {length}: {len(following):,} different ones, "
              f"{result['seen'][length]:.0%} of those in held-out texts among them")  # fmt: skip
        print(f"  after {args.text[-length:]!r}: {best or 'never seen'}")
        print(
            "  " + continue_text(following, args.text, length, args.steps, random.Random(args.seed)).replace("\n", " ")
        )
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
