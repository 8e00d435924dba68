"""What a stage runs with: data, weights, tokenizer, files. The user's mistakes are found here, before any work."""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from common.device import device_and_dtype
from common.errors import UserError, note, user_errors
from data.reading import check_file
from data.taught import taught
from model.LMConfig import DEFAULT_PRESET, LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.tokenizer_files import tokenizer_from_dict, tokenizer_hash
from model.weights import load_model
from model.weights_file import newest_weights
from trainer.checkpoint import AdapterFiles, Files, find_states, read_state
from trainer.memory import rows_that_fit
from trainer.samples import read_prompts
from trainer.stage_flags import SHAPE_FLAGS
from trainer.world import World

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "dataset" / "sample"
RECIPE_FLAGS = ("stage", "seq_len", "epochs", "max_steps", "learning_rate", "optimizer", "schedule", "warmup",
                "weight_decay", "grad_clip", "seed", "dtype", "val_split")  # fmt: skip
STAGE_SCRIPTS = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py", "reason": "train_distill_reason.py"}


@dataclass(frozen=True)
class Run:
    """What the flags of a stage stand for. prepare() makes it and train() reads it; it is never changed."""

    args: Namespace  # the flags as they were given; the fields below hold what was found for those not given
    model: MiniMindForCausalLM
    tokenizer: object
    data_files: list[Path]
    came_from: str  # the path of the starting weights, or "random (from nothing)" and the like
    files: Files  # what the run writes
    batch_size: int  # rows of one micro-batch of one process
    accumulation_steps: int  # micro-batches of a step; a resumed run may need others, see trainer.plan.Plan
    state: dict | None = None  # the saved state of a resumed run
    record: dict = field(default_factory=dict)  # how the weights were made; written into their file
    fixed: dict[str, str] = field(default_factory=dict)  # fingerprints of frozen models and the like, by their role
    other_parameters: int = 0  # how many parameters further models in memory have
    prompts: tuple[str, ...] = ()  # of --sample_prompts

    def using(self, parameters: int = 0, paths: dict[str, str] | None = None, **fingerprints: str) -> "Run":
        """A copy of the run that also uses something it does not train, such as a frozen teacher.

        fingerprints: role -> fingerprint; a resumed run must have the same ones. paths: role -> file, for the record.
        parameters: how many a further model in memory has.
        """
        fixed, record = self.fixed | fingerprints, self.record | (paths or {})
        return replace(self, fixed=fixed, record=record, other_parameters=self.other_parameters + parameters)

    def teaching(self, rows) -> "Run":
        """A copy of the run whose record also says what the training rows teach, beside what earlier stages taught."""
        told = {self.args.stage: found} if (found := taught(rows, self.tokenizer)) else {}
        return replace(self, record=self.record | {"taught": self.record.get("taught", {}) | told})

    def recipe(self, rows, global_batch_size: int) -> dict:
        """Every setting that changes what is learned. A resumed run must have the same recipe. rows: of training."""
        # Data and config are in it as the flags' meaning, not their words: a file may have moved, but not changed.
        return {name: getattr(self.args, name) for name in RECIPE_FLAGS + tuple(self.args.recipe_flags)} | {
            **self.fixed,
            "config": self.model.config.fields(),
            "data": [cache.folder.name for cache in rows.caches],
            "rows_per_step": global_batch_size,  # an older name, kept because saved states have it
        }


class Weights(NamedTuple):
    """What a run starts from. record: how the weights were made, as their file says; {} for random ones."""

    model: MiniMindForCausalLM
    tokenizer: object
    came_from: str
    record: dict


def prepare(args, minimind_files=(), sample="pretrain.jsonl", before=(), required=False, make=None, adapt=None):
    """Finds the data, weights and files of a stage -> Run. Writes nothing but an empty lock file.

    minimind_files: without --data_path, the first of these names that exists in dataset/ is the data.
    sample: the embedded sample's file, taken where none of them exists.
    before: stages whose newest weights this one starts from by default. required: without any, refuse to start.
    make() -> Weights: how to make the starting weights where there is no file of them; default: random ones.
    adapt(model): adds adapters to it. Only they are then trained and written.
    """
    # Cheap checks first: a mistyped flag should be reported before a model is loaded, which takes seconds.
    device_and_dtype(args)
    data_files = resolve_data(args, minimind_files, sample)
    name = args.save_weight or data_files[0].name.split(".")[0]  # an adapter is named after its data

    # The model. Three cases: the state of an adapter run holds the adapter alone, so the frozen weights are read from
    # their file; another resumed run needs only the shape, since its weights are in the state; a new run starts from
    # a file or from random weights.
    state = resumed_state(args, name) if args.resume else None
    if adapt is not None:
        weights = adapted_weights(args, state, before, required, adapt)
    elif state is not None:
        weights = resumed_weights(args, state)
    else:
        weights = starting_weights(args, args.from_weight, before, required, make)
    prompts = read_prompts(args.sample_prompts, weights.tokenizer, weights.model.config)
    # The names of the files hold the model's width, so they are known only now.
    files = claim_files(args, name, weights, adapters=adapt is not None)
    batch_size, accumulation_steps = micro_batch(args, weights.model, state)

    # The record tells how the weights were made. A resumed run keeps the origin its state names: it did not start
    # from its own half-trained weights.
    record = weights.record | {"stage": args.stage, "seq_len": args.seq_len, "batch_size": batch_size}
    if state is None:
        record |= {"came_from": weights.came_from, "preset": args.preset}  # a MiniMind state dict may need both
    record.pop("result", None)  # of the run that made the starting weights; this run has none yet
    fixed = {"base": weights.model.lora_base} if adapt is not None else {}
    return Run(args, weights.model, weights.tokenizer, data_files, weights.came_from, files, batch_size,
               accumulation_steps, state, record, fixed, prompts=prompts)  # fmt: skip


def resumed_weights(args, state: dict) -> Weights:
    """A model of the saved shape with random weights. loop.Session loads the saved ones, with the optimizer's state."""
    config = LMConfig(**state["config"])
    _check_shape_flags(args, config, "the run to be resumed")
    tokenizer = tokenizer_from_dict(state["tokenizer"])
    return Weights(MiniMindForCausalLM(config), tokenizer, "those of the run to be resumed", state["record"])


def adapted_weights(args, state: dict | None, before, required: bool, adapt) -> Weights:
    """Frozen weights with new adapters. Of a resumed run the frozen weights are read from where it found them at its
    start, because its state holds the adapters alone."""
    from_weight = args.from_weight or (state["record"]["came_from"] if state else None)
    weights = starting_weights(args, from_weight, before, required)
    torch.manual_seed(args.seed)  # the adapters start with random numbers
    with user_errors():
        adapt(weights.model)
    return weights._replace(record=state["record"]) if state else weights


def claim_files(args, name: str, weights: Weights, adapters: bool) -> Files:
    """The run's files, locked and checked; UserError where the run may not write them."""
    files = AdapterFiles(args, name, weights.model) if adapters else Files(args, name, weights.model.config)
    files.check_writable()
    if not args.dry_run:
        files.lock()  # before the checks below: what they find must still be true when the run writes
    if not args.resume:
        files.check_apart(weights.came_from)
    files.check_free(args)
    return files


def micro_batch(args, model, state: dict | None) -> tuple[int, int]:
    """-> (batch_size, accumulation_steps). Flags decide; without them a resumed run keeps its batch size, and a new run
    on a GPU takes as many rows together as fit into memory. The rows of a step stay the same."""
    device, dtype = device_and_dtype(args)
    if not args.batch_given and state is not None:
        return state["record"].get("batch_size", args.batch_size), args.accumulation_steps
    if not args.batch_given and device.type == "cuda":
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sizes = rows_that_fit(model.config, args, World(0, 1, device, dtype), trainable)
        note(f"{sizes[0]} of a step's rows together, by the memory of {device}; --batch_size says otherwise")
        return sizes
    return args.batch_size, args.accumulation_steps


def resolve_data(args, minimind_files, sample: str) -> list[Path]:
    """--data_path, else MiniMind's file in dataset/, else the embedded sample. Prints which, if no flag said it."""
    if args.data_path:
        return [check_file(path) for path in args.data_path]
    for name in minimind_files:
        if (ROOT / "dataset" / name).exists():
            path = ROOT / "dataset" / name
            size = f"{path.stat().st_size / 1e9:.1f} GB"
            note(f"no --data_path given: training on {path.relative_to(ROOT)}, {size}; --data_path names another file")
            return [check_file(path)]
    path = check_file(SAMPLE / sample)
    wanted = f"dataset/{minimind_files[0]} is not there" if minimind_files else "no --data_path given"
    note(f"{wanted}: training on the embedded sample {path.relative_to(ROOT)}")
    return [path]


def held_out_files(run: Run, sample: str, held_out: str) -> list[Path]:
    """The files of --val_path. Without the flag: the sample's held-out file if the sample is the data, else none."""
    if run.args.val_path:
        return [check_file(path) for path in run.args.val_path]
    return [SAMPLE / held_out] if run.data_files == [SAMPLE / sample] else []


def starting_weights(args, from_weight: str | None, before, required: bool, make=None) -> Weights:
    """The weights that `from_weight` names (a value of --from_weight, or None); the other arguments: see prepare."""
    path = find_weights("--from_weight", from_weight, before, args.out_dir)
    if path is None:
        if required and from_weight is None:
            refuse_without_weights(before, args.out_dir)
        if make is not None:
            return make()
        tokenizer = _load_tokenizer(args.tokenizer)
        return Weights(random_model(args, len(tokenizer)), tokenizer, "random (from nothing)", {})
    # Weights from a file bring their shape and tokenizer. Flags may repeat these, but not contradict them.
    model, tokenizer, record = load_weights(path, args.preset)
    _check_shape_flags(args, model.config, str(path))
    if args.tokenizer or tokenizer is None:
        chosen = _load_tokenizer(args.tokenizer)
        if tokenizer is not None and tokenizer_hash(chosen) != tokenizer_hash(tokenizer):
            raise UserError(f"--tokenizer {args.tokenizer} is not the one {path} was trained with; leave the flag out")
        tokenizer = chosen
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries, {path} only {model.config.vocab_size}: they do not fit"
        )
    return Weights(model, tokenizer, str(path), record)


def load_weights(path, preset=None):
    """model.weights.load_model, with UserError in place of ValueError."""
    with user_errors():
        return load_model(path, preset)


def random_model(args, vocab_size: int) -> MiniMindForCausalLM:
    """Random weights of the shape that --preset and the shape flags give. The same --seed gives the same weights."""
    with user_errors():
        config = LMConfig.from_preset(args.preset or DEFAULT_PRESET, **({"vocab_size": vocab_size} | shape_flags(args)))
    torch.manual_seed(args.seed)
    return MiniMindForCausalLM(config)


def find_weights(flag: str, value: str | None, before, out_dir) -> Path | None:
    """The weights file that a flag's value names: a path, or a stage. Without a value: the newest weights of the stages
    `before`, in out_dir or else in out/. None means random weights."""
    if value == "none" or (value is None and not before):
        return None
    # A word without a slash is a file if there is one of that name, else a stage such as "pretrain".
    if value is not None and (Path(value).exists() or "/" in value):
        return Path(value)
    stages = before if value is None else (value,)
    for folder in dict.fromkeys((out_dir, "out")):
        found = [path for stage in stages if (path := newest_weights(folder, want=stage))]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime_ns)
    if value is not None:
        raise UserError(f"{flag} {value}: no such file, and no {value}_* in {out_dir}")
    return None


def find_frozen(args, role: str, value: str | None, before) -> Path:
    """The file of a frozen second model: the one the flag --<role> names, else the one a resumed run had, else the
    newest weights of the stages `before`; UserError where there are none."""
    state = resumed_state(args, args.save_weight, mmap=True) if args.resume and value is None else None
    path = find_weights(f"--{role}", state["record"][role] if state else value, before, args.out_dir)
    return path or refuse_without_weights(before, args.out_dir)


def refuse_without_weights(before, out_dir) -> None:
    stage = STAGE_SCRIPTS.get(before[0], before[0])
    raise UserError(f"no weights of {' or '.join(before)} in {out_dir} or out; run `python {stage}` first")


def _load_tokenizer(folder):
    with user_errors():
        tokenizer = load_tokenizer(folder)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {folder}: it names no bos_token and eos_token, which begin and end a document")
    return tokenizer


def shape_flags(args) -> dict:
    """The shape flags that were given."""
    return {name: getattr(args, name) for name in SHAPE_FLAGS if getattr(args, name) is not None}


def _check_shape_flags(args, config, whose: str) -> None:
    """Raises UserError where the flags name another shape than the weights have. Dropout and the balance loss's weight
    are no part of the shape: these two are set in `config`."""
    wanted = shape_flags(args)
    for name in ("dropout", "aux_loss_alpha"):
        if name in wanted:
            setattr(config, name, wanted[name])
    # A preset names all fields of the shape. A flag beside it goes before the preset, as at the start of a run.
    if args.preset:
        with user_errors():
            fields = LMConfig.from_preset(args.preset, vocab_size=config.vocab_size, **wanted).fields()
        wanted = {name: fields[name] for name in SHAPE_FLAGS} | wanted
    for name in ("dropout", "aux_loss_alpha"):
        wanted.pop(name, None)
    wrong = [f"{name} {value} (there: {getattr(config, name)})" for name, value in wanted.items()
             if getattr(config, name) != value]  # fmt: skip
    if wrong:
        raise UserError(f"{whose} has another shape than the flags say: {', '.join(wrong)}; leave them out")


def resumed_state(args, name: str, mmap=False) -> dict | None:
    """The saved state that --resume goes on from, None where there is none. name: the first part of its files' names.
    mmap: leave the tensors in the file, for callers that read the record only."""
    # The file's full name holds the width of the model, which no flag need say: so the folder is searched.
    paths = find_states(args, name)
    if args.dim is not None or args.preset is not None:
        dim = args.dim or LMConfig.from_preset(args.preset).dim
        paths = [path for path in paths if f"_{dim}_" in path.name]
    if len(paths) > 1:
        raise UserError(f"--resume could mean {' or '.join(map(str, paths))}; say which with --dim or --use_moe")
    if not paths:
        return None
    state = read_state(paths[0], mmap)
    if state["record"]["stage"] != args.stage:
        raise UserError(f"{paths[0]} is the state of another stage, {state['record']['stage']}; use --save_weight NAME")
    return state
