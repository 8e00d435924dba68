"""What a run starts from: its data files, its weights, its tokenizer. All mistakes are found here, before any work."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.device import device_and_dtype
from common.errors import UserError, note, user_errors
from data.reading import check_file
from data.rows import packed_splits, token_bytes
from data.token_cache import Cache, tokenised
from model.LMConfig import DEFAULT_PRESET, LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.tokenizer_files import tokenizer_from_dict, tokenizer_hash
from model.weights import load_model
from model.weights_file import fingerprint, newest_weights
from trainer.checkpoint import AdapterFiles, Files, find_states, read_state
from trainer.memory import rows_that_fit
from trainer.stage_flags import SHAPE_FLAGS
from trainer.world import World

ROOT = Path(__file__).resolve().parent.parent
LONGEST_NAME = 160  # bytes; of 255 that a disk takes, the rest is for what a temporary file's name has besides
ENOUGH_KEPT = 0.95  # of the tokens that could be learned: below it a run begins with a warning
SAMPLE = ROOT / "dataset" / "sample"
RECIPE_FLAGS = ("stage", "seq_len", "epochs", "max_steps", "learning_rate", "optimizer", "schedule", "warmup",
                "weight_decay", "grad_clip", "seed", "dtype", "val_split")  # fmt: skip
STAGE_SCRIPTS = {"pretrain": "1-pretrain.py", "full_sft": "3-full_sft.py", "reason": "train_distill_reason.py"}


@dataclass
class Start:
    """Everything train() needs to know of where it begins."""

    args: object
    model: MiniMindForCausalLM
    tokenizer: object
    data_files: list[Path]
    came_from: str  # the starting weights, in words
    files: Files
    state: dict | None = None  # what a resumed run goes on from
    record: dict = field(default_factory=dict)
    bytes_of_token: torch.Tensor | None = None  # None where the loss is not that of a text
    fixed: dict[str, str] = field(default_factory=dict)  # fingerprints of what is used and not trained, by its role
    other_parameters: int = 0  # of further models in memory

    def caches(self, kind: str, world, files=None, think_share=None) -> list[Cache]:
        """The data files (or others), tokenised: by the first process, found by the others."""
        folder, skip = Path(self.args.out_dir) / "cache", self.args.skip_bad_lines

        def find():
            return [
                tokenised(file, kind, self.tokenizer, folder, skip, think_share=think_share)
                for file in files or self.data_files
            ]

        return world.first_then_all(find)

    def packed(self, kind: str, world, val_files=None, think_share=None):
        """(training rows, validation rows or None) of the data files, see data/rows.py.

        kind, think_share: as for data.token_cache.tokenised. val_files: validate on these, not on a part of the data.
        """
        args, caches = self.args, self.caches(kind, world, think_share=think_share)
        val_caches = self.caches(kind, world, val_files, think_share) if val_files else None
        rows = packed_splits(caches, kind, args.seq_len, args.seed, args.val_split, val_caches)
        if world.first and (kept := rows[0].learned_kept_share()) < ENOUGH_KEPT:
            print(f"warning: answers longer than a row lose their end, {1 - kept:.1%} of what could be learned; "
                  f"raise --seq_len {args.seq_len}", file=sys.stderr)  # fmt: skip
        return rows

    def use_frozen(self, role: str, model, path) -> None:
        """Notes that the run depends on a second model that is not trained: it must be the same when resumed."""
        self.files.check_apart(path)
        self.fixed[role] = fingerprint(model)
        self.record[role] = str(path)
        self.other_parameters += model.num_parameters()

    def recipe(self, rows, rows_per_step: int) -> dict:
        """All that decides the mathematics of the run: a resumed run must have the same."""
        train_rows = rows[0]
        return {name: getattr(self.args, name) for name in RECIPE_FLAGS + tuple(self.args.recipe_flags)} | {
            **self.fixed,
            "config": self.model.config.fields(),
            "data": [cache.folder.name for cache in train_rows.caches],
            "rows_per_step": rows_per_step,
        }


def prepare(args, minimind_files=(), sample="pretrain.jsonl", before=(), required=False, make=None, adapt=None):
    """Resolves data, weights and tokenizer of a stage -> Start.

    minimind_files: names in dataset/ taken where --data_path is not given, the first that is there; else the embedded
    sample's file. before: stages whose newest weights this one starts from by default; required: refuse to start from
    random ones. make() -> (model, tokenizer, where from, record): what to start from in place of random weights of the
    default shape. adapt(model): adds adapters; then they alone are trained and written.
    """
    device_and_dtype(args)
    data_files = resolve_data(args, minimind_files, sample)
    args.save_weight = args.save_weight or data_files[0].name.split(".")[0]
    if len(os.fsencode(args.save_weight)) > LONGEST_NAME:
        raise UserError(f"{args.save_weight} is too long a name for the run's files; give a shorter --save_weight")
    state = resumed_state(args) if args.resume else None
    if adapt is not None:
        if state is not None:  # it holds adapters; the weights under them are where they were
            args.from_weight = args.from_weight or state["record"]["came_from"]
        model, tokenizer, came_from, record = resolve_weights(args, before, required, make)
        record = state["record"] if state is not None else record
        torch.manual_seed(args.seed)  # of the adapters' start
        try:
            adapt(model)
        except ValueError as error:
            raise UserError(str(error)) from None
    elif state is not None:
        config, tokenizer = LMConfig(**state["config"]), tokenizer_from_dict(state["tokenizer"])
        _check_shape_flags(args, config, "the run to be resumed")
        model, came_from, record = MiniMindForCausalLM(config), "those of the run to be resumed", state["record"]
    else:
        model, tokenizer, came_from, record = resolve_weights(args, before, required, make)
    files = Files(args, model.config) if adapt is None else AdapterFiles(args, model)
    files.check_writable()
    if not args.dry_run:
        files.lock()
    if not args.resume:
        files.check_apart(came_from)
    files.check_free(args)
    record = record | {"stage": args.stage, "seq_len": args.seq_len}
    if state is None:  # else it says what the run began with
        record |= {"came_from": came_from, "preset": args.preset}  # a state dict of MiniMind's may need both
    record.pop("result", None)
    choose_rows(args, model, state)
    record["batch_size"] = args.batch_size
    fixed = {"base": model.lora_base} if adapt is not None else {}
    return Start(args, model, tokenizer, data_files, came_from, files, state, record, token_bytes(tokenizer), fixed)


def choose_rows(args, model, state: dict | None) -> None:
    """Settles --batch_size and --accumulation_steps where no flag did: a resumed run's as they were; on a GPU as many
    rows together as its memory takes."""
    device, dtype = device_and_dtype(args)
    if args.batch_given:
        return
    if state is not None:
        args.batch_size = state["record"].get("batch_size", args.batch_size)
    elif device.type == "cuda":
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        world = World(0, 1, device, dtype)
        args.batch_size, args.accumulation_steps = rows_that_fit(model.config, args, world, trainable)
        note(f"{args.batch_size} of a step's rows together, by the memory of {device}; --batch_size says otherwise")


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


def resolve_weights(args, before, required: bool, make=None):
    """-> (model, tokenizer, where they came from in words, record of the starting weights)."""
    path = find_weights("--from_weight", args.from_weight, before, args.out_dir)
    if path is None:
        if required and args.from_weight is None:
            refuse_without_weights(before, args.out_dir)
        if make is not None:
            return make()
        tokenizer = _load_tokenizer(args.tokenizer)
        return random_model(args, len(tokenizer)), tokenizer, "random (from nothing)", {}
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
    return model, tokenizer, str(path), record


def load_weights(path, preset=None):
    """model.weights.load_model, its complaints as the user's mistakes."""
    try:
        return load_model(path, preset)
    except ValueError as error:
        raise UserError(str(error)) from None


def random_model(args, vocab_size: int) -> MiniMindForCausalLM:
    """Random weights, a function of --seed, of the shape that --preset and the shape flags name."""
    try:
        config = LMConfig.from_preset(args.preset or DEFAULT_PRESET, **({"vocab_size": vocab_size} | shape_flags(args)))
    except ValueError as error:
        raise UserError(str(error)) from None
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
    state = resumed_state(args, mmap=True) if args.resume and value is None else None
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


def resumed_state(args, mmap=False) -> dict | None:
    """The state of the run that --resume means, None where there is none. mmap: to look at its record only."""
    paths = find_states(args)
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
