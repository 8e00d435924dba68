"""Give a model a multiple-choice exam and count the right answers.

    python eval_ceval.py                                           C-Eval if it is there, else the sample exam
    python eval_ceval.py --format completion --shots 5             as lm-evaluation-harness asks base models
    python eval_ceval.py --format text                             for small models: no letters, the options' own words
    python eval_ceval.py --benchmark aclue --data_dir dataset/aclue
    python eval_ceval.py --lm_eval --shots 5                       the same prompts, asked by lm-evaluation-harness
    python eval_ceval.py --contamination dataset/*.jsonl           which training rows hold questions of the exam

Every answer goes to <out_dir>/<subject>_<split>_result.csv, the summary to test.log and summary.json beside them, a
picture to accuracy.png; exams.jsonl keeps a line of every exam written there, which the page in the browser draws. The
last line on standard output is a JSON object.
"""

import json
import tempfile
import time
from pathlib import Path

from chat.terminal import note
from common.errors import UserError, run_main, user_errors
from common.files import replaced
from common.flags import Parser
from data.reading import check_file
from exams import exam, exam_report, harness
from exams.contamination import search
from export.transformers_folder import write_transformers_folder
from inference import open_model

SAMPLE = Path("dataset/sample/exam")


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("--benchmark", choices=list(exam.BENCHMARKS), default="ceval", help="(ceval)")
    parser.add_argument("--data_dir", metavar="FOLDER", help="(ceval/ceval-exam, dataset/<benchmark>, "
                        "dataset/exams/<benchmark>, the sample exam)")  # fmt: skip
    parser.add_argument("--split", help="folder of the questions: val, test, dev (the benchmark's own: val or test)")
    parser.add_argument("--format", choices=("chat", "completion", "text"), default=None,
                        help="a chat turn, text to complete, or the options' own words as the reply (chat; with "
                             "--lm_eval completion)")  # fmt: skip
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="worked examples with completion, 0 to 5 (0)")
    parser.add_argument("--system", metavar="TEXT",
                        help=f'system message, "" for none (chat: {exam.V1_SYSTEM}; text: none)')  # fmt: skip
    parser.add_argument("--max_batch", type=int, default=32, metavar="N", help="questions computed side by side (32)")
    parser.add_argument("--out_dir", default="ceval/ceval_result", metavar="FOLDER", help="(ceval/ceval_result)")
    parser.flag(parser, "lm_eval", False, "let lm-evaluation-harness ask and score, through transformers")
    parser.add_argument("--contamination", nargs="+", metavar="FILE", help="training files to search for the questions")
    open_model.add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.lm_eval and args.format in ("chat", "text"):
        raise UserError(f"--lm_eval asks as --format completion does; --format {args.format} is not the harness's")
    args.format = args.format or ("completion" if args.lm_eval else "chat")
    for file in args.contamination or []:
        check_file(file)
    if not 0 <= args.shots <= 5:
        raise UserError(f"--shots must lie between 0 and 5, not {args.shots}")
    if args.shots and args.format != "completion":
        raise UserError(f"--shots needs --format completion; --format {args.format} has no worked examples")
    if args.system is not None and args.format == "completion":
        raise UserError("--system needs --format chat or text; a text to complete has no system message")
    if args.max_batch < 1:
        raise UserError(f"--max_batch must be at least 1, not {args.max_batch}")
    return args


def find_data(args) -> Path:
    """--data_dir, or where the benchmark usually lies, or the sample exam, which asks in C-Eval's way."""
    if args.data_dir:
        if not Path(args.data_dir).is_dir():
            raise UserError(f"no folder {args.data_dir}")
        return Path(args.data_dir)
    usual = [Path("ceval/ceval-exam")] * (args.benchmark == "ceval")
    usual += [Path("dataset") / args.benchmark, Path("dataset/exams") / args.benchmark]
    for folder in usual:
        if folder.is_dir():
            return folder
    if args.benchmark != "ceval":
        raise UserError(
            f"no folder {usual[-1]}; run `python scripts/download_data.py {args.benchmark}`, "
            "or name another folder with --data_dir"
        )
    note(f"C-Eval is not here (ceval/ceval-exam or --data_dir): taking the small SAMPLE exam in {SAMPLE}")
    return SAMPLE


def run(args):
    begin, now = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
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
    path = open_model.find_weight(args)
    harness_version = harness.version() if args.lm_eval else None
    overlap = None
    if args.contamination:
        overlap = search(args.contamination, subjects, out_dir / "contamination.csv")
        note(f"{overlap['rows_overlapping']} of {overlap['rows']} training rows hold "
             f"{overlap['questions_overlapping']} of the questions; see {out_dir / 'contamination.csv'}")  # fmt: skip
    engine, record = open_model.open_engine(args, path, foreign=True, max_batch=args.max_batch)
    note(f"{path}: {sum(len(s.questions) for s in subjects)} questions of {len(subjects)} subjects in {folder}/{split}")
    if args.lm_eval:
        graded = ask_harness(args, path, engine, record, subjects)
    else:
        graded = exam.take_exam(engine, subjects, asker(engine, args))

    summary = exam_report.summarise(graded.answers)
    report = exam_report.lines(subjects, graded.answers, summary)
    print("\n".join(report))
    result = {
        "benchmark": args.benchmark, "data_dir": str(folder), "split": split, "format": args.format,
        "shots": args.shots, **summary, "shots_dropped": graded.shots_dropped, "prompts_cut": graded.prompts_cut,
        "weights": str(path), "out_dir": str(out_dir), "lm_eval": harness_version, "contamination": overlap,
        "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip
    exam_report.write_answers(out_dir, split, graded.answers)
    with replaced(out_dir / "test.log", text=True) as file:
        file.write("\n".join(report) + "\n")
    with replaced(out_dir / "summary.json", text=True) as file:
        file.write(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    with open(out_dir / "exams.jsonl", "a", encoding="utf-8", newline="\n") as file:  # every exam written here so far
        file.write(json.dumps({"time": now, **result}, ensure_ascii=False) + "\n")
    try:
        exam_report.plot(out_dir / "accuracy.png", graded.answers, summary)
    except ImportError:
        note("no picture: it needs matplotlib (pip install matplotlib)")
    print(json.dumps(result, ensure_ascii=False))


def asker(engine, args):
    if args.format == "completion":
        return exam.AskByCompletion(engine, args.benchmark, args.shots)
    if args.format == "text":
        return exam.AskByText(engine, args.system or "")
    return exam.AskByChat(engine, exam.V1_SYSTEM if args.system is None else args.system)


def ask_harness(args, path, engine, record: dict, subjects) -> exam.Graded:
    """The exam through transformers and lm-evaluation-harness, on our model exported to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if engine.own_template:
            folder = path
        else:
            write_transformers_folder(folder, engine.source.float(), engine.tokenizer, record, "exam")
        given = harness.log_probabilities(
            folder, subjects, args.benchmark, args.shots, str(engine.source.device), args.max_batch
        )
    answers = {
        s.name: [exam.answer_of(q, four) for q, four in zip(s.questions, given[s.name], strict=True)] for s in subjects
    }
    return exam.Graded(answers, prompts_cut=harness.prompts_cut(engine, subjects, args.benchmark, args.shots))


def main(argv=None):
    args = parse(argv)
    with user_errors():
        run(args)


if __name__ == "__main__":
    run_main(main)
