"""Data work before training, one subcommand a job: `python data_process.py clean --help` explains the longest.

Each subcommand prints a table of what it did and, as its last line on stdout, one JSON object.
"""

import dataclasses
import json
import os
import sys

from common.errors import UserError, run_main
from common.flags import Parser


def sample(args):
    """Write the embedded sample (dataset/sample) from the facts in dataset/world."""
    from sample.make_sample import make_sample

    try:
        counts = make_sample(args.out_dir, args.seed)
    except (OSError, ValueError) as error:
        raise UserError(f"sample: {error}") from error
    for name, count in counts.items():
        print(f"{name:<40}{count:>8,}")
    return {"stage": "sample", "seed": args.seed, "out_dir": args.out_dir, "counts": counts}


def clean(args):
    """Bring raw collections into a stage's file: read, normalise, filter, drop copies, hold out, mix."""
    from cleaning.clean import Settings, clean
    from cleaning.dedup import THRESHOLD
    from cleaning.filters import PROFILES
    from common.workers import default_workers

    overrides = {name: getattr(args, name) for name in ("min_chars", "max_chars", "min_chinese", "languages",
                 "max_symbols", "max_repetition") if getattr(args, name) is not None}  # fmt: skip
    if "min_chinese" in overrides:
        overrides["min_chinese_turn"] = args.min_chinese
    if "languages" in overrides:
        overrides["languages"] = None if "any" in args.languages else tuple(args.languages)
    profile = dataclasses.replace(PROFILES[args.profile], **overrides)
    _refuse_idle_flags(args, profile.chat_text)
    settings = Settings(
        to=args.to, profile=profile, encoding=args.encoding, txt_rows=args.txt_rows, text_key=args.text_key,
        dedup=args.dedup, threshold=THRESHOLD if args.threshold is None else args.threshold,
        heldout=args.heldout, weights=tuple(args.weights or ()),
        keep_dropped=args.keep_dropped, seed=args.seed,
    )  # fmt: skip
    engine = None
    if args.engine == "ray":
        from cleaning.cluster import Ray

        engine = Ray(args.workers)
    workers = args.workers or default_workers()
    summary = clean(args.data_path, args.out_dir, settings, workers, args.overwrite, engine)
    for reason, count in [("kept", summary["kept"]), *summary["reasons"].items()]:
        print(f"{reason:<28}{count:>12,}{count / summary['rows']:>9.2%}")
    for name, count in summary["written"].items():
        print(f"{name:<28}{count:>12,} rows{summary['characters'][name]:>16,} characters")
    print(f"{summary['documents_per_second']:,.0f} documents a second with {summary['workers']} process(es)")
    return summary


def _refuse_idle_flags(args, chat_text: bool):
    """Flags that would change nothing beside the others; chat_text: whether the profile tests the text of chats."""
    chat = args.to in ("sft", "dpo")
    for names, idle, why in (
        (("min_chars", "max_chars", "text_key"), chat, f"texts, not for --to {args.to}"),
        (("max_symbols", "max_repetition", "languages"), chat and not chat_text,
         f"texts with --profile {args.profile}, not for --to {args.to}"),
        (("threshold",), args.dedup != "near", f"--dedup near, not for --dedup {args.dedup}"),
    ):  # fmt: skip
        for name in names:
            if idle and getattr(args, name) is not None:
                raise UserError(f"--{name} would change nothing: it is for {why}")


def report(args):
    """Describe a stage file: rows, tokens, lengths, languages, copies, turns, samples, a plot."""
    from cleaning.report import describe, print_report

    found = describe(args.file, args.tokenizer, args.samples, args.seed, args.plot, args.workers)
    print_report(found)
    return found


def fill(args):
    """Fill {{name}}, {{author}} and other placeholders in a file of rows."""
    from cleaning.fill import fill

    values = {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--set {pair}: write it as name=value")
        values[key] = value
    result = fill(args.file, args.out, values)
    print(f"{result['rows']:,} rows, {result['filled']:,} placeholders filled -> {args.out}")
    return result


def distill(args):
    """Ask a model behind an OpenAI-compatible API for answers to a file of prompts, as rows for SFT."""
    from cleaning.distill import distill
    from common.chat_api import ChatApi

    key = args.api_key or os.environ.get("OPENAI_API_KEY", "")
    teacher = ChatApi(args.base_url, args.model, key, args.max_tokens, args.temperature, args.timeout, args.retries)
    return distill(args.file, args.out, teacher, args.system, args.in_flight, args.max_requests, args.token_budget)


def add_clean(commands):
    from cleaning.dedup import THRESHOLD
    from cleaning.filters import LANGUAGES, PROFILES
    from data.reading import ENCODINGS

    command = commands.add_parser("clean", help=clean.__doc__, description=clean.__doc__)
    command.add_argument("--data_path", nargs="+", required=True, metavar="PATH", help="raw files and folders of them")
    command.add_argument("--out_dir", required=True, metavar="FOLDER", help="a new folder for the stage's files")
    command.add_argument("--to", choices=("pretrain", "sft", "dpo", "tokenizer"), default="pretrain",
                         help="the stage to write for (default: %(default)s)")  # fmt: skip
    command.add_argument("--profile", choices=tuple(PROFILES), default="default", help="thresholds (%(default)s)")
    for name, kind, text in (
        ("min_chars", int, "shortest document"), ("max_chars", int, "longest document"),
        ("min_chinese", float, "least share of Chinese characters"), ("max_symbols", float, "largest share of symbols"),
        ("max_repetition", float, "largest share of repeated 8-grams"),
    ):  # fmt: skip
        command.add_argument(f"--{name}", type=kind, metavar="N", help=f"{text} (the profile's)")
    command.add_argument("--languages", nargs="+", metavar="NAME", choices=(*LANGUAGES, "any"),
                         help=f"of {', '.join(LANGUAGES)}, or any (zh en code)")  # fmt: skip
    command.add_argument("--text_key", metavar="NAME", help="key or column of the text (text, else content)")
    command.add_argument("--txt_rows", choices=("document", "line"), default="document",
                         help="what a .txt or .md file is made of (%(default)s)")  # fmt: skip
    command.add_argument("--encoding", choices=ENCODINGS, default="utf-8",
                         help="gb18030: what is not UTF-8 is read as GB18030 (%(default)s)")  # fmt: skip
    command.add_argument("--dedup", choices=("near", "exact", "none"), default="near", help="copies (%(default)s)")
    command.add_argument("--threshold", type=float, metavar="S",
                         help=f"similarity from which a text is a near copy ({THRESHOLD})")  # fmt: skip
    command.add_argument("--heldout", type=float, default=0.0, metavar="SHARE", help="share held out (%(default)s)")
    command.add_argument("--weights", nargs="+", type=float, metavar="W", help="copies of the rows of each path (1)")
    command.add_argument("--engine", choices=("pool", "ray"), default="pool",
                         help="processes of this machine, or of the cluster at RAY_ADDRESS (%(default)s)")  # fmt: skip
    command.add_argument("--workers", type=int, metavar="N",
                         help="processes (this machine's cores; a cluster has its own)")  # fmt: skip
    command.flag(command, "keep_dropped", False, "write the dropped rows with their reasons to dropped.jsonl")
    command.flag(command, "overwrite", False, "replace earlier output, when the new one is whole")
    command.add_argument("--seed", type=int, default=42, help="of hold-out and mixing (%(default)s)")
    command.set_defaults(run=clean)


def add_report(commands):
    from common.workers import default_workers

    command = commands.add_parser("report", help=report.__doc__, description=report.__doc__)
    command.add_argument("file", metavar="FILE")
    command.add_argument("--tokenizer", metavar="FOLDER", help="default: the project's")
    command.add_argument("--samples", type=int, default=3, metavar="N", help="rows to show (%(default)s)")
    command.add_argument("--plot", metavar="FILE.png", help="draw lengths and languages (.png, .pdf, .svg)")
    command.add_argument("--workers", type=int, default=default_workers(), metavar="N", help="processes (%(default)s)")
    command.add_argument("--seed", type=int, default=42, help="of the samples (%(default)s)")
    command.set_defaults(run=report)


def add_fill(commands):
    command = commands.add_parser("fill", help=fill.__doc__, description=fill.__doc__)
    command.add_argument("file", metavar="FILE")
    command.add_argument("--set", action="append", required=True, metavar="name=value", help="may be given many times")
    command.add_argument("--out", required=True, metavar="FILE", help="the filled file")
    command.set_defaults(run=fill)


def add_distill(commands):
    command = commands.add_parser("distill", help=distill.__doc__, description=distill.__doc__)
    command.add_argument("file", metavar="PROMPTS", help=".txt: one a line; .jsonl: prompt, question or conversations")
    command.add_argument("--out", required=True, metavar="FILE.jsonl", help="rows for SFT")
    command.add_argument("--base_url", required=True, metavar="URL", help="such as http://127.0.0.1:8998/v1")
    command.add_argument("--model", required=True, help="the teacher's name at the server")
    command.add_argument("--api_key", help="default: the environment's OPENAI_API_KEY")
    command.add_argument("--system", metavar="TEXT", help="a system message to send, not kept in the rows")
    command.add_argument("--in_flight", type=int, default=4, metavar="N", help="requests at a time (%(default)s)")
    command.add_argument("--retries", type=int, default=5, metavar="N", help="of one request (%(default)s)")
    command.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="of one request (%(default)s)")
    command.add_argument("--max_tokens", type=int, default=1024, metavar="N", help="of one answer (%(default)s)")
    command.add_argument("--temperature", type=float, default=0.7, metavar="T", help="(%(default)s)")
    command.add_argument("--max_requests", type=int, metavar="N", help="stop after so many prompts of this run")
    command.add_argument("--token_budget", type=int, metavar="N", help="stop after so many tokens in all, of all runs")
    command.set_defaults(run=distill)


def parse(argv=None):
    """The command line; `args.run` is the chosen subcommand's function."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("sample", help=sample.__doc__, description=sample.__doc__)
    command.add_argument("--out_dir", default="dataset/sample", help="folder for the files (default: %(default)s)")
    command.add_argument("--seed", type=int, default=42, help="the same seed gives the same bytes")
    command.set_defaults(run=sample)
    for add in (add_clean, add_report, add_fill, add_distill):
        add(commands)
    args = parser.parse_args(argv)
    for name, least, most in (("workers", 1, None), ("samples", 0, None), ("heldout", 0, 0.5), ("threshold", 0.05, 1),
                              ("min_chars", 0, None), ("max_chars", 1, None), ("min_chinese", 0, 1),
                              ("max_symbols", 0, 1), ("max_repetition", 0, 1),
                              ("in_flight", 1, 256), ("retries", 0, None), ("max_tokens", 1, None),
                              ("temperature", 0, None), ("timeout", 0.1, None), ("max_requests", 1, None),
                              ("token_budget", 1, None)):  # fmt: skip
        value = getattr(args, name, None)
        # NaN fails every comparison, and infinity is above the largest float.
        if value is not None and not least <= value <= (sys.float_info.max if most is None else most):
            wanted = f"at least {least}" if most is None else f"from {least} to {most}"
            raise UserError(f"--{name} must be {wanted}, not {value}")
    return args


def main(argv=None):
    """Run the chosen subcommand; its result is the last line on stdout."""
    args = parse(argv)
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        print("stopped; give the same command again", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
