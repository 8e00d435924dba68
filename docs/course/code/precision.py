"""What float32, bfloat16 and float16 can hold, and where training meets their limits.

    python docs/course/code/precision.py

The last line is a JSON object.
"""

import argparse
import json

import torch

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def moved(dtype: torch.dtype, rate: float, steps: int) -> float:
    """A weight that begins at 1 and loses `rate` at each step, stored in this type after each of them."""
    w = torch.tensor(1.0, dtype=dtype)
    for _ in range(steps):
        w -= rate
    return w.item()


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradient", type=float, default=1e-8, help="a small gradient (1e-8)")
    parser.add_argument("--scale", type=float, default=2.0**16, help="what the loss is multiplied by (65536)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    a, b = torch.randn(256, 512), torch.randn(512, 256)
    exact = a.double() @ b.double()
    rows = {
        "largest": "largest number", "gap": "gap after 1", "big": "70,000 is stored as",
        "small": f"{args.gradient:g} is stored as", "scaled": "... scaled, and back",
        "weight": "1, a thousand times - 0.001", "error": "error of a matrix product",
    }  # fmt: skip
    result = {}
    print(f"{'':<28}" + "".join(f"{name:>12}" for name in TYPES))
    for name, dtype in TYPES.items():
        info, product = torch.finfo(dtype), (a.to(dtype) @ b.to(dtype)).double()
        result[name] = {
            "largest": info.max, "gap": info.eps, "big": torch.tensor(7e4, dtype=dtype).item(),
            "small": torch.tensor(args.gradient, dtype=dtype).item(),
            "scaled": torch.tensor(args.gradient * args.scale, dtype=dtype).item() / args.scale,
            "weight": moved(dtype, 0.001, 1000), "error": ((product - exact).norm() / exact.norm()).item(),
        }  # fmt: skip
    for key, what in rows.items():
        print(f"{what:<28}" + "".join(f"{result[name][key]:>12.3g}" for name in TYPES))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
