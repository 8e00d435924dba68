"""The micro-batches of each step, prepared while the step before runs.

Assembling a step's rows takes a few milliseconds of CPU time, during which a GPU would be idle. So a thread does it one
step ahead and puts the tensors into pinned memory, from which a GPU can copy them while it computes something else.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from model.attention import document_ends


class Feed:
    """This process's micro-batches, step by step. rows: see data/rows.py; plan.rows(step, i) says which of them."""

    def __init__(self, rows, plan, device: torch.device):
        self.rows, self.plan, self.device = rows, plan, device
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self.ahead: dict = {}  # the step being assembled, if any

    def micro_batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of a step (counted from 0; past the last one: none). Starts to assemble the next step's.

        An error of the thread is raised here.
        """
        if step >= self.plan.steps:
            return []
        ready = self.ahead.pop(step, None)
        batches = ready.result() if ready else self._assemble(step)
        if step + 1 < self.plan.steps:
            self.ahead[step + 1] = self.pool.submit(self._assemble, step + 1)
        return batches

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _assemble(self, step: int) -> list[dict[str, torch.Tensor]]:
        return [
            ready_for(self.device, self.rows.batch(self.plan.rows(step, i)), self.rows.most_documents)
            for i in range(self.plan.accumulation_steps)
        ]


def ready_for(device: torch.device, batch: dict, most_documents: int) -> dict[str, torch.Tensor]:
    """The batch as a GPU needs it: with document_ends, and in pinned memory. Unchanged for other devices.

    most_documents: the most that any row of any batch has. With it all batches' document_ends have one length.
    """
    if device.type != "cuda":
        return batch
    B = len(batch["segment_ids"])
    batch["document_ends"] = document_ends(batch["segment_ids"], size=B * (most_documents + 1) + 1)  # + 1 of padding
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on `device`. Single numbers (count, real_tokens) stay on the CPU: reading them from a
    GPU would mean waiting for it."""
    return {name: x.to(device, non_blocking=True) if x.dim() else x for name, x in batch.items()}


def amounts(batches) -> tuple[int, int]:
    """(count, real tokens), each summed over a process's micro-batches."""
    return sum(int(b["count"]) for b in batches), sum(int(b["real_tokens"]) for b in batches)
