"""What a stage runs with: data, weights, tokenizer, files. All mistakes are found here, before any work."""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from common.device import device_and_dtype
from common.errors import UserError, note, user_errors
from data.reading import check_file
from model.LMConfig import DEFAULT_PRESET, LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.tokenizer_files import tokenizer_from_dict, tokenizer_hash
from model.weights import load_model
from model.weights_file import newest_weights
from trainer.checkpoint import AdapterFiles, Files, find_states, read_state
from trainer.memory import rows_that_fit
from trainer.stage_flags import SHAPE_FLAGS
from trainer.world import World

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "dataset" / "sample"
RECIPE_FLAGS = ("stage", "seq_len", "epochs", "max_steps", "learning_rate", "optimizer", "schedule", "warmup",
                "weight_decay", "grad_clip", "seed", "dtype", "val_split")  # fmt: skip
STAGE_SCRIPTS = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py", "reason": "train_distill_reason.py"}


@dataclass(frozen=True)
class Run:
    """What a stage's flags come to. prepare() makes it, train() needs it, nobody changes it."""

    args: Namespace  # the flags as they were given; what they leave open is settled in the fields below
    model: MiniMindForCausalLM
    tokenizer: object
    data_files: list[Path]
    came_from: str  # the starting weights, in words
    files: Files  # what the run writes
    batch_size: int  # rows of one micro-batch of one process
    accumulation_steps: int  # micro-batches of a step, where the run is not resumed: see trainer.plan.Plan
    state: dict | None = None  # what a resumed run goes on from
    record: dict = field(default_factory=dict)  # what the weights' file says of their making
    fixed: dict[str, str] = field(default_factory=dict)  # fingerprints of what is used and not trained, by its role
    other_parameters: int = 0  # of further models in memory

    def using(self, parameters: int = 0, paths: dict[str, str] | None = None, **fingerprints: str) -> "Run":
        """A copy that also depends on something that is not trained: it must be the same when the run is resumed.

        fingerprints, and paths for the record of those that are files: by the role each plays in the run. parameters:
        of a further model that stays in memory.
        """
        fixed, record = self.fixed | fingerprints, self.record | (paths or {})
        return replace(self, fixed=fixed, record=record, other_parameters=self.other_parameters + parameters)

    def recipe(self, rows, global_batch_size: int) -> dict:
        """All that decides the mathematics of the run: a resumed run must have the same. rows: those of training."""
        return {name: getattr(self.args, name) for name in RECIPE_FLAGS + tuple(self.args.recipe_flags)} | {
            **self.fixed,
            "config": self.model.config.fields(),
            "data": [cache.folder.name for cache in rows.caches],
            "rows_per_step": global_batch_size,  # the name that saved states know it by
        }


class Weights(NamedTuple):
    """What a run starts from; record: what the weights' file said of their making."""

    model: MiniMindForCausalLM
    tokenizer: object
    came_from: str
    record: dict


def prepare(args, minimind_files=(), sample="pretrain.jsonl", before=(), required=False, make=None, adapt=None):
    """Resolves data, weights and files of a stage -> Run. Writes nothing but an empty lock.

    minimind_files: names in dataset/ taken where --data_path is not given, the first that is there; else the embedded
    sample's file. before: stages whose newest weights this one starts from by default; required: refuse to start from
    random ones. make() -> Weights to start from in place of random ones of the default shape. adapt(model): adds
    adapters; then they alone are trained and written.
    """
    # What costs nothing to check comes first: nobody should wait for a model to be loaded to read of a mistyped flag.
    device_and_dtype(args)
    data_files = resolve_data(args, minimind_files, sample)
    name = args.save_weight or data_files[0].name.split(".")[0]  # an adapter is named after its data

    # The model: of a resumed run its shape alone, for its weights are in the state. An adapter's state holds no more
    # than the adapter, so the weights below it are read either way.
    state = resumed_state(args, name) if args.resume else None
    if adapt is not None:
        weights = adapted_weights(args, state, before, required, adapt)
    elif state is not None:
        weights = resumed_weights(args, state)
    else:
        weights = starting_weights(args, args.from_weight, before, required, make)
    files = claim_files(args, name, weights, adapters=adapt is not None)
    batch_size, accumulation_steps = micro_batch(args, weights.model, state)

    # What the weights' file will say of its making. A resumed run began with what its state says, not with itself.
    record = weights.record | {"stage": args.stage, "seq_len": args.seq_len, "batch_size": batch_size}
    if state is None:
        record |= {"came_from": weights.came_from, "preset": args.preset}  # a MiniMind state dict may need both
    record.pop("result", None)  # that of the run which made the starting weights
    fixed = {"base": weights.model.lora_base} if adapt is not None else {}
    return Run(args, weights.model, weights.tokenizer, data_files, weights.came_from, files, batch_size,
               accumulation_steps, state, record, fixed)  # fmt: skip


def resumed_weights(args, state: dict) -> Weights:
    """A model of the saved shape; what was learned is put into it when its engine is there, see loop.Session."""
    config = LMConfig(**state["config"])
    _check_shape_flags(args, config, "the run to be resumed")
    tokenizer = tokenizer_from_dict(state["tokenizer"])
    return Weights(MiniMindForCausalLM(config), tokenizer, "those of the run to be resumed", state["record"])


def adapted_weights(args, state: dict | None, before, required: bool, adapt) -> Weights:
    """Frozen weights with fresh adapters. A saved state holds adapters alone: the weights under them are read from
    where the run found them."""
    from_weight = args.from_weight or (state["record"]["came_from"] if state else None)
    weights = starting_weights(args, from_weight, before, required)
    torch.manual_seed(args.seed)  # of the adapters' start
    with user_errors():
        adapt(weights.model)
    return weights._replace(record=state["record"]) if state else weights


def claim_files(args, name: str, weights: Weights, adapters: bool) -> Files:
    """The run's files, once it is sure that it may write them; UserError where it may not."""
    files = AdapterFiles(args, name, weights.model) if adapters else Files(args, name, weights.model.config)
    files.check_writable()
    if not args.dry_run:
        files.lock()  # before anything is looked at that another run could change
    if not args.resume:
        files.check_apart(weights.came_from)
    files.check_free(args)
    return files


def micro_batch(args, model, state: dict | None) -> tuple[int, int]:
    """(--batch_size, --accumulation_steps). Where no flag gave them: a resumed run's batch size as it was; on a GPU as
    many rows together as its memory takes, in a step of as many rows."""
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
    """--data_path, else MiniMind's file in dataset/, else the embedded sample, said loudly."""
    if args.data_path:
        return [check_file(path) for path in args.data_path]
    for name in minimind_files:
        if (ROOT / "dataset" / name).exists():
            path = ROOT / "dataset" / name
            note(f"no --data_path given: training on {path.relative_to(ROOT)}")
            return [check_file(path)]
    path = check_file(SAMPLE / sample)
    wanted = f"dataset/{minimind_files[0]} is not there" if minimind_files else "no --data_path given"
    note(f"{wanted}: training on the embedded sample {path.relative_to(ROOT)}")
    return [path]


def held_out_files(run: Run, sample: str, held_out: str) -> list[Path]:
    """The files of --val_path; without the flag, where the data is the embedded sample, what that has held out."""
    if run.args.val_path:
        return [check_file(path) for path in run.args.val_path]
    return [SAMPLE / held_out] if run.data_files == [SAMPLE / sample] else []


def starting_weights(args, from_weight: str | None, before, required: bool, make=None) -> Weights:
    """Those that `from_weight` means, what --from_weight says or would; see prepare for the rest."""
    path = find_weights("--from_weight", from_weight, before, args.out_dir)
    if path is None:
        if required and from_weight is None:
            refuse_without_weights(before, args.out_dir)
        if make is not None:
            return make()
        tokenizer = _load_tokenizer(args.tokenizer)
        return Weights(random_model(args, len(tokenizer)), tokenizer, "random (from nothing)", {})
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
    """model.weights.load_model, its complaints as the user's mistakes."""
    with user_errors():
        return load_model(path, preset)


def random_model(args, vocab_size: int) -> MiniMindForCausalLM:
    """Random weights, a function of --seed, of the shape that --preset and the shape flags name."""
    with user_errors():
        config = LMConfig.from_preset(args.preset or DEFAULT_PRESET, **({"vocab_size": vocab_size} | shape_flags(args)))
    torch.manual_seed(args.seed)
    return MiniMindForCausalLM(config)


def find_weights(flag: str, value: str | None, before, out_dir) -> Path | None:
    """The file that a flag's value means: a path, or a stage's name. Without a value the newest weights of the stages
    `before` in out_dir, else in out/. None: random weights."""
    if value == "none" or (value is None and not before):
        return None
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
    """The file of a second model that is used and not trained: what the flag --<role> says, else what the run to be
    resumed had, else the newest weights of the stages `before`; UserError where there are none."""
    state = resumed_state(args, args.save_weight, mmap=True) if args.resume and value is None else None
    path = find_weights(f"--{role}", state["record"][role] if state else value, before, args.out_dir)
    return path or refuse_without_weights(before, args.out_dir)


def refuse_without_weights(before, out_dir) -> None:
    stage = STAGE_SCRIPTS.get(before[0], before[0])
    raise UserError(f"no weights of {' or '.join(before)} in {out_dir} or out; run `python {stage}` first")


def _load_tokenizer(folder):
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        raise UserError(f"--tokenizer: {error}") from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {folder}: it names no bos_token and eos_token, which begin and end a document")
    return tokenizer


def shape_flags(args) -> dict:
    """The shape flags that were given."""
    return {name: getattr(args, name) for name in SHAPE_FLAGS if getattr(args, name) is not None}


def _check_shape_flags(args, config, whose: str) -> None:
    """Flags may repeat the shape that weights have; they cannot change it (dropout and balance can change)."""
    wanted = shape_flags(args)
    for name in ("dropout", "aux_loss_alpha"):
        if name in wanted:
            setattr(config, name, wanted[name])
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
    """The state of the run that --resume means, None where there is none. name: the first part of its files' names;
    mmap: to look at its record only."""
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
