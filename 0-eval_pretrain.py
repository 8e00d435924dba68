"""Continue texts with a base model: what has it learned from pretraining?

    python 0-eval_pretrain.py                                  a handful of beginnings
    python 0-eval_pretrain.py "从前有座山，" "The sea is"          your own
    python 0-eval_pretrain.py --prompts FILE --temperature 0   one a line, or .jsonl with "prompt"
    python 0-eval_pretrain.py --score FILE...                  bits per byte of each file's texts, instead

A base model continues text; it does not answer. Chat with a model that went on to 3-full_sft.py in 2-eval.py.
"""

import json

from chat import terminal
from chat.terminal import note
from common.errors import run_main, user_errors
from common.flags import Parser
from data.prompts import read_prompts
from data.reading import iter_rows
from inference import open_model

BEGINNINGS = (
    "中国的首都是", "一年有四个季节，", "水烧到一百度就会", "从前有一只小狐狸，",
    "太阳系里最大的行星是", "做番茄炒蛋，先", "The capital of France is", "Once upon a time",
)  # fmt: skip


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="beginnings to continue")
    parser.add_argument("--prompts", metavar="FILE", help="beginnings from a file")
    parser.add_argument("--score", nargs="+", metavar="FILE", help="bits per byte of {'text'} rows, held out by you")
    parser.add_argument("--score_length", type=int, metavar="TOKENS", help="read at once (what it was trained on)")
    open_model.add_model_flags(parser)
    open_model.add_sampling_flags(parser, temperature=0.85, max_new_tokens=128)
    return parser.parse_args(argv)


def run(args):
    params = open_model.sampling(args)
    texts = list(args.texts)
    if args.prompts:
        texts += [row["prompt"] for row in read_prompts(args.prompts)]
    path = open_model.find_weight(args, base=True)
    engine, record = open_model.open_engine(args, path)
    note(f"{path}: {record.get('stage', 'stage unknown')}, {engine.source.num_parameters():,} parameters")
    if args.score:
        return score(engine, args.score, args.score_length or record.get("seq_len", 512))
    for text in texts or BEGINNINGS:
        print(f"\n{text}", end="", flush=True)
        terminal.print_answer(("content", piece.text) for piece in engine.stream(text, params))
        note(f"[{engine.speed}]")


def score(engine, files, length):
    """Prints a line a file, and last one JSON object {file: bits per byte}."""
    found = {}
    for file in files:
        found[file], n_bytes = engine.bits_per_byte(iter_rows([file], "text"), length)
        note(f"{file}: {found[file]:.4f} bits per byte of {n_bytes:,}")
    print(json.dumps(found, ensure_ascii=False))


def main(argv=None):
    args = parse(argv)
    with user_errors():
        run(args)


if __name__ == "__main__":
    run_main(main)
