"""Packing by hand: how many rows documents need, what a packed row holds, and that its documents do not see each other.

    python docs/course/code/packing.py --weight out/course/pretrain_160.pth --data_path dataset/sample/pretrain.jsonl

The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch

from common.errors import run_main, user_errors
from data.packing import pack
from data.reading import iter_texts
from model.attention import packed_mask, packed_positions
from model.tokenizer import encode_document
from model.weights import load_model

TEXTS = ("夏至是夏季的节气。", "铁的元素符号是Fe。", "一年有四个季节。")


def in_order(lengths, row_length: int) -> list[list[int]]:
    """Documents as they come: one that has no room left begins a new row."""
    rows, room = [], 0
    for length in lengths:
        if length > room:
            rows.append([])
            room = row_length
        rows[-1].append(length)
        room -= length
    return rows


def best_fit(lengths, row_length: int) -> list[list[int]]:
    """The longest first, each into the fullest row that still has room for it."""
    rows, rooms = [], []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rows.append([])
            rooms.append(row_length)
            fitting = [len(rows) - 1]
        fullest = min(fitting, key=rooms.__getitem__)
        rows[fullest].append(length)
        rooms[fullest] -= length
    return rows


def one_row(documents: list[list[int]], row_length: int) -> dict[str, list[int]]:
    """Documents side by side in one row: ids, labels and segment numbers; what is left over is padding."""
    ids, labels, segments = [], [], []
    for number, document in enumerate(documents, start=1):
        ids += document
        labels += [-100, *document[1:]]  # a document's first token has no token before it that could tell it
        segments += [number] * len(document)
    padding = row_length - len(ids)
    return {"ids": ids + [0] * padding, "labels": labels + [-100] * padding, "segments": segments + [0] * padding}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a weights file of the project")
    parser.add_argument("--data_path", required=True, help='rows of {"text": ...}')
    parser.add_argument("--row_length", type=int, default=256, help="tokens of a row (256)")
    args = parser.parse_args(argv)
    with user_errors():
        model, tokenizer, _ = load_model(args.weight)
        lengths = [len(encode_document(tokenizer, text)) for text in iter_texts([args.data_path])]
    model.eval()
    shortest, middle, longest = np.quantile(lengths, (0, 0.5, 1)).astype(int).tolist()
    print(f"{len(lengths):,} documents, {sum(lengths):,} tokens; a document has {shortest} to {longest}, half of them "
          f"at most {middle}")  # fmt: skip
    lengths = [min(length, args.row_length) for length in lengths]
    ours = len(pack(np.array(lengths), args.row_length)[1]) - 1
    rows = {"one_a_row": len(lengths), "in_order": len(in_order(lengths, args.row_length)),
            "best_fit": len(best_fit(lengths, args.row_length)), "pack": ours}  # fmt: skip
    print(f"\nrows of {args.row_length}   how many   real tokens")
    for name, n in rows.items():
        print(f"{name.replace('_', ' '):<13} {n:9,}   {sum(lengths) / n / args.row_length:11.1%}")

    documents = [encode_document(tokenizer, text) for text in TEXTS]
    row = one_row(documents, sum(map(len, documents)) + 2)
    ids, segments = torch.tensor([row["ids"]]), torch.tensor([row["segments"]])
    positions, mask = packed_positions(segments)[0].tolist(), packed_mask(segments)[0, 0]
    words = [tokenizer.decode([i]) for i in row["ids"]]
    print("\nslot  document  position  learned  token")
    for i, word in enumerate(words):
        segment, learned = row["segments"][i], "yes" if row["labels"][i] != -100 else "-"
        print(f"{i:4}  {segment:8}  {positions[i]:8}  {learned:>7}  {word if segment else '(padding)'}")

    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([document])).logits[0] for document in documents])  # (tokens, V)
        packed = model(ids, segment_ids=segments).logits[0, : len(alone)]
        merged = model(ids[:, : len(alone)]).logits[0]
    apart = {"masked": (packed - alone).abs().max().item(), "unmasked": (merged - alone).abs().max().item()}
    print(f"\nlogits of the row - logits of each document alone: at most {apart['masked']:.0e} with the mask, "
          f"{apart['unmasked']:.1f} without")  # fmt: skip
    result = {
        "documents": len(lengths), "rows": rows, "apart": apart, "words": words, "segments": row["segments"],
        "share": {name: sum(lengths) / n / args.row_length for name, n in rows.items()},
        "mask": mask.int().tolist(), "learned": [int(label != -100) for label in row["labels"]],
    }  # fmt: skip
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    run_main(main)
