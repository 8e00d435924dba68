"""Rotary positions: why attention needs them, and why only the distance of two tokens counts afterwards.

    python docs/course/code/rotation.py --preset minimind2-small

A query and keys of one head are drawn at random. Without rotation attention cannot tell the order of the keys; with it,
a score depends on how far apart query and key are, not on where they are. The last line is a JSON object.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from model.attention import inverse_frequencies, rotate
from model.LMConfig import LMConfig


def placed(x: Tensor, positions: list[int], frequency: Tensor) -> Tensor:
    """x (T, h), each row rotated by its position's angles."""
    angle = torch.tensor(positions).unsqueeze(-1) * frequency  # (T, h/2)
    return rotate(x, angle.cos(), angle.sin())


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, help="the model whose head width and base are used")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    config = LMConfig.from_preset(args.preset)
    h, (frequency, _) = config.head_dim, inverse_frequencies(config)
    turn = [2 * math.pi / f for f in frequency.tolist()]
    print(f"a head of {h} numbers: {h // 2} points; a full turn takes")
    for i in (0, 1, h // 8, h // 4, h // 2 - 1):
        print(f"  point {i:2}: {turn[i]:12,.1f} tokens   ({math.degrees(frequency[i].item()):9.5f} degrees a token)")

    q, k, v = torch.randn(1, h), torch.randn(4, h), torch.randn(4, h)
    order = [2, 0, 3, 1]

    def read(q, k, v):
        return (q @ k.T / math.sqrt(h)).softmax(dim=-1) @ v

    def read_placed(q, k, v):
        return read(placed(q, [4], frequency), placed(k, [0, 1, 2, 3], frequency), v)

    plain = (read(q, k, v) - read(q, k[order], v[order])).abs().max().item()
    moved = (read_placed(q, k, v) - read_placed(q, k[order], v[order])).abs().max().item()
    print("\nfour tokens in another order: what the query reads changes by")
    print(f"  {plain:.1e} without rotation, {moved:.2f} with it")

    print("\nscore of the same query and key, placed at (query, key):")
    scores = {}
    for place in ((0, 0), (5, 2), (105, 102), (20005, 20002), (5, 4), (50, 2)):
        score = (placed(q, [place[0]], frequency) @ placed(k[:1], [place[1]], frequency).T).item()
        scores[f"{place[0]},{place[1]}"] = score
        print(f"  {place!s:>16}   distance {place[0] - place[1]:3}   {score:8.4f}")
    result = {"turn": {"first": turn[0], "last": turn[-1]}, "plain": plain, "rotated": moved, "scores": scores}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
