"""DeepSpeed in place of TrainingEngine: ZeRO splits the optimizer's state, and more, over the processes.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) gives each of N processes a part of the optimizer's moments and of the
float32 weights they move (stage 1), of the gradients (stage 2), of the weights themselves (stage 3). Mathematics,
schedule and files stay those of the plain engine; only the state for resuming lies in a folder of DeepSpeed's own,
one part a process.
"""

import argparse
import contextlib
import copy
import os
import shutil
import sys
import uuid

import torch

from common.errors import RunFailed, UserError
from model.compat import checkpoint_activations
from trainer.deepspeed_config import fill, import_deepspeed, read_config
from trainer.optimizers import parameter_groups
from trainer.world import World, restore_rng, rng_states


class DeepSpeedEngine:
    """Has the methods of trainer.engine.TrainingEngine."""

    def __init__(self, model, args, world: World):
        deepspeed = import_deepspeed(world.device)
        os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher; DeepSpeed insists on it
        self.world, self.args = world, args
        config = fill(read_config(args.deepspeed), args, world.size, world.dtype)
        self.stage = config.get("zero_optimization", {}).get("stage", 0)
        self.half = config.get("fp16", {}).get("enabled", False)
        low = self.half or config.get("bf16", {}).get("enabled", False)
        # Where DeepSpeed splits the weights or rounds them, they are gathered in float32 into this copy to be written.
        self.whole = copy.deepcopy(model) if self.stage == 3 or low else None
        model = model.to(world.device).train()
        if args.gradient_checkpointing:
            checkpoint_activations(model)
        groups = parameter_groups(model, args.weight_decay)
        try:
            self.model, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
        except (TypeError, ValueError, AssertionError) as error:  # such as keys that its optimizer does not know
            raise UserError(f"{args.deepspeed}: {' '.join(str(error).split())}") from None
        self.module = self.model.module

    @contextlib.contextmanager
    def micro_batch(self, last: bool):
        """A context for forward and backward of one micro-batch; DeepSpeed needs to know the step's last one."""
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss) -> None:
        """Adds the gradient of `loss`, which is this process's part of the step's loss."""
        self.model.backward(loss * self.world.size, scale_wrt_gas=False)  # it averages over processes, as DDP does

    def gradient_norm(self) -> torch.Tensor:
        """Zero: the norm is not known before the step, in which ZeRO gathers the parts of the gradient."""
        return torch.zeros((), device=self.world.device)

    def step(self, factor: float, norm: float) -> float:
        """Moves the weights, at `factor` times the peak rate, and clears the gradients; returns the gradient's norm."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * factor
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        whole = torch.nn.utils.get_total_norm(gradients) if self.stage == 0 else None
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return float(whole if norm is None else norm)

    def forgives(self) -> bool:
        """With float16 DeepSpeed scales the loss and skips steps that overflow, as TrainingEngine does."""
        return self.half

    def numbers(self) -> dict[str, int]:
        """What the engine adds to the log at a step: with float16 the number of skipped steps so far."""
        return {"passed_over": self.model.skipped_steps} if self.half else {}

    def state(self, shards) -> dict:
        """Writes each process's part into a new folder in `shards`; returns the folder's name with the rest of the
        state."""
        name = self.world.gather(uuid.uuid4().hex[:12])[0]
        with contextlib.redirect_stdout(sys.stderr):
            self.model.save_checkpoint(str(shards), tag=name, save_latest=False)
        self.world.barrier()
        if self.world.first:
            for path in (shards / name).iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        return {"model": {}, "shards": name, "zero": self.stage, "processes": self.world.size,
                "rng": rng_states(self.world)}  # fmt: skip

    def load_state(self, state: dict, shards) -> None:
        if "shards" not in state:
            raise UserError(f"{shards}.pth was saved without --deepspeed; resume it without, or use --overwrite")
        if state["zero"] != self.stage and {state["zero"], self.stage} != {1, 2}:
            raise UserError(f"{shards}.pth was saved under ZeRO stage {state['zero']}, {self.args.deepspeed} has "
                            f"{self.stage}; resume it with the same stage, or use --overwrite")  # fmt: skip
        # Parts of another number of processes or another stage fit only by way of DeepSpeed's universal checkpoint.
        name = state["shards"]
        universal = state["zero"] > 0 and (state["zero"], state["processes"]) != (self.stage, self.world.size)
        if universal:
            name = f"{name}_universal"
            self.world.first_then_all(lambda: make_universal(shards / state["shards"], shards / name))
        self.model._config.load_universal_checkpoint = universal
        with contextlib.redirect_stdout(sys.stderr):
            loaded, _ = self.model.load_checkpoint(str(shards), tag=name)
        self.model._config.load_universal_checkpoint = False
        if loaded is None:
            raise RunFailed(f"{shards / name} cannot be read; --overwrite starts afresh")
        restore_rng(self.world, state["rng"])

    @torch.no_grad()
    def whole_model(self):
        """The model to be written: on the first process whole and in float32. All processes must call it."""
        if self.whole is None:
            return self.module
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        mine = dict(self.whole.named_parameters())
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            with GatheredParameters([parameter], enabled=full is None and self.stage == 3):
                mine[name].copy_(parameter if full is None else full)  # None: frozen
        return self.whole


def make_universal(source, target) -> None:
    """DeepSpeed's universal checkpoint, which any number of processes can load, of the one in `source`."""
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    if target.exists():
        return
    building = target.with_name(f"{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        ds_to_universal(argparse.Namespace(
            input_folder=str(source), output_folder=str(building), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        ))  # fmt: skip
    building.rename(target)
