"""Put a multiple-choice exam to a model and count the right answers.

    python eval_ceval.py                                           C-Eval if it is there, else the sample exam
    python eval_ceval.py --format completion --shots 5             as lm-evaluation-harness asks base models
    python eval_ceval.py --benchmark aclue --data_dir dataset/aclue

Every answer goes to <out_dir>/<subject>_<split>_result.csv, the summary to test.log and summary.json beside them, a
picture to accuracy.png. The last line on standard output is a JSON object.
"""

import json
import time
from pathlib import Path

from inference import console, exam, exam_report
from inference.console import note
from trainer.cli import Parser, UserError, run_main, user_errors

SAMPLE = Path("dataset/sample/exam")


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("--benchmark", choices=list(exam.BENCHMARKS), default="ceval", help="(ceval)")
    parser.add_argument("--data_dir", metavar="FOLDER", help="(ceval/ceval-exam, dataset/<benchmark>, the sample exam)")
    parser.add_argument("--split", help="folder of the questions: val, test, dev (the benchmark's own: val or test)")
    parser.add_argument("--format", choices=("chat", "completion"), default="chat",
                        help="a chat turn, or text to complete (chat)")  # fmt: skip
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="worked examples with completion, 0 to 5 (0)")
    parser.add_argument("--system", default=exam.V1_SYSTEM, metavar="TEXT",
                        help=f'system message of the chat, "" for none ({exam.V1_SYSTEM})')  # fmt: skip
    parser.add_argument("--max_batch", type=int, default=32, metavar="N", help="questions computed side by side (32)")
    parser.add_argument("--out_dir", default="ceval/ceval_result", metavar="FOLDER", help="(ceval/ceval_result)")
    console.add_model_flags(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.shots <= 5:
        raise UserError(f"--shots must lie between 0 and 5, not {args.shots}")
    if args.shots and args.format == "chat":
        raise UserError("--shots needs --format completion; MiniMind v1's chat prompt has no worked examples")
    if args.max_batch < 1:
        raise UserError(f"--max_batch must be at least 1, not {args.max_batch}")
    return args


def find_data(args) -> Path:
    """--data_dir, or where the benchmark usually lies, or the sample exam, which asks in C-Eval's way."""
    if args.data_dir:
        if not Path(args.data_dir).is_dir():
            raise UserError(f"no folder {args.data_dir}")
        return Path(args.data_dir)
    usual = [Path("ceval/ceval-exam")] * (args.benchmark == "ceval") + [Path("dataset") / args.benchmark]
    for folder in usual:
        if folder.is_dir():
            return folder
    if args.benchmark != "ceval":
        raise UserError(f"no folder {usual[-1]}; put the files of {args.benchmark} there, or name it with --data_dir")
    note(f"C-Eval is not here (ceval/ceval-exam or --data_dir): taking the small SAMPLE exam in {SAMPLE}")
    return SAMPLE


def run(args):
    begin = time.perf_counter()
    folder, split = find_data(args), args.split or exam.BENCHMARKS[args.benchmark].split
    subjects = exam.read_exam(folder, args.benchmark, split)
    short = [s.name for s in subjects if len(s.shots) < args.shots]
    if short:
        note(f"fewer than {args.shots} worked examples for {len(short)} subjects: {', '.join(short[:5])}")
    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out_dir}: {error.strerror}") from None
    path = console.find_weight(args)
    engine, _ = console.open_engine(args, path, max_batch=args.max_batch)
    chat = args.format == "chat"
    ask = exam.AskByChat(engine, args.system) if chat else exam.AskByCompletion(engine, args.benchmark, args.shots)
    note(f"{path}: {sum(len(s.questions) for s in subjects)} questions of {len(subjects)} subjects in {folder}/{split}")
    graded = exam.take_exam(engine, subjects, ask)

    summary = exam_report.summarise(graded.answers)
    report = exam_report.lines(subjects, graded.answers, summary)
    print("\n".join(report))
    result = {
        "benchmark": args.benchmark, "data_dir": str(folder), "split": split, "format": args.format,
        "shots": args.shots, **summary, "shots_dropped": graded.shots_dropped, "prompts_cut": graded.prompts_cut,
        "weights": str(path), "out_dir": str(out_dir), "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip
    exam_report.write_answers(out_dir, split, graded.answers)
    (out_dir / "test.log").write_text("\n".join(report) + "\n", encoding="utf-8")
    (out_dir / "summary.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    try:
        exam_report.plot(out_dir / "accuracy.png", graded.answers, summary)
    except ImportError:
        note("no picture: it needs matplotlib (pip install matplotlib)")
    print(json.dumps(result, ensure_ascii=False))


def main(argv=None):
    args = parse(argv)
    with user_errors():
        run(args)


if __name__ == "__main__":
    run_main(main)
