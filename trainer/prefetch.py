"""The micro-batches of each step, made ready while the step before runs.

Assembling a step's rows takes a CPU a few milliseconds, in which a GPU would stand still. So a thread does it one step
ahead, and leaves the tensors in pinned memory, from which a GPU copies them while it computes something else.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from model.attention import document_ends


class Feed:
    """A step's micro-batches on this process. rows: see data/rows.py; plan.rows(step, i): which of them."""

    def __init__(self, rows, plan, device: torch.device):
        self.rows, self.plan, self.device = rows, plan, device
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self.ahead: dict = {}  # the step being assembled, if any

    def micro_batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Those of a step, counted from 0, none past the last; the next one's are begun. An error is raised here."""
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
    """The batch with what only a GPU wants: where its documents end, and memory it can copy from by itself.

    most_documents: of any row of any batch, which gives the ends of all batches one length, see document_ends.
    """
    if device.type != "cuda":
        return batch
    B = len(batch["segment_ids"])
    batch["document_ends"] = document_ends(batch["segment_ids"], size=B * (most_documents + 1) + 1)  # + 1 of padding
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def to_device(batch: dict, device: torch.device) -> dict:
    """Its tensors on `device`; single numbers (count, real_tokens) stay where the loop can read them at once."""
    return {name: x.to(device, non_blocking=True) if x.dim() else x for name, x in batch.items()}


def amounts(batches) -> tuple[int, int]:
    """(count, real tokens) of a process's micro-batches together."""
    return sum(int(b["count"]) for b in batches), sum(int(b["real_tokens"]) for b in batches)
