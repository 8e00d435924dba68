"""The machine under the loop: device, precision, processes. The loop calls backward, step and state, and does not know
whether one process runs or several.

Programs that train import this file before anything that imports torch: its threads read how to wait when it is loaded.
"""

import contextlib
import os
from dataclasses import dataclass

# Beside a busy neighbour threads that spin while they wait made a step four times slower than threads that sleep
# (two threads on two cores, the sample's model); on idle cores the two are alike, as a training step's pieces are long.
# Generating is another matter (docs/log.md): programs that only generate do not import this file.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as torch_dist
from torch.nn.parallel import DistributedDataParallel

from model.compat import checkpoint_activations
from model.device import pick_device, pick_dtype, upload
from trainer.cli import RunFailed, UserError, disk_fault, out_of_memory, user_errors
from trainer.memory import what_to_lower
from trainer.optim import make_optimizers
from trainer.watch import PATIENCE, Watch

MOST_IN_A_ROW = 30  # steps passed over; float16's factor, halved each time, has gone from 2^16 to 2^-14


@dataclass
class World:
    """This process among the others, as the launcher's environment says; alone without one."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of the arithmetic; weights stay float32

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float | torch.Tensor) -> list[float]:
        """Each number summed over all processes, in float64. Numbers on a GPU are waited for together, once."""
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        there = [x.detach().to(kind) for x in numbers if isinstance(x, torch.Tensor)]
        here = [float(x) for x in numbers if not isinstance(x, torch.Tensor)]
        if self.size == 1:
            values = torch.stack(there).tolist() if there else []
        else:
            total = torch.stack([*there, *upload(here, self.device, kind)])
            torch_dist.all_reduce(total)
            values = total.tolist()
            here = values[len(there) :]
        in_order = {True: iter(values[: len(there)]), False: iter(here)}
        return [next(in_order[isinstance(x, torch.Tensor)]) for x in numbers]

    def gather(self, value) -> list:
        """The value of every process, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch_dist.all_gather_object(values, value)
        return values

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def barrier(self) -> None:
        if self.size > 1:
            torch_dist.barrier()

    def shares(self, n: int, batch_size: int):
        """This process's batches of rows 0 to n - 1, as many as every other process has, for ZeRO-3 wants all of them
        in each forward pass: past the end a batch is one empty row, -1."""
        for first in range(0, n, self.size * batch_size):
            own = first + self.rank * batch_size
            yield list(range(own, min(own + batch_size, n))) or [-1]

    def on_first(self, function):
        """function() on rank 0, None on the others; its UserError ends them all alike."""
        value = error = None
        if self.first:
            try:
                value = function()
            except UserError as raised:
                error = str(raised)
        error = self.gather(error)[0]
        if error is not None:
            raise UserError(error)
        return value

    def first_then_all(self, function):
        """function() on rank 0, then on the others, who find what it left."""
        value = self.on_first(function)
        return value if self.first else function()


def device_and_dtype(args) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype mean on this machine."""
    with user_errors():
        device = pick_device(args.device)
        return device, pick_dtype(args.dtype, device)


@contextlib.contextmanager
def join(args):
    """The World of this run: the launcher's process group, if one started us, joined and left; this process seeded."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = device_and_dtype(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    backend = "nccl" if device.type == "cuda" else "gloo"
    watch = contextlib.nullcontext()
    if size > 1:
        _check_restarts()
        watch = Watch(rank, size)
    elif args.deepspeed:
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(args.seed)
    try:
        with watch:
            if size > 1:  # watched: one that waits for a process which is gone would wait for PATIENCE
                torch_dist.init_process_group(backend, timeout=PATIENCE)
            yield World(rank, size, device, dtype)
    except (UserError, SystemExit):  # all processes meet these alike; after any other error leaving could hang
        leave()
        raise
    except (RuntimeError, MemoryError) as error:
        if (words := out_of_memory(error)) is None:
            raise
        raise RunFailed(f"{words}. What was saved is whole, --resume goes on from it. {what_to_lower(args)}") from None
    except OSError as error:
        if (words := disk_fault(error)) is None:
            raise
        raise RunFailed(f"{words}. What was saved is whole, --resume goes on from it") from None
    leave()


def _check_restarts() -> None:
    """Raises UserError where torchrun may restart processes that could not find each other again.

    Its launchers lend the processes a store that outlives them: those of the second attempt would read there the
    addresses, and our watch the messages, that the lost ones have left (torch 2.13).
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max_restarts works here with a meeting place of its own for each attempt: "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine and give the command again"
        )


def leave() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


class Engine:
    """A model with its optimizers, on one device or copied to several (DistributedDataParallel)."""

    def __init__(self, model, args, world: World):
        self.world, self.args = world, args
        self.module = model.to(world.device).train()
        if args.gradient_checkpointing:
            checkpoint_activations(self.module)
        self.optimizers = make_optimizers(self.module, args.optimizer, args.learning_rate, args.weight_decay)
        self.passed_over = self.in_a_row = 0  # steps whose gradient was not finite: in all, and in a row by now
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        self.model = torch.compile(self.module) if args.compile else self.module
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=ids)

    def autocast(self):
        return self.world.autocast()

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """Around forward and backward of one micro-batch: only a step's last one exchanges gradients."""
        wait = self.world.size > 1 and not last
        with self.model.no_sync() if wait else contextlib.nullcontext():
            yield

    def backward(self, loss) -> None:
        """Adds the gradient of `loss`, which is this process's part of the step's loss."""
        # DistributedDataParallel averages over processes what should be summed
        self.scaler.scale(loss * self.world.size).backward()

    def gradient_norm(self) -> torch.Tensor:
        """The gradient's norm, before it is clipped to --grad_clip, which is done here; on the device."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        return torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip or float("inf"))

    def step(self, factor: float, norm: float) -> float:
        """Moves the weights, at `factor` times the peak rate, and clears the gradients; their norm is finite, and
        returned."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()  # not the scaler's step: that would ask the GPU once more whether all is finite
        self._end_step()
        self.in_a_row = 0
        return norm

    def pass_over(self) -> None:
        """Clears gradients that are not finite."""
        self._end_step()
        self.passed_over += 1
        self.in_a_row += 1

    def _end_step(self) -> None:
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def forgives(self) -> bool:
        """Whether a gradient that is not finite may be passed over: float16 ends at 65504, and the scaler finds out by
        trying how far the loss can be scaled up. After many in a row its factor is not what is wrong."""
        return self.scaler.is_enabled() and self.in_a_row < MOST_IN_A_ROW

    def numbers(self) -> dict[str, int]:
        """What the log says of the engine at a step: with float16 how many steps were passed over so far."""
        return {"passed_over": self.passed_over} if self.scaler.is_enabled() else {}

    def state(self, shards) -> dict:
        """Everything that the next step depends on; "model": what is learned. All processes must call it.

        shards: a folder for what each process would have to write for itself; here the first one has it all.
        """
        return {
            "model": {name: tensor.detach().cpu() for name, tensor in learned_state(self.module).items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "passed_over": self.passed_over,
            "rng": rng_states(self.world),
        }

    def load_state(self, state: dict, shards) -> None:
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
        return Engine(model, args, world)
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
    """What of a model's state is trained: all of it, or the adapters of a frozen model."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}


@torch.no_grad()
def load_learned(model, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what learned_state gave."""
    own = learned_state(model)
    if own.keys() != tensors.keys():
        raise RuntimeError(f"the saved state does not fit: {sorted(own.keys() ^ tensors.keys())[:3]}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def rng_states(world: World) -> list[dict]:
    """State of every process's random numbers, those of dropout."""
    rng = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(world.device)
    return world.gather(rng)


def restore_rng(world: World, states: list[dict]) -> None:
    """With another number of processes there is nothing to restore: the streams of dropout differ."""
    if len(states) == world.size:
        rng = states[world.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and world.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], world.device)
