"""A new name for the assistant by an adapter: does it take, does it stay where it belongs, what does it cost?

The README's commands: the identity rows say one thing, and a model trained on them alone forgets the rest; so they are
mixed with the sample's conversations, without those in which the model speaks of itself (--repeat: a file named twice
in --data_path is read twice).

Gates: at least 18 of the 20 held-out identity questions get the new name (or author, where that is asked), at most 2 of
100 ordinary questions do (evenly drawn, and in the same share of all of the sample's), and the bits per byte on the 5%
of these conversations that are held out rise by less than 2%. Beside it the same rows and steps with all weights
trained: time and memory.
"""

from pathlib import Path

from benchmarks.stages import SAMPLE, ask, chat_weights, held_out, read_lines, stage
from cleaning.fill import fill
from data.answer_match import is_right

RECIPE = ["--seq_len", 256, "--batch_size", 4, "--accumulation_steps", 1, "--log_interval", 20, "--eval_interval", 0]

# what the sample's model says of itself: its name, its author, its kind
OLD = ("MiniMind", "one person", "一个人", "语言模型", "language model", "PyTorch")
HELD_OUT = 0.05  # share of the conversations; of 1%, 16 rows, the figure moves by 4% from run to run
ADAPTER = ["--rank", 16, "--alpha", 32, "--learning_rate", "2e-3"]


def add_flags(parser) -> None:
    parser.add_argument("--weight", metavar="PATH", help="chat model (the newest full_sft_* in out/)")
    parser.add_argument("--out_dir", default="out/benchmark_lora", help="(%(default)s)")
    parser.add_argument("--name", default="小石头", help="the new name (%(default)s)")
    parser.add_argument("--author", default="石匠", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=1400, help="(%(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="times the identity rows are read (%(default)s)")
    parser.add_argument("flags", nargs="*", help="further flags of 4-lora_sft.py, after --")


def run(args) -> dict:
    weights, out = chat_weights(args.weight), Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    data = out / "lora_identity.jsonl"
    fill(SAMPLE / "lora_identity.jsonl", data, {"name": args.name, "author": args.author})
    lines = (SAMPLE / "sft.jsonl").read_text(encoding="utf-8").splitlines(True)
    chats = out / "ordinary.jsonl"
    chats.write_text("".join(line for line in lines if not any(old in line for old in OLD)), encoding="utf-8")
    # --val_split leaves out the very conversations that `held_out` asks for: a hash decides
    common = ["--data_path", *[data] * args.repeat, chats, "--from_weight", weights, "--out_dir", out,
              "--max_steps", args.steps, "--val_split", HELD_OUT, "--overwrite", *RECIPE]  # fmt: skip
    adapter = stage("4-lora_sft.py", *common, "--save_weight", "identity", *ADAPTER, *args.flags)
    everything = stage("3-full_sft.py", *common, "--save_weight", "identity_full", "--learning_rate", "2e-4")

    text = (SAMPLE / "lora_identity_heldout.jsonl").read_text(encoding="utf-8")
    identity = read_lines(text.replace("{{name}}", args.name).replace("{{author}}", args.author))
    ordinary = read_lines((SAMPLE / "heldout.jsonl").read_text(encoding="utf-8"))
    ordinary = [row for row in ordinary if not row["relation"].startswith("self_")]  # those ask who the assistant is
    hundred = ordinary[:: len(ordinary) // 100][:100]
    ordinary = hundred + [row for row in ordinary if row not in hundred]
    answers = [answer.text for answer in ask(adapter["weights"], [row["question"] for row in identity + ordinary])]
    right = [is_right(answer, row["answer"], row["rivals"]) for answer, row in zip(answers, identity)]
    leaks = [args.name in answer for answer in answers[len(identity) :]]
    before, after = (held_out(w, chats, out, share=HELD_OUT)["bits_per_byte"] for w in (weights, adapter["weights"]))
    for row, answer, ok in zip(identity, answers, right):
        print(f"  {'right' if ok else 'WRONG'}  {row['question']}  ->  {answer}")
    for row, answer, leaked in zip(ordinary, answers[len(identity) :], leaks):
        if leaked:
            print(f"  ordinary  {row['question']}  ->  {answer}")
    result = {
        "steps": args.steps, "identity_right": sum(right), "of_identity": len(identity),
        "new_name_in_100_ordinary": sum(leaks[:100]), "new_name_in_all_ordinary": sum(leaks), "of_all": len(leaks),
        "bits_per_byte_before": before, "bits_per_byte_after": after, "rise": after / before - 1,
        "adapter_bytes": Path(adapter["weights"]).stat().st_size, "weights_bytes": weights.stat().st_size,
    }  # fmt: skip
    for key in ("seconds", "tokens_per_second", "peak_memory_bytes"):
        result |= {f"lora_{key}": adapter[key], f"full_{key}": everything[key]}
    stays = sum(leaks[:100]) <= 2 and sum(leaks) <= 0.02 * len(leaks)
    return result | {"passed": sum(right) >= 18 and stays and after / before < 1.02}
