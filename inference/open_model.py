"""What all programs that generate have in common: flags for model and sampling, and opening a model.

A mistake of the user is a ValueError with one sentence; the programs turn it into one line and exit code 2.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.device import pick_device, pick_dtype
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.convert import NoCounterpart
from model.LMConfig import PRESETS
from model.lora import load_lora, use_lora
from model.peft_folder import load_peft
from model.tokenizer import load_tokenizer
from model.weights import load_model
from model.weights_file import newest_weights


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
    g.add_argument("--rope_scaling", type=rope_scaling, default=None, metavar="none|linear:F|yarn:F",
                   help="for texts up to F times as long as those it was trained on (none)")  # fmt: skip


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
    """SamplingParams of the flags. temperature: where its flag was not given."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")
    return SamplingParams(
        max_tokens=args.max_new_tokens, temperature=temperature if args.temperature is None else args.temperature,
        top_p=args.top_p, top_k=args.top_k, repetition_penalty=args.repetition_penalty, seed=args.seed,
        whole_characters=True,
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


def open_engine(args, path: Path, foreign: bool = False, adapters=(), **options) -> tuple[Engine, dict]:
    """-> the engine for the weights at `path`, and their training record.

    foreign: a transformers folder of a kind that has no counterpart here is run by transformers' own class.
    adapters: paths, see add_adapters.
    """
    try:
        model, tokenizer, record = load_model(path, args.preset)
    except NoCounterpart as error:
        if not foreign or args.rope_scaling:  # stretch() knows our own configs only
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
    add_adapters(model, adapters)  # first: what follows changes what tells whether they fit
    if args.rope_scaling:  # before the engine copies the model and reads its context
        stretch(model.config, *args.rope_scaling, record.get("seq_len"))
    device = pick_device(args.device)
    model = model.to(device, pick_dtype(args.dtype, device))
    return Engine(model, tokenizer, **options), record


def add_adapters(model, paths) -> None:
    """Adds the adapters at these paths (files of ours or peft folders) under the names of the files; none is active.

    ValueError for one of another shape, or trained on other weights; a peft folder does not say on which.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"no adapter at {path}")
        if path.is_dir():
            load_peft(model, path)
        else:
            load_lora(model, path, exact=True)
    if paths:
        use_lora(model, None)


def rows_that_fit(engine: Engine, free: int | None = None, most: int = 32) -> int:
    """Answers to generate side by side: `most`, or as many as have room for a whole context in a quarter of the memory.

    free: bytes; None: what the device has now. On two cores 32 rows serve 32 clients better than 8 do, also by the
    first token's time (docs/log.md). A cache begins small and grows with the answers, so this is what it may come to.
    """
    config, weight = engine.model.config, next(engine.source.parameters())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * weight.element_size()
    if free is None:
        free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else free_memory()
    return max(min(most, free // 4 // (of_token * engine.context)), 1)


def free_memory() -> int:
    """Bytes that this machine has free; 4 GB where it does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def load_foreign(path: Path, fault: ValueError) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any model that transformers has a class for, from a folder, whose own code is not run. Raises ValueError.

    fault: why none of our own classes holds it.
    """
    try:
        code = {"trust_remote_code": False}  # left out, transformers would ask on the terminal whether to run it
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
