"""Sends a run's numbers to Weights & Biases or TensorBoard, for those who asked for it. Neither is needed."""

import os
import uuid
from netrc import NetrcParseError, netrc

from trainer.cli import UserError


def trackers(args, files, recipe: dict, run_id: str) -> list:
    """Objects with log(step, numbers) and close(), one for each service the flags name."""
    found = []
    if args.use_wandb:
        found.append(Wandb(args, files, recipe, run_id))
    if args.use_tensorboard:
        found.append(TensorBoard(files))
    return found


def new_run_id() -> str:
    """The id under which a run is known to W&B; a resumed run keeps it."""
    return uuid.uuid4().hex[:8]


class Wandb:
    """Without a key the run is written to disk only (`wandb sync FOLDER` sends it later), so no network is needed."""

    def __init__(self, args, files, recipe: dict, run_id: str):
        try:
            import wandb
        except ImportError:
            raise UserError("--use_wandb needs the package wandb: pip install wandb") from None
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode == "offline":
            print(f"wandb: no key, so the run is kept in {files.folder / 'wandb'}; `wandb sync` sends it", flush=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = wandb.init(project=args.wandb_project, name=files.name, id=run_id, resume="allow", mode=mode,
                              dir=str(files.folder), config=recipe,
                              settings=wandb.Settings(init_timeout=20))  # fmt: skip

    def log(self, step: int, numbers: dict) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out/tensorboard/<name>; `tensorboard --logdir out/tensorboard` shows them."""

    def __init__(self, files):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--use_tensorboard needs the package tensorboard: pip install tensorboard") from None
        self.writer = SummaryWriter(files.folder / "tensorboard" / files.name)

    def log(self, step: int, numbers: dict) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        return False
