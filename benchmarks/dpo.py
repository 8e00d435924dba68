"""Preferences before and after 5-dpo_train.py, with the stage's default learning rate.

Gate on the sample: the accuracy on its held-out pairs rises beyond its 95% interval, and the loss on held-out
conversations rises by less than 3%. On other pairs (--data_path) the same figures are reported without a gate.
"""

from pathlib import Path

from benchmarks.stages import SAMPLE, chat_weights, held_out, stage

FIGURES = ("heldout_pairs", "accuracy_before", "accuracy", "accuracy_gain_interval", "accuracy_per_token_before",
           "accuracy_per_token", "accuracy_per_token_gain_interval", "longer_answer_accuracy", "val_margin", "val_kl",
           "steps", "seconds")  # fmt: skip


def add_flags(parser) -> None:
    parser.add_argument("--weight", metavar="PATH", help="chat model (the newest full_sft_* in out/)")
    parser.add_argument("--out_dir", default="out/benchmark_dpo", help="(%(default)s)")
    parser.add_argument("--data_path", nargs="+", metavar="FILE", help="other pairs, such as those of $DATA/dpo")
    parser.add_argument("flags", nargs="*", help="further flags of 5-dpo_train.py, after --")


def run(args) -> dict:
    weights, out = chat_weights(args.weight), Path(args.out_dir)
    data = ["--data_path", *args.data_path, "--val_split", 0.2] if args.data_path else [
        "--data_path", SAMPLE / "dpo.jsonl", "--val_path", SAMPLE / "dpo_heldout.jsonl"]  # fmt: skip
    found = stage("5-dpo_train.py", "--from_weight", weights, "--out_dir", out, "--overwrite", *data,
                  *args.flags)  # fmt: skip
    before, after = (held_out(w, SAMPLE / "sft.jsonl", out)["loss"] for w in (weights, found["weights"]))
    result = {key: found[key] for key in FIGURES}
    result |= {"chat_loss_before": before, "chat_loss_after": after, "chat_loss_rise": after / before - 1}
    if not args.data_path:
        result["passed"] = found["accuracy_gain_interval"][0] > 0 and after / before < 1.03
    return result
