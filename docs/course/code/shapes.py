"""Trains models of several shapes on the same text, one after another, and compares them on text held out from all.

    python docs/course/code/shapes.py --data_path FILE.jsonl --tokenizer FOLDER --shapes 1x192 3x128 --seeds 1 2

A shape is LAYERSxWIDTH; a head is 32 wide. Everything else is the same for all: text, steps, learning rate, and the
seeds. A row a shape: parameters, how many of them are the embedding, bits per byte on held-out text. The last line is
a JSON object.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common.errors import UserError, run_main
from course.checks import load
from model.LMConfig import LMConfig
from model.tokenizer import load_tokenizer

HEAD = 32  # width of a head


def config_of(shape: str, vocab_size: int) -> LMConfig:
    layers, width = (int(part) for part in shape.split("x"))
    if width % HEAD:
        raise UserError(f"the width of {shape} must be a multiple of {HEAD}")
    heads = width // HEAD
    return LMConfig(dim=width, n_layers=layers, n_heads=heads, n_kv_heads=heads, vocab_size=vocab_size)


def train(args, config: LMConfig, seed: int) -> dict:
    """The result of `1-pretrain.py` with this shape and seed, run inside this process; what it prints is dropped."""
    shape = {name: getattr(config, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    flags = shape | {
        "preset": "tiny", "data_path": args.data_path, "tokenizer": args.tokenizer, "epochs": args.epochs, "seed": seed,
        "val_split": args.val_split, "learning_rate": args.learning_rate, "seq_len": 256, "batch_size": 8,
        "accumulation_steps": 1, "eval_interval": 0, "out_dir": args.out_dir,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):
        return load("1-pretrain.py").main([*words, "--overwrite"])


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shapes", nargs="+", required=True, metavar="LAYERSxWIDTH")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of the first weights and of the order (1)")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--val_split", type=float, default=0.05)
    parser.add_argument("--out_dir", default="out/course/shapes")
    args = parser.parse_args(argv)

    V, found = len(load_tokenizer(args.tokenizer)), []
    print(f"{'shape':<8} {'parameters':>10} {'embedding':>9}   bits per byte, seeds {args.seeds}", flush=True)
    for shape in args.shapes:
        config = config_of(shape, V)
        bits = [train(args, config, seed)["val_bits_per_byte"] for seed in args.seeds]
        total, embedding = config.parameter_count(), V * config.dim
        found.append({"shape": shape, "parameters": total, "embedding": embedding, "bits": bits,
                      "mean": sum(bits) / len(bits)})  # fmt: skip
        print(f"{shape:<8} {total:>10,} {embedding / total:>9.0%}   " + "  ".join(f"{b:.3f}" for b in bits)
              + f"   mean {found[-1]['mean']:.3f}", flush=True)  # fmt: skip
    print(json.dumps({"shapes": found}))
    return {"shapes": found}


if __name__ == "__main__":
    run_main(main)
