"""What the programs that talk have in common: flags, opening a model, prompts from files, printing as it comes.

Mistakes of the user are ValueErrors with one sentence; the programs turn them into one line and exit code 2.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.text import ThinkingStream
from model.convert import NoCounterpart
from model.device import pick_device, pick_dtype
from model.LMConfig import PRESETS
from model.tokenizer import load_tokenizer
from model.weights import load_model, newest_weights

DIM, PLAIN = "\033[2m", "\033[0m"


# ------------------------------------------------------------------------------------------------------------ flags
def add_model_flags(parser) -> None:
    g = parser.add_argument_group("model")
    g.add_argument("--weight", metavar="PATH", help="weights file or transformers folder (the newest in out/)")
    g.add_argument("--preset", choices=list(PRESETS), metavar="NAME",
                   help="shape of a MiniMind state dict, where several fit its tensors")  # fmt: skip
    g.add_argument("--tokenizer", metavar="FOLDER", help="for weights that come without one")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (auto)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="(auto: bfloat16 where a GPU has it, float16 on older ones, else float32)")  # fmt: skip
    g.add_argument(
        "--quantize", choices=("none", "int8"), default="none", help="8-bit weights (FBGEMM, dynamic), CPU only (none)"
    )
    g.add_argument("--rope_scaling", type=rope_scaling, default=None, metavar="none|linear:F|yarn:F",
                   help="texts up to F times as long as those trained on (none)")  # fmt: skip


def add_sampling_flags(parser, temperature: float | None, max_new_tokens: int) -> None:
    g = parser.add_argument_group("sampling")
    g.add_argument("--max_new_tokens", type=int, default=max_new_tokens, metavar="N", help=f"({max_new_tokens})")
    told = "0.85 in a chat, 0 for files" if temperature is None else temperature
    g.add_argument("--temperature", type=float, default=temperature, metavar="X", help=f"0: the best token ({told})")
    g.add_argument("--top_p", type=float, default=0.85, metavar="X", help="(0.85)")
    g.add_argument("--top_k", type=int, default=0, metavar="N", help="0: all (0)")
    g.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help="1: none (1.0)")
    g.add_argument("--seed", type=int, default=None, metavar="N", help="same seed, same text (a new one each time)")


def rope_scaling(text: str) -> tuple[str, float] | None:
    """ "yarn:4" -> ("yarn", 4.0)."""
    if text == "none":
        return None
    kind, _, factor = text.partition(":")
    try:
        if kind in ("linear", "yarn") and float(factor) >= 1:
            return kind, float(factor)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not none, linear:F or yarn:F with a factor F of at least 1")


def sampling(args, temperature: float | None = None) -> SamplingParams:
    """The sampling flags; `temperature` where the flag was not given."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")
    return SamplingParams(
        max_tokens=args.max_new_tokens, temperature=temperature if args.temperature is None else args.temperature,
        top_p=args.top_p, top_k=args.top_k, repetition_penalty=args.repetition_penalty, seed=args.seed,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- opening a model
def find_weight(args, base: bool = False) -> Path:
    """--weight, or the newest weights in out/: of a base model (`base`) or of any later stage."""
    if args.weight:
        return Path(args.weight)
    found = newest_weights("out", want="pretrain") if base else newest_weights("out", unwanted="pretrain")
    if found is None:
        kind, command = ("a base model", "1-pretrain.py") if base else ("a chat model", "3-full_sft.py")
        raise ValueError(f"no weights of {kind} in out/; run `python {command}` first, or give --weight PATH")
    return found


def open_engine(args, path: Path, foreign: bool = False, **options) -> tuple[Engine, dict]:
    """-> the engine for the weights at `path`, and their training record.

    foreign: a transformers folder of a kind that has no counterpart here is run by transformers' own class.
    """
    try:
        model, tokenizer, record = load_model(path, args.preset)
    except NoCounterpart as error:
        if not foreign or args.rope_scaling:
            raise
        model, tokenizer, record = *load_foreign(path, error), {}
        options["own_template"] = True
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise ValueError(
            f"{path} comes without a tokenizer; name the folder of the one it was trained with: --tokenizer"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, {path} only {model.config.vocab_size}")
    if args.rope_scaling:
        stretch(model.config, *args.rope_scaling, record.get("seq_len"))
    device = pick_device(args.device)
    model = model.to(device, pick_dtype(args.dtype, device))
    return Engine(model, tokenizer, quantize=None if args.quantize == "none" else args.quantize, **options), record


def load_foreign(path: Path, fault: ValueError) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any model that transformers has a class for, from a folder and without the folder's code; else raises `fault`."""
    try:
        code = {"trust_remote_code": False}  # without the word transformers would ask whether to run it
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **code)
        tokenizer = AutoTokenizer.from_pretrained(path, **code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{fault}; and transformers cannot run it: {str(error).splitlines()[0]}") from None
    if found["missing_keys"]:
        raise ValueError(f"{path} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}")
    return model.eval(), tokenizer


def stretch(config, kind: str, factor: float, trained: int | None) -> None:
    """Rotary positions for texts `factor` times as long as the rows of `trained` tokens the model learned on."""
    trained = trained or config.max_seq_len
    config.rope_parameters = config.rope_parameters | {
        "rope_type": kind, "factor": factor, "original_max_position_embeddings": trained,
    }  # fmt: skip
    config.max_seq_len = max(config.max_seq_len, int(trained * factor))


# ---------------------------------------------------------------------------------------------------------- prompts
def read_prompts(path) -> list[dict]:
    """A file of prompts -> rows with "prompt": a text, or messages (of "conversations", its last answer left out).

    .jsonl: objects with "prompt", "question" or "conversations", other keys are kept; else one prompt a line.
    """
    path, rows = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _json_row(line, f"{path}:{number}") if path.suffix == ".jsonl" else {"prompt": line.strip()}
            rows.append(row | {"line": number})
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _json_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    for key in ("prompt", "question", "conversations"):
        if row.get(key) and isinstance(row[key], list if key == "conversations" else str):
            return row | {"prompt": row[key] if isinstance(row[key], str) else _question_of(row[key], where)}
    raise ValueError(f'{where}: no "prompt" or "question" that is a text, no "conversations"')


def _question_of(messages: list, where: str) -> list[dict]:
    """A conversation without its last answer."""
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{where}: "conversations" must be a list of messages')
    messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    if not messages:
        raise ValueError(f"{where}: the conversation asks nothing")
    return messages


def as_messages(prompt, system: str | None = None) -> list[dict]:
    """A text or messages -> messages, with the system message in front where there is none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system and messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


# --------------------------------------------------------------------------------------------------------- printing
def typed(forget) -> Iterator[str]:
    """The questions of a chat, until an empty line, Ctrl-D or Ctrl-C; at /clear forget() is called."""
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "/clear":
            forget()
        elif question:
            yield question
        else:
            return


def thought_marks() -> tuple[str, str]:
    """What is printed before and after thinking: dimmed on a terminal, between words elsewhere."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return (DIM, PLAIN) if colour else ("[thinks] ", " [/thinks]\n")


def print_stream(pieces, thinking: bool = False) -> str:
    """Prints pieces as they come, thinking dimmed (between marks where the output is no terminal) -> the whole text."""
    begin, end = thought_marks()
    stream, text, in_thought = ThinkingStream(thinking), "", False
    try:
        for piece in pieces:
            text += piece.text
            for thought, part in stream.feed(piece.text, final=piece.finish_reason is not None):
                if thought != in_thought:
                    print(begin if thought else end, end="")
                    in_thought = thought
                print(part, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")  # Ctrl-C ends this answer, not the program
    print(end if in_thought else "")
    return text


def note(text: str) -> None:
    """A remark that is no part of the answer: standard error."""
    print(text, file=sys.stderr, flush=True)
