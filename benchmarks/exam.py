"""CPU seconds of an exam: all questions together against one question at a time, and the answers of both.

A random model of the preset's shape, C-Eval's layout in --data_dir. With worked examples the questions of a subject
begin with the same text, which is read once; without them they share passes. The way of one at a time is measured on
every --every-th question, and its letters must be those of the exam as a whole.
"""

import time
from dataclasses import replace

import torch

from exams import exam
from inference.engine import Engine
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer


def add_flags(parser) -> None:
    parser.add_argument("--data_dir", required=True, metavar="FOLDER", help="C-Eval's layout")
    parser.add_argument("--preset", default="minimind2-small", help="(%(default)s)")
    parser.add_argument("--split", default="val", help="(%(default)s)")
    parser.add_argument("--shots", type=int, default=5, help="of the way with worked examples (%(default)s)")
    parser.add_argument("--every", type=int, default=20, metavar="N", help="asked one at a time (%(default)s)")


def measured(engine, subjects, ask) -> tuple[float, list[str]]:
    """CPU seconds, and the letters chosen."""
    begin = time.process_time()
    graded = exam.take_exam(engine, subjects, ask)
    return time.process_time() - begin, [a.chosen for s in subjects for a in graded.answers[s.name]]


def run(args) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig.from_preset(args.preset, initializer_range=0.1)).eval()
    engine = Engine(model, load_tokenizer())
    subjects = exam.read_exam(args.data_dir, "ceval", args.split)
    ways = {
        "chat": exam.AskByChat(engine),
        f"{args.shots}-shot": exam.AskByCompletion(engine, "ceval", args.shots),
    }
    result = {"preset": args.preset, "questions": sum(len(s.questions) for s in subjects)}
    for name, ask in ways.items():
        together, letters = measured(engine, subjects, ask)
        alone, differ, asked = 0.0, 0, 0
        singles = [replace(s, questions=[q]) for s in subjects for q in s.questions]
        for single, letter in list(zip(singles, letters, strict=True))[:: args.every]:
            seconds, (one,) = measured(engine, [single], ask)
            alone, differ, asked = alone + seconds, differ + (one != letter), asked + 1
        faster = alone / asked * len(letters) / together
        print(f"{name}: {together:.0f} CPU seconds together, {alone / asked:.2f} a question alone: {faster:.1f} times, "
              f"{differ} of {asked} letters differ", flush=True)  # fmt: skip
        result[name] = {"cpu_seconds": together, "faster": faster, "letters_differ": differ, "asked_alone": asked}
    return result
