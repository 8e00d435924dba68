"""The schedule of a run: which rows a step learns from, when to save, when to stop."""

import math
import os
import signal
import sys
import time

from common.errors import UserError


class Plan:
    """How many steps a run has, and which rows are in each of them: a function of the step alone, so resuming needs no
    saved position.

    group: that many consecutive rows belong together (GRPO's answers to one question); the end of the last epoch is
    rounded up to whole groups.
    """

    def __init__(self, run, rows, world, group: int = 1):
        self.world, self.batch_size, self.accumulation_steps = world, run.batch_size, run.accumulation_steps
        args, together = run.args, run.batch_size * world.size  # rows of one micro-batch of all processes
        if run.state is not None:  # a resumed run keeps its global batch, even with another number of processes
            wanted = run.state["record"]["recipe"]["rows_per_step"]
            if wanted % together:
                raise UserError(
                    f"the run's steps of {wanted} rows cannot be made of {world.size} processes with --batch_size "
                    f"{run.batch_size}; choose a batch size that divides {wanted // world.size}"
                )
            self.accumulation_steps = wanted // together
        self.global_batch_size = together * self.accumulation_steps  # rows of a step
        # The last step may be a partial one: rows past total_rows are empty.
        self.total_rows = math.ceil(math.ceil(args.epochs * len(rows)) / group) * group
        self.steps = math.ceil(self.total_rows / self.global_batch_size)
        if args.max_steps is not None:
            self.steps, self.total_rows = args.max_steps, args.max_steps * self.global_batch_size
        self.warmup = round(args.warmup * self.steps) if args.warmup < 1 else int(args.warmup)
        if len(rows) < world.size:
            raise UserError(f"{len(rows)} row(s) of data cannot be shared by {world.size} processes")

    def rows(self, step: int, micro_batch: int) -> list[int]:
        """Global indices of this process's rows in a micro-batch; -1, an empty row, past the end of the last epoch."""
        # A micro-batch of all processes is a block of consecutive rows, of which rank r takes the r-th part.
        first = step * self.global_batch_size + (micro_batch * self.world.size + self.world.rank) * self.batch_size
        return [i if i < self.total_rows else -1 for i in range(first, first + self.batch_size)]


class StopSignals:
    """Remembers Ctrl-C or SIGTERM until the step is done; a second signal of the same kind ends the process at once.

    One signal of each kind counts as one request: at Ctrl-C the terminal sends SIGINT to all processes, and DeepSpeed's
    launcher then sends them SIGTERM as well.
    """

    def __init__(self):
        self.signal, self.seen = 0, set()
        self.before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number, frame):
        if number in self.seen:
            os._exit(128 + number)
        self.seen.add(number)
        if not self.signal:
            print("stopping after this step (once more: at once)", file=sys.stderr)
        self.signal = self.signal or number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class SaveTimes:
    """When to save: every --save_interval steps, and at the latest --save_minutes after the last save.

    The second rule bounds how much time a power cut can cost, also on a slow machine.
    """

    def __init__(self, args):
        self.steps, self.seconds = args.save_interval, args.save_minutes * 60
        self.last = time.monotonic()

    def overdue(self) -> bool:
        """Whether --save_minutes have passed on this process's clock. If they have on any process, all save."""
        return 0 < self.seconds <= time.monotonic() - self.last

    def due(self, step: int, overdue: bool | float) -> bool:
        """Whether to save after `step`. overdue: whether any process is overdue, so that all decide alike."""
        due = bool(overdue) or step % self.steps == 0
        if due:
            self.last = time.monotonic()
        return due
