"""The processes of a run: their ranks, how they connect, and the numbers they exchange.

Training programs import this file first: torch reads OMP_WAIT_POLICY, set below, when it is loaded.
"""

import contextlib
import os
from dataclasses import dataclass

# How torch's threads wait for each other: PASSIVE lets them sleep, the default lets them spin. Beside another busy
# program spinning made a step four times slower (two threads on two cores, the sample's model). On idle cores training
# is as fast either way, generation is not (docs/log.md): programs that only generate do not import this file.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as torch_dist

from common.device import device_and_dtype, upload
from common.errors import RunFailed, UserError, disk_fault, out_of_memory
from trainer.heartbeat import PATIENCE, Heartbeat
from trainer.memory import what_to_lower


@dataclass
class World:
    """This process's place among the processes of the run; rank 0 of 1 without a launcher."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of the arithmetic; weights stay float32

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float | torch.Tensor) -> list[float]:
        """Each number summed over all processes, in float64. One exchange and one wait for the GPU serve them all."""
        if self.size == 1 and not any(isinstance(x, torch.Tensor) for x in numbers):
            return [float(x) for x in numbers]
        kind = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        # Python's numbers go to the device in one copy; tensors are there already. Together they make one tensor.
        ours = iter(upload([float(x) for x in numbers if not isinstance(x, torch.Tensor)], self.device, kind))
        total = torch.stack([x.detach().to(kind) if isinstance(x, torch.Tensor) else next(ours) for x in numbers])
        if self.size > 1:
            torch_dist.all_reduce(total)
        return total.tolist()

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
        """This process's batches of rows 0 to n - 1. Every process gets the same number of batches, since under ZeRO-3
        all of them take part in each forward pass: past the end a batch is one empty row, -1."""
        for first in range(0, n, self.size * batch_size):
            own = first + self.rank * batch_size
            yield list(range(own, min(own + batch_size, n))) or [-1]

    def on_first(self, function):
        """function() on rank 0, None on the others. A UserError in it is raised on all processes, so none is left
        waiting for the others."""
        value = error = None
        # The error is sent as text to all processes: were it raised on rank 0 alone, the others would wait for it.
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
        """function() on rank 0 first and then on the others, which find the files that rank 0 wrote."""
        value = self.on_first(function)
        return value if self.first else function()


@contextlib.contextmanager
def join(args):
    """A context with the World of this run: joins the launcher's process group, if there is one, and leaves it at the
    end. Seeds this process's random numbers."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = device_and_dtype(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True  # tensor cores for float32: faster, 10 bits of mantissa
    backend = "nccl" if device.type == "cuda" else "gloo"
    heartbeat = contextlib.nullcontext()
    if size > 1:
        _check_restarts()
        heartbeat = Heartbeat(rank, size)
    elif args.deepspeed:  # DeepSpeed needs a process group even for one process
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(args.seed)  # for dropout; starting weights and data order have been derived from --seed already
    try:
        with heartbeat:
            # Inside the heartbeat: without it a process would wait here for a dead one as long as PATIENCE, a day.
            if size > 1:
                torch_dist.init_process_group(backend, timeout=PATIENCE)
            yield World(rank, size, device, dtype)
    except (UserError, SystemExit):  # raised on all processes alike; after any other error leaving could hang
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

    By default torchrun's own store is used, which outlives the processes: those of the second attempt would read the
    addresses, and the heartbeat the counts, of the lost ones (torch 2.13).
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


def rng_states(world: World) -> list[dict]:
    """The state of every process's random number generators, which dropout draws from."""
    rng = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(world.device)
    return world.gather(rng)


def restore_rng(world: World, states: list[dict]) -> None:
    """Restores this process's state. With another number of processes there is none for it: dropout then differs."""
    if len(states) == world.size:
        rng = states[world.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and world.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], world.device)
