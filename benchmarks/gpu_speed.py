"""Training steps, generating and exams on a device, in this process.

A training step is the loop's own (take_step) beside transformers' class of the same mathematics as its Trainer drives
it: rows of one document each, so that both may use flash attention without a mask, the same autocast, fused AdamW,
clipping. Each side is alone in memory while it is measured.
"""

import gc
import math
import time
import traceback
from contextlib import contextmanager
from functools import cache, partial

import torch

from benchmarks.parts import Case, Part, counterpart, spread
from benchmarks.stages import SAMPLE
from common.device import device_and_dtype, pick_device, pick_dtype
from common.errors import out_of_memory
from exams import exam
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import sequences
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from trainer.engine import TrainingEngine
from trainer.log import device_flops, flops_per_token
from trainer.loop import language_model, take_step
from trainer.memory import training_bytes
from trainer.optimizers import make_optimizers
from trainer.prefetch import ready_for
from trainer.stage_flags import parse, stage_parser
from trainer.world import World

WARM_UP, STRETCHES = 3, 3  # steps before the first measured one; measurements, whose median is given
STREAMS = ("1", "16", "64")
PROMPT_TOKENS = 16
SEQ_LEN = 512
OURS = {"ours": "adamw", "muon": "muon"}  # sides of a comparison, and their optimizers
IN_TURN = "transformers, experts in turn"
EXAMS = {"letters": exam.AskByChat, "text": exam.AskByText}


# -------------------------------------------------------------------------------------------------------- common ground
@contextmanager
def as_in_training():
    """float32 products in TF32, as trainer.world.join lets them; afterwards as before."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def tried(figures: dict, name: str, measure, refusals=()) -> None:
    """figures[name] = measure(); words instead where memory was not enough, and for errors of the kinds `refusals`.

    Any other error is noted as the case's; what else the case measures goes on.
    """
    try:
        figures[name] = measure()
    except Exception as error:  # whatever a library raises
        words = str(error) if isinstance(error, refusals) else out_of_memory(error)
        figures[name] = {"refused": words} if words else None
        if not words:
            traceback.print_exc()
            figures["error"] = f"{name}: {str(error).strip().partition(chr(10))[0]}"
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------ training steps
def our_step(args, config: LMConfig, rows: int, optimizer: str, compiled: bool):
    """-> (function that takes a step, world, the formula's bytes)."""
    flags = ["--device", args.device, "--optimizer", optimizer, "--batch_size", rows, "--seq_len", SEQ_LEN]
    stage_args = parse(stage_parser("pretrain", ""), list(map(str, flags)) + ["--compile"] * compiled)
    world = World(0, 1, *device_and_dtype(stage_args))
    engine = TrainingEngine(MiniMindForCausalLM(config), stage_args, world)
    ids = random_rows(config, rows)
    batch = {
        "input_ids": ids, "labels": ids, "segment_ids": torch.ones_like(ids),
        "count": torch.tensor(rows * (SEQ_LEN - 1)), "real_tokens": torch.tensor(rows * SEQ_LEN),
    }  # fmt: skip
    batch = ready_for(world.device, batch, most_documents=1)
    formula = training_bytes(config, stage_args, world, rows, config.parameter_count())
    return lambda: take_step(engine, [batch], language_model, 1.0, 0), world, formula


def their_step(args, config: LMConfig, rows: int, in_turn: bool, compiled: bool):
    """-> (function that takes a step, world). in_turn: experts one after the other, whose products autocast makes half
    precision; those of its grouped kernel it leaves in float32, the weights' type (transformers 5.24)."""
    device = pick_device(args.device)
    world = World(0, 1, device, pick_dtype("auto", device))
    model, ids = counterpart(config).to(device).train(), random_rows(config, rows).to(device)
    if in_turn:
        model.set_experts_implementation("eager")
    (optimizer,) = make_optimizers(model, "adamw", learning_rate=1e-3, weight_decay=0.1)
    forward = torch.compile(model) if compiled else model

    def step():
        with world.autocast():
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, world


def random_rows(config: LMConfig, rows: int) -> torch.Tensor:
    return torch.randint(3, config.vocab_size, (rows, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def step_figures(args, config: LMConfig, rows: int, side: str, compiled: bool) -> dict:
    """Tokens a second, share of the device's peak (None where that is unknown), most bytes a GPU has held."""
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if side in OURS:
        step, world, *formula = our_step(args, config, rows, OURS[side], compiled)
    else:
        step, world, *formula = their_step(args, config, rows, side == IN_TURN, compiled)
    for _ in range(WARM_UP):
        step()
    speeds, n = [], math.ceil(args.steps / STRETCHES)
    for _ in range(STRETCHES):
        wait_for(device)
        begin = time.perf_counter()
        for _ in range(n):
            step()
        wait_for(device)
        speeds.append(n * rows * SEQ_LEN / (time.perf_counter() - begin))
    speed, peak_flops = spread(speeds), device_flops(world)
    return {
        "tokens_per_second": speed,
        "mfu": speed["median"] * flops_per_token(config, SEQ_LEN) / peak_flops if peak_flops else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        **({"formula_bytes": formula[0]} if formula else {}),
    }


def measure_step(args, preset: str, rows: str, compiled=False) -> dict:
    config, figures = LMConfig.from_preset(preset), {}
    with as_in_training():
        for side in ("ours", *(() if compiled else ("muon",)), "transformers", *((IN_TURN,) if config.use_moe else ())):
            tried(figures, side, partial(step_figures, args, config, int(rows), side, compiled))
    return figures


def measure_compiled_step(args, preset: str, rows: str) -> dict:
    return measure_step(args, preset, rows, compiled=True)


# ---------------------------------------------------------------------------------------------------------- generating
def speaker(args, preset: str) -> Engine:
    """The engine of a random model, as the server would hold it on the device."""
    device = pick_device(args.device)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig.from_preset(preset)).eval()
    return Engine(model.to(device, pick_dtype("auto", device)), load_tokenizer())


def decode_figures(engine: Engine, streams: int, new_tokens: int, compiled: bool) -> dict:
    """Tokens a second of all streams together, their prompts of 16 tokens read meanwhile; and what they say."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(20, engine.vocab_size, (streams, PROMPT_TOKENS), generator=generator).tolist()
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    batch, speeds = engine.batch(streams, compiled), []
    for stretch in range(STRETCHES + 1):
        answers = [sequences(engine, prompt, params) for prompt in prompts]
        for samples in answers:
            batch.join(samples)
        begin = time.perf_counter()
        while batch.busy:
            batch.step()
        if stretch:  # the first one warms up, and compiles
            speeds.append(streams * new_tokens / (time.perf_counter() - begin))
    return {"tokens_per_second": spread(speeds), "answers": [samples[0].token_ids for samples in answers]}


def measure_decode(args, preset: str, streams: str) -> dict:
    engine, figures = speaker(args, preset), {}
    for name, compiled in (("eager", False), ("compiled", True)):
        measure = partial(decode_figures, engine, int(streams), args.new_tokens, compiled)
        tried(figures, name, measure, refusals=ValueError)
    said = [(figures[name] or {}).pop("answers", []) for name in ("eager", "compiled")]
    figures["other_answers"] = sum(a != b for a, b in zip(*said)) if all(said) else None
    return figures


# --------------------------------------------------------------------------------------------------------------- exams
@cache
def exam_answers(preset: str, form: str, device: torch.device, dtype: torch.dtype) -> list[exam.Answer]:
    """To the sample's exam, of a random model whose choices are spread over the letters."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig.from_preset(preset, initializer_range=0.1)).eval().to(device, dtype)
    engine = Engine(model, load_tokenizer())
    graded = exam.take_exam(engine, exam.read_exam(SAMPLE / "exam", "ceval"), EXAMS[form](engine))
    return [answer for of_subject in graded.answers.values() for answer in of_subject]


def measure_exam(args, form: str, dtype: str) -> dict:
    device = pick_device(args.device)
    here = exam_answers(args.presets[0], form, device, pick_dtype(dtype, device))
    cpu = exam_answers(args.presets[0], form, torch.device("cpu"), torch.float32)
    pairs = list(zip(here, cpu, strict=True))
    apart = max(abs(p - q) for a, b in pairs for p, q in zip(a.probabilities, b.probabilities, strict=True))
    return {
        "questions": len(pairs), "other_answers": sum(a.chosen != b.chosen for a, b in pairs),
        "largest_difference": apart, "right": sum(a.right for a in here), "right_on_cpu": sum(a.right for a in cpu),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- parts
def step_cases(args) -> list[Case]:
    return [(preset, str(rows)) for preset in args.presets for rows in args.rows]


def speed(name: str):
    return lambda figures: f"{figures[name]['tokens_per_second']['median']:,.0f}"


def mfu(name: str):
    return lambda figures: f"{figures[name]['mfu']:.1%}"


def ratio(one: str, other: str):
    return lambda f: f"{f[one]['tokens_per_second']['median'] / f[other]['tokens_per_second']['median']:.2f}"


def against_the_faster(figures: dict) -> str:
    """Ours over transformers' class in whichever of its two ways with experts is the faster one."""
    theirs = [(figures.get(side) or {}).get("tokens_per_second") for side in ("transformers", IN_TURN)]
    faster = max((speed["median"] for speed in theirs if speed), default=None)
    return f"{figures['ours']['tokens_per_second']['median'] / faster:.2f}"


def gib(name: str, kind: str):
    return lambda figures: f"{figures[name][kind] / 2**30:.2f}"


def columns(*sides: str) -> dict:
    """Of a training step: each side's speed and memory."""
    found = {}
    for side in sides:
        found |= {f"{side}, tokens/s": speed(side), f"{side}, MFU": mfu(side)}
    found |= {"experts in turn": speed(IN_TURN), "ours / the faster": against_the_faster}
    for side in sides:
        found[f"{side}, GiB"] = gib(side, "peak_bytes")
        if side in OURS:
            found[f"{side}, formula"] = gib(side, "formula_bytes")
    return found


STEPS = (
    f"training steps on rows of {SEQ_LEN} tokens by AdamW (ours, and transformers' class of the same mathematics) and "
    "by Muon (ours); with experts, transformers' by its grouped kernel and in turn; the most memory torch held, beside "
    "the formula of trainer/memory.py. A dash: it does not fit, or cannot be told."
)
PARTS = {
    "speed": Part(STEPS, step_cases, measure_step, ("preset", "rows"), columns("ours", "muon", "transformers")),
    "compiled": Part(
        f"with `--compile`: {STEPS}", step_cases, measure_compiled_step, ("preset", "rows"),
        columns("ours", "transformers"),
    ),
    "decode": Part(
        "tokens a second of all streams together, greedy, after prompts of 16 tokens; compiled: CUDA graphs, as the "
        "server's `--compile`, and how many streams said something else than the eager ones.",
        lambda args: [(preset, streams) for preset in args.presets for streams in STREAMS],
        measure_decode, ("preset", "streams"),
        {
            "tokens/s": speed("eager"), "compiled": speed("compiled"), "compiled / eager": ratio("compiled", "eager"),
            "other answers": lambda f: f"{f['other_answers']:d}",
        },
    ),
    "exams": Part(
        "the sample's exam, put to one random model here and on the CPU in float32: answers that differ, and the "
        "largest difference of an answer's probability among the four.",
        lambda args: [(form, dtype) for dtype in ("auto", "float32") for form in EXAMS],
        measure_exam, ("form", "precision"),
        {
            "questions": lambda f: str(f["questions"]), "other answers": lambda f: str(f["other_answers"]),
            "farthest apart": lambda f: f"{f['largest_difference']:.1e}", "right": lambda f: str(f["right"]),
            "right on the CPU": lambda f: str(f["right_on_cpu"]),
        },
    ),
}  # fmt: skip
