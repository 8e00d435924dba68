"""Sends a run's numbers to Weights & Biases or TensorBoard, for those who asked for it. Neither is needed."""

import os
import uuid

from common.errors import UserError


def trackers(args, files, recipe: dict, run_id: str, step: int) -> list:
    """Objects with log(step, numbers) and close(), one for each service the flags name. step: where the run stands."""
    found = []
    if args.use_wandb:
        found.append(Wandb(args, files, recipe, run_id))
    if args.use_tensorboard:
        found.append(TensorBoard(files, step))
    return found


def new_run_id() -> str:
    """The id under which a run is known to W&B; a resumed run keeps it."""
    return uuid.uuid4().hex[:8]


class Wandb:
    """W&B. Without a key or a network the run is written to disk only; `wandb sync FOLDER` sends it later."""

    def __init__(self, args, files, recipe: dict, run_id: str):
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds to send the rest at the end
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        why = "no key" if "WANDB_MODE" not in os.environ else "WANDB_MODE"
        options = {"project": args.wandb_project, "name": files.name, "id": run_id, "resume": "allow",
                   "dir": str(files.folder), "config": recipe, "settings": wandb.Settings(init_timeout=20)}  # fmt: skip
        try:
            self.run = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:  # no network, or a key that is refused
            mode, why = "offline", str(error).splitlines()[0]
            wandb.teardown()  # else the failed attempt's service would still hold the run's id
            try:
                self.run = wandb.init(mode=mode, **options)
            except wandb.errors.Error as wrong:  # offline too: something else is wrong, such as the project's name
                raise UserError(f"--use_wandb: {wrong}") from None
        except ValueError as error:
            raise UserError(f"--use_wandb: {str(error).partition(chr(10))[0]} (WANDB_MODE {mode})") from None
        if mode == "offline":
            print(f"wandb: offline ({why}): the run is kept in {files.folder / 'wandb'}; `wandb sync` sends it",
                  flush=True)  # fmt: skip

    def log(self, step: int, numbers: dict) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out/tensorboard/<name>; `tensorboard --logdir out/tensorboard` shows them."""

    def __init__(self, files, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # A killed run may have written steps after its last save; the resumed run writes them again.
        self.writer = SummaryWriter(files.folder / "tensorboard" / files.name, purge_step=step + 1)

    def log(self, step: int, numbers: dict) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
