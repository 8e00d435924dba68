"""A model with its optimizers: backward, step and state. The loop calls it the same way for one process or several."""

import contextlib
import os

import torch
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from model.compat import checkpoint_activations
from trainer.optimizers import make_optimizers
from trainer.world import World, restore_rng, rng_states

MOST_IN_A_ROW = 30  # skipped steps: the scaler's factor, halved each time, has then gone from 2^16 to 2^-14


class TrainingEngine:
    """A model with its optimizers, on one device or copied to several (DistributedDataParallel)."""

    def __init__(self, model, args, world: World):
        self.world, self.args = world, args
        self.module = model.to(world.device).train()
        if args.gradient_checkpointing:
            checkpoint_activations(self.module)
        self.optimizers = make_optimizers(self.module, args.optimizer, args.learning_rate, args.weight_decay)
        self.passed_over = self.in_a_row = 0  # skipped steps (gradient not finite): in all, and since the last good one
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        # self.model is what the loss calls: compiled, and with DDP's exchange of gradients. self.module is the same
        # network without these, for validation and for saving; the parameters are shared.
        self.model = torch.compile(self.module) if args.compile else self.module
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=ids)

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """A context for forward and backward of one micro-batch: DDP exchanges gradients in a step's last one only."""
        wait = self.world.size > 1 and not last
        with self.model.no_sync() if wait else contextlib.nullcontext():
            yield

    def backward(self, loss) -> None:
        """Adds the gradient of `loss`, which is this process's part of the step's loss."""
        # DistributedDataParallel averages gradients over the processes; they should be summed: hence the factor.
        self.scaler.scale(loss * self.world.size).backward()

    def gradient_norm(self) -> torch.Tensor:
        """Clips the gradient to --grad_clip and returns its norm before clipping, a tensor on the device."""
        for optimizer in self.optimizers:  # first: --grad_clip limits the gradient, not float16's scaled one
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip or float("inf"))

    def step(self, factor: float, norm: float) -> float:
        """Moves the weights, at `factor` times the peak rate, and clears the gradients. norm: theirs, finite; returned,
        since DeepSpeed's engine learns it only here."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()  # not scaler.step(optimizer): that would wait for the GPU again to test for overflow
        self._end_step()
        self.in_a_row = 0
        return norm

    def pass_over(self) -> None:
        """Clears gradients that are not finite; the weights stay as they are."""
        self._end_step()
        self.passed_over += 1
        self.in_a_row += 1

    def _end_step(self) -> None:
        self.scaler.update()  # a smaller factor after an overflow, a larger one after many good steps
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def forgives(self) -> bool:
        """Whether a step whose gradient is not finite may be skipped.

        float16 ends at 65504, and the scaler finds the largest factor for the loss by trial: it halves the factor after
        each overflow. After many overflows in a row the factor is not the cause.
        """
        return self.scaler.is_enabled() and self.in_a_row < MOST_IN_A_ROW

    def numbers(self) -> dict[str, int]:
        """What the engine adds to the log at a step: with float16 the number of skipped steps so far."""
        return {"passed_over": self.passed_over} if self.scaler.is_enabled() else {}

    def state(self, shards) -> dict:
        """Everything that the next step depends on; "model": what is learned. All processes must call it.

        shards: a folder where DeepSpeed's processes write their own parts. Not used here: each process has all of it.
        """
        return {
            "model": {name: tensor.detach().cpu() for name, tensor in learned_state(self.module).items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "passed_over": self.passed_over,
            "rng": rng_states(self.world),
        }

    def load_state(self, state: dict, shards) -> None:
        """Restores what state() returned. shards: named in the error message only."""
        if "shards" in state:
            raise UserError(f"{shards}.pth was saved with --deepspeed; resume it with the flag, or use --overwrite")
        load_learned(self.module, state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.passed_over = state.get("passed_over", 0)
        restore_rng(self.world, state["rng"])

    def whole_model(self):
        """The model as it is to be written. All processes must call it."""
        return self.module


def make_engine(model, args, world: World):
    """The engine that the flags ask for."""
    if args.deepspeed is None:
        return TrainingEngine(model, args, world)
    from trainer.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, args, world)


def by_deepspeed_launcher() -> bool:
    return "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ


def engine_in_words(args, world: World) -> str:
    if args.deepspeed is not None:
        instead = f"; adamw in place of {args.default_optimizer}" if args.default_optimizer != "adamw" else ""
        return f"DeepSpeed as {args.deepspeed} says, {world.size} process(es){instead}"
    note = "; started by the deepspeed launcher without --deepspeed" if by_deepspeed_launcher() else ""
    if world.size == 1:
        return f"one process{note}"
    return f"{world.size} processes by DistributedDataParallel (DDP){note}"


def learned_state(model) -> dict[str, torch.Tensor]:
    """The trained part of a model's state: all of it, or the adapters of a frozen model."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}


@torch.no_grad()
def load_learned(model, tensors: dict[str, torch.Tensor]) -> None:
    """Copies the tensors of learned_state back into the model."""
    own = learned_state(model)
    if own.keys() != tensors.keys():
        raise RuntimeError(f"the saved state does not fit: {sorted(own.keys() ^ tensors.keys())[:3]}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
