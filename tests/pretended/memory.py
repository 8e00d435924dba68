"""Counts the bytes a training step would hold on a GPU, without computing it: tensors have shapes and no numbers.

    python tests/pretended/memory.py ROWS PRESET...        rows of 512 tokens, bfloat16, Muon

Prints {preset: {"counted": peak bytes, "said": bytes of trainer/memory.py}}.
"""

import json
import sys
import weakref
from argparse import Namespace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from pretended.gpu import CUDA, pretend  # isort: skip  before anything that imports torch

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import expert_loop
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from trainer.loop import language_model
from trainer.memory import training_bytes
from trainer.optimizers import make_optimizers
from trainer.world import World

T = 512
fake_tensor.init_gpu_context = lambda device: None


class Live(TorchDispatchMode):
    """Bytes of all storages on the GPU that are alive, in the allocator's blocks of 512, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // 512) * 512
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key) -> None:
        self.now -= self.sizes.pop(key, 0)


def counted(config: LMConfig, rows: int) -> int:
    """Peak bytes of the second step, in which the optimizer's state is there."""
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        with CUDA:
            model = MiniMindForCausalLM(config).train()
        optimizers = make_optimizers(model, "muon", 1e-3, 0.1)
        ids = torch.zeros(rows, T, dtype=torch.long, device=CUDA)
        ends = torch.zeros(4 * rows + 1, dtype=torch.int32, device=CUDA)
        batch = {"input_ids": ids, "labels": ids, "segment_ids": ids + 1, "document_ends": ends}
        for _ in range(2):
            live.peak = live.now
            with torch.autocast("cuda", torch.bfloat16):
                loss, _, _, balance = language_model(model, batch)
            (loss if balance is None else loss + balance).backward()
            torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            del loss
        return live.peak


def main(rows: str, *presets: str) -> None:
    pretend((9, 0))
    expert_loop.experts_in_turn = None  # the grouped kernels are what is counted
    found = {}
    for preset in presets:
        config = LMConfig.from_preset(preset)
        args = Namespace(seq_len=T, optimizer="muon", gradient_checkpointing=False)
        world = World(0, 1, CUDA, torch.bfloat16)
        said = training_bytes(config, args, world, int(rows), config.parameter_count())
        found[preset] = {"counted": counted(config, int(rows)), "said": said}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
