"""Arithmetic by trial: exact match on held-out sums before and after train_grpo.py.

Sums: additions and subtractions of two two-digit numbers, 10 to 99, no result below 0, worked in columns as the sample
works them. --heldout of them (a sum and its swapped twin count as one) are neither trained on nor practised. A `tiny`
model with a vocabulary of 320 (a step then costs a third) learns from worked examples of the others for --sft_steps,
until it is right about half of the time; then it practises on the same questions, without worked answers. Gate: the
start's exact match lies between 20% and 80%, GRPO raises it beyond the 95% interval of the paired bootstrap, and takes
at most 30 CPU-minutes.
"""

import json
import random
import resource
from pathlib import Path

from benchmarks.stages import stage
from model.tokenizer_files import save_tokenizer
from model.vocabulary import train_tokenizer
from sample.arithmetic import compute, reason_messages, same_sum, worked_sums

LIMIT_MINUTES = 30
# At temperature 1 the start's samples are right half as often as its greedy answers (17% and 45%): learning would first
# have to close that gap. At 0.7 they are alike. A rate of 5e-5 and more undoes what the start knows.
GRPO = ["--temperature", 0.7, "--batch_size", 64, "--seq_len", 128, "--max_new_tokens", 80, "--schedule", "wsd",
        "--warmup", 3, "--eval_interval", 16, "--log_interval", 1]  # fmt: skip
RANGE = 0.2, 0.8  # exact match of a start from which there is something to learn and something to learn from


def add_flags(parser) -> None:
    parser.add_argument("--weight", metavar="PATH", help="a reasoning model to begin with (trained here)")
    parser.add_argument("--out_dir", default="out/benchmark_grpo", help="(%(default)s)")
    parser.add_argument("--sft_steps", type=int, default=400, metavar="N", help="steps of the start (%(default)s)")
    parser.add_argument("--steps", type=int, default=130, metavar="N", help="steps of GRPO (%(default)s)")
    parser.add_argument("--heldout", type=int, default=400, metavar="N", help="sums held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of split and training (%(default)s)")
    parser.add_argument("flags", nargs="*", help="further flags of train_grpo.py, after --")


def write_sums(folder: Path, n_heldout: int, seed: int) -> dict[str, Path]:
    """Files of worked examples ("traces"), of bare questions about the same sums, and of held-out questions."""
    rng = random.Random(seed)
    sums = [s for s in worked_sums() if s[1] in "+-"]
    withheld = set(rng.sample(sorted({same_sum(*s) for s in sums}), n_heldout))
    trained = [s for s in sums if same_sum(*s) not in withheld]
    rng.shuffle(trained)
    asked = [(f"{a}{sign}{b}=？", (a, sign, b)) for a, sign, b in trained]
    heldout = [(f"{a}{sign}{b}=？", (a, sign, b)) for sign, a, b in sorted(withheld)]
    rows = {
        "traces": [{"conversations": reason_messages(question, *s)} for question, s in asked],
        "questions": [{"question": question, "answer": str(compute(*s))} for question, s in asked],
        "heldout": [{"question": question, "answer": str(compute(*s))} for question, s in heldout],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in rows}


def small_vocabulary(traces: Path, folder: Path) -> Path:
    """Trains it on the worked examples."""
    chats = [json.loads(line)["conversations"] for line in traces.read_text(encoding="utf-8").splitlines()]
    save_tokenizer(train_tokenizer([message["content"] for chat in chats for message in chat], 320), folder)
    return folder


def cpu_minutes() -> float:
    """Of all processes started here that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) / 60


def run(args) -> dict:
    folder = Path(args.out_dir)
    files = write_sums(folder, args.heldout, args.seed)
    common = ["--out_dir", folder, "--overwrite", "--seed", args.seed]
    weight, begin = args.weight, cpu_minutes()
    if weight is None:
        weight = stage("train_distill_reason.py", "--from_weight", "none", "--preset", "tiny", "--tokenizer",
                       small_vocabulary(files["traces"], folder / "tokenizer"), "--seq_len", 256, "--batch_size", 8,
                       "--data_path", files["traces"], "--max_steps", args.sft_steps, *common)["weights"]  # fmt: skip
    start_minutes, begin = cpu_minutes() - begin, cpu_minutes()
    found = stage("train_grpo.py", "--from_weight", weight, "--data_path", files["questions"],
                  "--val_path", files["heldout"], "--max_steps", args.steps, *GRPO, *common, *args.flags)  # fmt: skip
    minutes = cpu_minutes() - begin
    before, after, interval = (found[f"exact_match_{name}"] for name in ("before", "after", "gain_interval"))
    return {
        "operands": "10 to 99, + and -", "n": found["heldout_questions"], "exact_match_before": before,
        "exact_match_after": after, "gain_interval": interval, "steps": found["steps"], "seconds": found["seconds"],
        "start_cpu_minutes": start_minutes, "grpo_cpu_minutes": minutes,
        "passed": RANGE[0] <= before <= RANGE[1] and interval[0] > 0 and minutes <= LIMIT_MINUTES,
    }  # fmt: skip
