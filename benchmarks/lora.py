"""A new name for the assistant by an adapter: does it take, does it stay where it belongs, what does it cost?

Gates: at least 18 of the 20 held-out identity questions get the new name, at most 2 of 100 ordinary questions do, and
the bits per byte on held-out conversations of the sample rise by less than 2%. Beside it the same rows and steps with
all weights trained: time and memory.
"""

from pathlib import Path

from benchmarks.stages import SAMPLE, ask, chat_weights, held_out, read_rows, stage
from processing.fill import fill

RECIPE = ["--seq_len", 256, "--batch_size", 4, "--accumulation_steps", 1, "--log_interval", 20, "--eval_interval", 0]


def add_flags(parser) -> None:
    parser.add_argument("--weight", metavar="PATH", help="chat model (the newest full_sft_* in out/)")
    parser.add_argument("--out_dir", default="out/benchmark_lora", help="(%(default)s)")
    parser.add_argument("--name", default="小石头", help="the new name (%(default)s)")
    parser.add_argument("--author", default="石匠", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("flags", nargs="*", help="further flags of 4-lora_sft.py, after --")


def run(args) -> dict:
    weights, out = chat_weights(args.weight), Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    data = out / "lora_identity.jsonl"
    fill(SAMPLE / "lora_identity.jsonl", data, {"name": args.name, "author": args.author})
    common = ["--data_path", data, "--from_weight", weights, "--out_dir", out, "--max_steps", args.steps,
              "--val_split", 0, "--overwrite", *RECIPE]  # fmt: skip
    adapter = stage("4-lora_sft.py", *common, *args.flags)
    everything = stage("3-full_sft.py", *common, "--learning_rate", "2e-4")

    identity = [row["question"] for row in read_rows(SAMPLE / "lora_identity_heldout.jsonl")]
    ordinary = [row["question"] for row in read_rows(SAMPLE / "heldout.jsonl")]
    ordinary = ordinary[:: len(ordinary) // 100][:100]
    answers = ask(adapter["weights"], identity + ordinary)
    named = [args.name in answer.text for answer in answers]
    before, after = (held_out(w, SAMPLE / "sft.jsonl", out)["bits_per_byte"] for w in (weights, adapter["weights"]))
    result = {
        "steps": args.steps, "new_name_in_identity_questions": sum(named[:20]), "of_identity": 20,
        "new_name_in_ordinary_questions": sum(named[20:]), "of_ordinary": len(ordinary),
        "bits_per_byte_before": before, "bits_per_byte_after": after, "rise": after / before - 1,
        "adapter_bytes": Path(adapter["weights"]).stat().st_size, "weights_bytes": weights.stat().st_size,
    }  # fmt: skip
    for key in ("seconds", "tokens_per_second", "peak_memory_bytes"):
        result |= {f"lora_{key}": adapter[key], f"full_{key}": everything[key]}
    passed = sum(named[:20]) >= 18 and sum(named[20:]) <= 2 and after / before < 1.02
    for question, answer in zip(identity, answers):
        print(f"  {question}  ->  {answer.text}")
    return result | {"passed": passed}
