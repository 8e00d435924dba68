"""Reads a run's log, the .jsonl beside its weights: loss, held-out loss, gradient norm, and what the model wrote.

    python docs/course/code/read_log.py --log out/course/watch_160.jsonl --few out/course/few_160.jsonl

--few is the log of the same model trained on little text. The last line is a JSON object.
"""

import argparse
import json
from pathlib import Path

SHOWN = (1, 5, 10, 20, 40, 80, 120)  # steps of the table, and the last one
WINDOW = 10


def read(path: str) -> tuple[list[dict], list[dict]]:
    """The lines of the steps, and those of the validations."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]


def smoothed(values: list[float], window: int = WINDOW) -> list[float]:
    """At each place the mean of the last `window` values, of fewer at the beginning."""
    parts = [values[max(i + 1 - window, 0) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def table(path: str, wanted) -> None:
    steps, validations = read(path)
    means = smoothed([x["loss"] for x in steps])
    held_out = {x["step"]: x for x in validations}
    print(f"{path}\n  step    loss  mean of {WINDOW}  gradient  rate      held out  bits per byte")
    for x, mean in zip(steps, means, strict=True):
        if x["step"] in wanted or x is steps[-1]:
            val = held_out.get(x["step"])
            told = f"{val['val_loss']:8.3f}  {val['val_bits_per_byte']:13.3f}" if val else ""
            print(f"  {x['step']:4}  {x['loss']:6.3f}  {mean:10.3f}  {x['grad_norm']:8.2f}  {x['lr']:.1e}  {told}")


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", required=True, help="a run's .jsonl; <name>_samples.jsonl beside it is read too")
    parser.add_argument("--few", required=True, help="the .jsonl of a run on little text")
    args = parser.parse_args(argv)

    table(args.log, SHOWN)
    samples = Path(args.log).with_name(Path(args.log).stem + "_samples.jsonl")
    written = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    last = written[-1]["step"]
    for step in (*(s for s in SHOWN if s < last), last):
        rows = [row for row in written if row["step"] == step]
        print(f"\nafter {step} steps" if rows else "", end="\n" if rows else "")
        for row in rows:
            print(f"  {row['prompt']} -> {row['text'][:44]}")
    print()
    result = {}
    for name, path in (("many", args.log), ("few", args.few)):
        steps, validations = read(path)
        result[name] = {
            "loss": [round(x["loss"], 3) for x in steps], "grad_norm": [round(x["grad_norm"], 3) for x in steps],
            "mean": [round(mean, 3) for mean in smoothed([x["loss"] for x in steps])],
            "held_out": [[x["step"], round(x["val_loss"], 3)] for x in validations],
        }  # fmt: skip
        best = min(validations, key=lambda x: x["val_loss"])
        result[name] |= {
            "first": steps[0]["loss"], "best_step": best["step"], "best": best["val_loss"],
            "end": validations[-1]["val_loss"], "end_loss": smoothed([x["loss"] for x in steps])[-1],
        }  # fmt: skip
    table(args.few, {step for step, _ in result["few"]["held_out"]})
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
