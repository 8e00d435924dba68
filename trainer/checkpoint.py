"""The files of a run: its weights, and beside them the state from which it can be resumed.

`out/pretrain_512.pth` is for use, `out/pretrain_512_resume.pth` for resuming. The state holds its own copy of the
weights, so a crash between writing the two files does no harm. When the run is finished the state is removed, and the
record in the weights' file holds the result. Neither file holds what is not trained: a LoRA run writes its adapter.

A resumed run equals the run that was never stopped, bit for bit. So the state holds everything that the next step
depends on: the weights in float32, the optimizer's moments, float16's scaler, the random number state of each process
(for dropout), the step and the counters. Learning rate and data order are not in it: they follow from the step and the
recipe, and a run is resumed with the same recipe only.
"""

import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from common.errors import RunFailed, UserError
from common.files import lock, named
from model.lora import save_lora
from model.tokenizer_files import tokenizer_to_dict
from model.weights import save_weights
from model.weights_file import STATE_SUFFIX, read_file, read_header, save_atomically

FORMAT = "minimind-resume-1"


class Files:
    """The paths of one run's files, the checks before it writes them, and the writing.

    first_part: the first part of the files' names, --save_weight or its default.
    """

    def __init__(self, args, first_part: str, config):
        self.folder = Path(args.out_dir) / args.subfolder
        # An existing file is replaced without --overwrite only if its configuration is the same.
        self.configuration = {"config": config.fields()}
        self.name = name = f"{first_part}_{config.dim}{'_moe' if config.use_moe else ''}"
        self.weights = self.folder / f"{name}.pth"
        self.state = self.folder / f"{name}{STATE_SUFFIX}.pth"
        self.shards = self.folder / f"{name}{STATE_SUFFIX}"  # a folder: DeepSpeed's processes each write a part
        self.log = self.folder / f"{name}.jsonl"
        self.curve = self.folder / f"{name}.png"

    def check_writable(self) -> None:
        """Raises UserError where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The process id is in the name because the run's other processes do the same at the same time. No file of
            # the run has a longer name, so a name that is too long for the disk is refused here.
            probe = self.folder / f".{self.state.name}.{os.getpid()}.probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to --out_dir {self.folder} as {self.name}: {error.strerror}") from None

    def lock(self) -> None:
        """Keeps other runs from writing these files until this process ends; UserError where one is writing them."""
        # Only the first process writes, so only it needs the lock. Kept in an attribute: closing the file would unlock.
        if int(os.environ.get("RANK", 0)) == 0:
            taken = f"another run is at work on {self.weights}; wait for it, or use --save_weight NAME, or --out_dir"
            self.held = lock(self.folder / f".{self.name}.lock", taken)

    def check_apart(self, path) -> None:
        """Raises UserError where the run would overwrite the weights it starts from. path: theirs, or words such as
        "random (from nothing)", which equal no path."""
        if Path(path).resolve() == self.weights.resolve():
            raise UserError(f"this run needs {path} and would write over it; use --save_weight NAME, or --out_dir")

    def check_free(self, args) -> None:
        """Raises UserError where this run would overwrite the work of another one."""
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
            # No step is left, so the size of a step (which depends on the number of processes) need not be the same.
            global_batch = {"rows_per_step": record["recipe"]["rows_per_step"]}
            check_recipe(record["recipe"], recipe | global_batch, self.weights)
            return result
        return None

    def save(self, engine, tokenizer, record: dict, step: int, counters: dict) -> None:
        """Writes the state and the weights; all processes call it, the first one writes."""
        check_finite(engine.module, step)
        # Called by all processes: under ZeRO each holds a part of the state and of the weights.
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
        # The order matters. Until the new state has replaced the old one, the old one needs its shards: they are
        # removed after that. The weights for use come last, since resuming does not need them.
        save_atomically(content, self.state)
        self._remove_shards(but=state.get("shards"))
        self.write(model, tokenizer, record)

    def finish(self, engine, tokenizer, record: dict) -> None:
        """Writes the weights with their result, then removes the state."""
        model = engine.whole_model()
        if engine.world.first:
            # Weights first: after a crash between the two lines, --resume loads the state, has no step left and comes
            # here again.
            self.write(model, tokenizer, record)
            self.state.unlink(missing_ok=True)
            self._remove_shards()
            for file in (self.weights, self.state):  # temporary files of saves that were killed
                for part in self.folder.glob(f".{file.name}.*.tmp"):
                    part.unlink(missing_ok=True)

    def _remove_shards(self, but=None) -> None:
        """Removes the shards of all saved states except `but`, those of interrupted saves too."""
        for folder in self.shards.iterdir() if self.shards.exists() else ():
            if folder.name != but:
                shutil.rmtree(folder, ignore_errors=True)
        if but is None:
            shutil.rmtree(self.shards, ignore_errors=True)

    def write(self, model, tokenizer, record: dict) -> None:
        """Writes the file for use."""
        save_weights(self.weights, model, tokenizer, record)


class AdapterFiles(Files):
    """The files of a run that trains an adapter, called "default", of a frozen model."""

    def __init__(self, args, first_part: str, model):
        super().__init__(args, first_part, model.config)
        self.configuration["lora"] = asdict(model.lora_configs["default"])

    def write(self, model, tokenizer, record: dict) -> None:
        save_lora(self.weights, model, record, name="default")


def check_finite(model, step: int) -> None:
    """Raises RunFailed where weights are not finite: too high a learning rate can cause that with finite gradients.
    Called before a save, so that the last good file is kept."""
    for name, tensor in model.named_parameters():
        if tensor.requires_grad and not tensor.isfinite().all():
            raise RunFailed(
                f"step {step} left numbers in {name} that are not finite; what was saved before is whole. Lower "
                "--learning_rate or lengthen --warmup, and start from weights of before: --from_weight, --save_weight"
            )


def read_state(path, mmap=False) -> dict:
    """The content of a state file; UserError where it cannot be read. mmap: do not read its tensors into memory."""
    try:
        state = read_file(path, mmap)
    except ValueError as error:
        raise UserError(f"{error}; --overwrite starts afresh") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no state of a run; --overwrite starts afresh")
    return state


def find_states(args, first_part: str) -> list[Path]:
    """State files in --out_dir with this first part, such as pretrain_512_resume.pth, pretrain_640_moe_resume.pth."""
    pattern = re.compile(rf"{re.escape(first_part)}_(\d+)(_moe)?{STATE_SUFFIX}\.pth")
    folder = Path(args.out_dir) / args.subfolder
    return [path for path in sorted(folder.glob("*.pth")) if pattern.fullmatch(path.name)]


def check_recipe(saved: dict, mine: dict, path) -> None:
    """Raises UserError naming the settings that differ between the saved run and this one."""
    changed = [f"{key} was {saved.get(key)}, is now {mine.get(key)}" for key in sorted(saved.keys() | mine.keys())
               if saved.get(key) != mine.get(key)]  # fmt: skip
    if changed:
        raise UserError(f"cannot resume {path} with other settings: {'; '.join(changed)}; --overwrite starts afresh")
