"""What a run writes: its weights, and beside them the state from which it can go on.

`out/pretrain_512.pth` is for use, `out/pretrain_512_resume.pth` for resuming. The state holds its own copy of the
weights, so no crash between the two files can leave a pair that does not belong together. It is removed when the run is
finished; the weights' record then holds the result. What is not trained is in neither: a LoRA run writes its adapter
alone.
"""

import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from model.files import named
from model.lora import save_lora
from model.tokenizer import tokenizer_to_dict
from model.weights import STATE_SUFFIX, read_file, read_header, save_atomically, save_weights
from trainer.cli import RunFailed, UserError
from trainer.lock import lock

FORMAT = "minimind-resume-1"


class Files:
    """The paths of one run's files and what may be done to them."""

    def __init__(self, args, config):
        self.folder = Path(args.out_dir) / args.subfolder
        self.configuration = {"config": config.fields()}  # what a file at our place must have to be replaced unasked
        name = f"{args.save_weight}_{config.dim}{'_moe' if config.use_moe else ''}"
        self.name = name
        self.weights = self.folder / f"{name}.pth"
        self.state = self.folder / f"{name}{STATE_SUFFIX}.pth"
        self.shards = self.folder / f"{name}{STATE_SUFFIX}"  # a folder, if the engine's processes write on their own
        self.log = self.folder / f"{name}.jsonl"
        self.curve = self.folder / f"{name}.png"

    def check_writable(self) -> None:
        """Raises UserError where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # other processes of the run do the same; no file of the run has a longer name
            probe = self.folder / f".{self.state.name}.{os.getpid()}.probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to --out_dir {self.folder}: {error.strerror}") from None

    def lock(self) -> None:
        """Keeps other runs away from these files until this process ends; UserError where one is at work on them."""
        if int(os.environ.get("RANK", 0)) == 0:
            taken = f"another run is at work on {self.weights}; wait for it, or use --save_weight NAME, or --out_dir"
            self.held = lock(self.folder / f".{self.name}.lock", taken)

    def check_apart(self, path) -> None:
        """Raises UserError where the run would write over weights that it needs; path may be no path, but words."""
        if Path(path).resolve() == self.weights.resolve():
            raise UserError(f"this run needs {path} and would write over it; use --save_weight NAME, or --out_dir")

    def check_free(self, args) -> None:
        """Raises UserError where this run would destroy what another one left."""
        if args.resume or args.overwrite:
            return
        if self.state.exists():
            raise UserError(
                f"{self.state} is the state of an unfinished run; go on with --resume, or start afresh with --overwrite"
            )
        if self.weights.exists():
            try:
                header = read_header(self.weights)
            except ValueError:
                header = {}
            if any(header.get(key) != value for key, value in self.configuration.items()):
                raise UserError(
                    f"{self.weights} has another configuration; use --save_weight NAME, --out_dir, or --overwrite"
                )

    def finished_result(self, recipe: dict) -> dict | None:
        """The result of a finished run with these settings, else None."""
        if not self.weights.exists():
            return None
        try:
            record = read_header(self.weights)["record"]
        except ValueError:
            return None
        result = record.get("result")
        if result and not result.get("stopped"):
            rows_per_step = {"rows_per_step": record["recipe"]["rows_per_step"]}  # other processes do not matter now
            check_recipe(record["recipe"], recipe | rows_per_step, self.weights)
            return result
        return None

    def save(self, engine, tokenizer, record: dict, step: int, counters: dict) -> None:
        """Writes the state and the weights; all processes call it, the first one writes."""
        check_finite(engine.module, step)
        with named(self.shards):
            state = engine.state(self.shards)
        model = engine.whole_model()
        if not engine.world.first:
            return
        content = {
            "format": FORMAT, "record": record, "step": step, "counters": counters,
            "config": model.config.fields(), "tokenizer": tokenizer_to_dict(tokenizer),
            "model": state.pop("model"), "engine": state,
        }  # fmt: skip
        save_atomically(content, self.state)
        self._remove_shards(but=state.get("shards"))
        self.write(model, tokenizer, record)

    def finish(self, engine, tokenizer, record: dict) -> None:
        """Writes the weights with their result, then removes the state."""
        model = engine.whole_model()
        if engine.world.first:
            self.write(model, tokenizer, record)
            self.state.unlink(missing_ok=True)
            self._remove_shards()
            for file in (self.weights, self.state):  # what saves that were killed have left
                for part in self.folder.glob(f".{file.name}.*.tmp"):
                    part.unlink(missing_ok=True)

    def _remove_shards(self, but=None) -> None:
        """Removes the parts of all saved states but one, and of saves that a crash cut short."""
        for folder in self.shards.iterdir() if self.shards.exists() else ():
            if folder.name != but:
                shutil.rmtree(folder, ignore_errors=True)
        if but is None:
            shutil.rmtree(self.shards, ignore_errors=True)

    def write(self, model, tokenizer, record: dict) -> None:
        """The file for use."""
        save_weights(self.weights, model, tokenizer, record)


class AdapterFiles(Files):
    """Those of a run that trains the adapter "default" of a frozen model."""

    def __init__(self, args, model):
        super().__init__(args, model.config)
        self.configuration["lora"] = asdict(model.lora_configs["default"])

    def write(self, model, tokenizer, record: dict) -> None:
        save_lora(self.weights, model, record, name="default")


def check_finite(model, step: int) -> None:
    """Raises RunFailed where a step has ruined the weights: a finite gradient at too high a rate can. They are seen
    before they take the place of those that are whole."""
    for name, tensor in model.named_parameters():
        if tensor.requires_grad and not tensor.isfinite().all():
            raise RunFailed(
                f"step {step} left numbers in {name} that are not finite; what was saved before is whole. Lower "
                "--learning_rate or lengthen --warmup, and start from weights of before: --from_weight, --save_weight"
            )


def read_state(path, mmap=False) -> dict:
    """The content of a state file; UserError where it cannot be read. mmap: its tensors stay in the file."""
    try:
        state = read_file(path, mmap)
    except ValueError as error:
        raise UserError(f"{error}; --overwrite starts afresh") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no state of a run; --overwrite starts afresh")
    return state


def find_states(args) -> list[Path]:
    """State files in --out_dir that --save_weight can mean: pretrain_512_resume.pth, pretrain_640_moe_resume.pth."""
    pattern = re.compile(rf"{re.escape(args.save_weight)}_(\d+)(_moe)?{STATE_SUFFIX}\.pth")
    folder = Path(args.out_dir) / args.subfolder
    return [path for path in sorted(folder.glob("*.pth")) if pattern.fullmatch(path.name)]


def check_recipe(saved: dict, mine: dict, path) -> None:
    """Raises UserError naming the settings in which a run to be resumed differs from the one that is asked for."""
    changed = [f"{key} was {saved.get(key)}, is now {mine.get(key)}" for key in sorted(saved.keys() | mine.keys())
               if saved.get(key) != mine.get(key)]  # fmt: skip
    if changed:
        raise UserError(f"cannot resume {path} with other settings: {'; '.join(changed)}; --overwrite starts afresh")
