"""Where the memory of each GPU goes when several share the training of one model: ZeRO's stages 0 to 3, by formula.

    python docs/course/code/zero_memory.py --presets minimind2-small minimind2 --parameters 7e9 --gpus 1 2 8

Counted is what training keeps besides activations: weights, gradients and Adam's two moments, 4 bytes a number each, as
this project keeps them. ZeRO divides one after another among the GPUs. The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from model.LMConfig import PRESETS, LMConfig

BYTES = {"weights": 4, "gradients": 4, "moments": 8}  # a parameter
DIVIDED = ((), ("moments",), ("moments", "gradients"), ("moments", "gradients", "weights"))  # by ZeRO's stage


def memory(parameters: float, stage: int, gpus: int) -> dict[str, float]:
    """Bytes on each GPU of weights, gradients and moments."""
    return {kind: size * parameters / (gpus if kind in DIVIDED[stage] else 1) for kind, size in BYTES.items()}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=[], choices=PRESETS, metavar="NAME")
    parser.add_argument("--parameters", nargs="*", type=float, default=[], help="further sizes")
    parser.add_argument("--gpus", nargs="+", type=int, required=True)
    args = parser.parse_args(argv)

    sizes = {name: LMConfig.from_preset(name).parameter_count() for name in args.presets}
    sizes |= {f"{n / 1e9:g}B": n for n in args.parameters}
    result = {}
    for name, n in sizes.items():
        print(f"{name}, {n:,.0f} parameters: GB on each GPU")
        print(f"{'GPUs':>6}" + "".join(f"{f'ZeRO-{stage}':>10}" for stage in range(4)))
        result[name] = {}
        for gpus in args.gpus:
            row = [memory(n, stage, gpus) for stage in range(4)]
            print(f"{gpus:>6}" + "".join(f"{sum(parts.values()) / 1e9:>10.2f}" for parts in row))
            result[name][str(gpus)] = row
        print()
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
