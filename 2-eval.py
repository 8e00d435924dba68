"""Chat in the terminal, or put a file of questions to a model and score its answers.

    python 2-eval.py                                   chat with the newest model in out/
    python 2-eval.py --prompts FILE                    answer each prompt of a file
    python 2-eval.py --questions FILE.jsonl            score {"question", "answer", "rivals"?, "kind"?} rows; the
                                                       questions of a row's "history" are asked before its own
    python 2-eval.py --prompts FILE --compare A B      answers of several weights side by side, as Markdown
    ... --compare A B --judge http://HOST:PORT/v1      and have a third model score them (key: OPENAI_API_KEY)
    ... --schema FILE.json                             every answer is JSON that a JSON schema allows

In a chat: exit, quit, an empty line or Ctrl-D ends it, /clear forgets what was said, Ctrl-C stops an answer. With
--questions, --prompts and --judge the last line on standard output is a JSON object; every text is kept in its
"answers_file".
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from chat import terminal
from chat.abilities import abilities
from chat.sources import Local, Settings
from chat.terminal import note
from common.errors import UserError, disk_fault, run_main, user_errors
from common.files import replaced
from common.flags import Parser
from data.prompts import read_prompts
from exams import judge
from exams.questions import answer_rows, check_question, scored
from inference import open_model
from inference.grammar import Grammar, compiled
from inference.sampling import SamplingParams


def parse(argv):
    parser = Parser(description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--questions", metavar="FILE", help="score the answers to these questions (greedy)")
    mode.add_argument("--prompts", metavar="FILE", help="answer these: one a line, or .jsonl")
    parser.add_argument("--compare", nargs="+", metavar="PATH", help="with --prompts: weights to set side by side")
    parser.add_argument(
        "--judge", metavar="URL", help="with --compare: an OpenAI-compatible API that scores the answers"
    )
    parser.add_argument("--judge_model", metavar="NAME", help="(the first one the server names)")
    parser.add_argument("--answers_file", metavar="FILE", help="(out/answers_<weights>_<file>.jsonl)")
    parser.add_argument("--schema", metavar="FILE", help="JSON schema that answers must match (none)")
    parser.add_argument("--system", metavar="TEXT", help="system message (none)")
    parser.add_argument("--history", type=int, default=4, metavar="N", help="earlier exchanges the model sees (4)")
    parser.flag(
        parser, "thinking", None, "open a think block (--no-thinking: an empty one); default: as the model likes"
    )
    open_model.add_model_flags(parser)
    open_model.add_sampling_flags(parser, temperature=None, max_new_tokens=512)
    args = parser.parse_args(argv)
    if args.compare and not args.prompts:
        raise UserError("--compare needs --prompts FILE, the questions to compare on")
    if args.judge and len(args.compare or []) < 2:
        raise UserError("--judge compares: give it --compare with two or more weights")
    if args.history < 0:
        raise UserError(f"--history must not be negative, but is {args.history}")
    args.grammar = args.schema and read_schema(args.schema)
    return args


def read_schema(path: str) -> Grammar:
    """Raises UserError, before a model is opened, for a file that is no schema or one that cannot be held."""
    try:
        grammar = Grammar.json(Path(path).read_text(encoding="utf-8"))
        compiled(grammar)
        return grammar
    except OSError as error:
        raise UserError(f"cannot read the schema {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--schema {path}: {error}") from None


def sampling(args, temperature: float) -> SamplingParams:
    return replace(open_model.sampling(args, temperature), grammar=args.grammar)


def open_with_record(args, path):
    engine, record = open_model.open_engine(args, path, foreign=True, enable_thinking=args.thinking)
    note(f"{path}: {record.get('stage', 'stage unknown')}, {engine.source.num_parameters():,} parameters")
    return engine, record


def open_chat(args, path):
    return open_with_record(args, path)[0]


def chat(args):
    params = sampling(args, temperature=0.85)
    engine, record = open_with_record(args, open_model.find_weight(args))
    settings = Settings(
        args.system or "", args.history, args.thinking, max_tokens=params.max_tokens, temperature=params.temperature,
        top_p=params.top_p, top_k=params.top_k, repetition_penalty=params.repetition_penalty, seed=params.seed,
    )  # fmt: skip
    terminal.converse(Local(engine), settings, abilities(record), answered=lambda: note(f"[{engine.speed}]"))


def answer_all(args, engine, rows, histories=None):
    """Generates an answer to every row and prints the speed."""
    begin = time.perf_counter()
    answers = answer_rows(engine, rows, sampling(args, temperature=0), args.system, histories)
    note(f"[{len(rows)} answers in {time.perf_counter() - begin:.1f} s: {engine.speed}]")
    return [answer.text for answer in answers]


def keep(args, path, file, lines) -> Path:
    """Writes the generated texts to a file -> its path."""
    target = Path(args.answers_file or f"out/answers_{path.stem}_{Path(file).stem}.jsonl")
    try:
        with replaced(target, text=True) as file:
            file.writelines(lines)
    except OSError as error:
        if disk_fault(error):
            raise
        raise UserError(f"cannot write the answers to {target}: {error.strerror}; see --answers_file") from None
    return target


def questions(args):
    rows = read_prompts(args.questions)
    for row in rows:
        check_question(row, f"{args.questions}:{row['line']}")
    path = open_model.find_weight(args)
    texts = answer_all(args, open_chat(args, path), rows, [row.get("history") or () for row in rows])
    kept, table, figures = scored(rows, texts)
    print("\n".join(table))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    result = figures | {"weights": str(path), "answers_file": str(keep(args, path, args.questions, lines))}
    print(json.dumps(result, ensure_ascii=False))


def asked(row: dict) -> str:
    """What a row's prompt says, or its last message."""
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


def prompts(args):
    rows, path = read_prompts(args.prompts), open_model.find_weight(args)
    lines = []
    for row, text in zip(rows, answer_all(args, open_chat(args, path), rows), strict=True):
        print(f"> {asked(row)}\n{text}\n")
        lines.append(json.dumps({"prompt": row["prompt"], "generated": text}, ensure_ascii=False) + "\n")
    kept = keep(args, path, args.prompts, lines)
    print(json.dumps({"n": len(rows), "weights": str(path), "answers_file": str(kept)}, ensure_ascii=False))


def compare(args):
    rows, columns = read_prompts(args.prompts), []
    judging = judge.connect(args.judge, args.judge_model, os.environ.get("OPENAI_API_KEY", "")) if args.judge else None
    for path in map(Path, args.compare):
        columns.append(answer_all(args, open_chat(args, path), rows))
    print("| prompt | " + " | ".join(f"`{path}`" for path in args.compare) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for texts in zip(map(asked, rows), *columns, strict=True):
        cells = (text.strip().replace("|", "\\|").replace("\n", "<br>") for text in texts)
        print("| " + " | ".join(cells) + " |")
    if judging:
        whole = [judge.transcript(row["prompt"]) for row in rows]
        verdicts = judge.judge(judging, whole, columns, lambda done, of: note(f"[{done} of {of} pairs judged]"))
        summary = judge.summarise(verdicts, args.compare)
        print("\n" + "\n".join(judge.table(summary)) + "\n")
        kept = keep(args, Path("judged"), args.prompts, judge.rows(verdicts, whole, columns, args.compare))
        result = {"n": len(rows), "judge": args.judge, "judge_model": judging.model, **summary}
        print(json.dumps(result | {"answers_file": str(kept)}, ensure_ascii=False))


def main(argv=None):
    args = parse(argv)
    mode = compare if args.compare else questions if args.questions else prompts if args.prompts else chat
    with user_errors():
        mode(args)


if __name__ == "__main__":
    run_main(main)
