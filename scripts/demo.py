"""From nothing to a model that talks, on the embedded sample: every stage a user runs, one after the other.

Trains a tokenizer, pretrains, fine-tunes, then asks questions the model was not trained on and sits the sample exam.
The commands it runs are printed, and can be typed. Started again it goes on where it stopped and repeats what is
finished in seconds; --fresh begins anew. The last line is a JSON object.

  make demo            or, without make:  python -m pip install -r requirements.txt -c constraints.txt
                                          python scripts/demo.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import needs

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "tqdm", "jinja2", "matplotlib")
needs.python_or_exit()  # an old Python can read this file so far, and no further
needs.packages_or_exit(PACKAGES)

import json
import os
import shlex
import subprocess
import time

from chat.words import Words
from common.errors import RunFailed, UserError, run_main
from common.flags import Parser
from common.words import language_here

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = "dataset/sample"
SHAPE = "--preset tiny"
# Steps are fixed, so that every machine does the same work; the rates were chosen on held-out questions.
PRETRAIN = "--seq_len 256 --batch_size 8 --accumulation_steps 1 --epochs 7 --learning_rate 4e-3"
SFT = "--seq_len 256 --batch_size 8 --accumulation_steps 1 --epochs 4 --learning_rate 4e-3 --optimizer muon"
WATCH = "--log_interval 25 --eval_interval 100 --save_interval 50 --val_split 0.01"
DIALOGUES = 8  # questions of the held-out file whose answers are shown
BEGINNINGS = ("甘肃省的省会是", "彩虹有", "9乘4等于", "问：氧的原子序数是多少？答：", "The capital of Norway is")


def commands(out: str, again: str) -> dict[str, str]:
    """The stages and their commands. again: the flag with which a stage meets what is already there."""
    pretrain, sft, exam = f"{SAMPLE}/pretrain.jsonl", f"{SAMPLE}/sft.jsonl", f"{SAMPLE}/exam"
    fresh = " --overwrite" if again == "--overwrite" else ""
    return {
        "tokenizer": f"scripts/train_tokenizer.py --data_path {pretrain} {sft} --vocab_size 2400 "
                     f"--out_dir {out}/tokenizer{fresh}",
        "pretrain": f"1-pretrain.py --data_path {pretrain} --tokenizer {out}/tokenizer {SHAPE} {PRETRAIN} {WATCH} "
                    f"--sample_prompts {out}/beginnings.txt --out_dir {out} {again}",
        "full_sft": f"3-full_sft.py --data_path {sft} --from_weight {out}/pretrain_160.pth {SFT} {WATCH} "
                    f"--sample_prompts {out}/dialogues.txt --out_dir {out} {again}",
        "questions": f"2-eval.py --questions {SAMPLE}/heldout.jsonl --weight {out}/full_sft_160.pth "
                     f"--answers_file {out}/answers.jsonl",
        "exam": f"eval_ceval.py --format text --data_dir {exam} --weight {out}/full_sft_160.pth --out_dir {out}/exam",
        "exam_letters": f"eval_ceval.py --data_dir {exam} --weight {out}/full_sft_160.pth --out_dir {out}/exam_letters",
        "dialogues": f"2-eval.py --prompts {out}/dialogues.txt --weight {out}/full_sft_160.pth "
                     f"--answers_file {out}/dialogues.jsonl",
    }  # fmt: skip


def write_prompts(folder: Path) -> None:
    """What the models write to while they learn: beginnings of texts, and a few held-out questions, spread over their
    file. The model is not trained on these questions."""
    rows = (ROOT / SAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(row)["question"] for row in rows[:: len(rows) // DIALOGUES][:DIALOGUES]]
    for name, prompts in (("beginnings", BEGINNINGS), ("dialogues", questions)):
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def run(command: str) -> dict:
    """Runs one command, shows what it prints and returns the JSON object of its last line."""
    say = Words(language_here())
    print(f"$ python {command}", flush=True)
    process = subprocess.Popen([sys.executable, *shlex.split(command)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                               encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "utf-8"})  # fmt: skip
    last = ""
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    except KeyboardInterrupt:  # the stage has received the signal too: wait until it has saved
        process.wait()
        raise UserError(say("demo_stopped")) from None
    if process.wait():
        raise RunFailed(say("demo_failed", command=command, code=process.returncode))
    return json.loads(last)


def inside_venv_only() -> bool:
    """Whether this runs in an environment that the user's shell has not activated, as make does."""
    return sys.prefix != sys.base_prefix and not os.environ.get("VIRTUAL_ENV")


def main(argv=None) -> dict:
    parser = Parser(description=__doc__)
    parser.add_argument("--out_dir", default="out", help="where everything is written (out)")
    parser.flag(parser, "fresh", False, "begin anew, over what an earlier run left")
    args = parser.parse_args(argv)
    say = Words(language_here())
    out = Path(args.out_dir).as_posix()
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    write_prompts(ROOT / out)
    results, seconds = {}, {}
    for stage, command in commands(out, "--overwrite" if args.fresh else "--resume").items():
        begin = time.perf_counter()
        print(f"\n== {say(f'demo_{stage}')}", flush=True)
        results[stage] = run(command)
        seconds[stage] = round(time.perf_counter() - begin, 1)

    by_kind = results["questions"]["by_kind"]
    print(say("demo_next", out=out, first=say("demo_activate") if inside_venv_only() else ""))
    result = {
        "sample_qa_accuracy": by_kind["fact_phrasing"],
        "unseen_template_accuracy": by_kind["unseen_template"],
        "arithmetic_accuracy": by_kind["arithmetic"],
        "exam_accuracy": results["exam"]["accuracy_micro"],
        "exam_interval": results["exam"]["interval"],
        "exam_letters_accuracy": results["exam_letters"]["accuracy_micro"],
        "seconds": seconds,
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    run_main(main)
