"""Sees to it that no process of a run waits for one that is gone.

A collective of two processes hangs when the third has died, on some backends for half an hour, and its error does not
say who. So every process counts aloud, once a second, in the store through which they found each other, and listens to
the others. That also allows the collectives themselves to be patient: while the first process tokenises a large corpus,
the others wait for hours.
"""

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as torch_dist
from torch.distributed.rendezvous import rendezvous

from trainer.cli import RunFailed, UserError

START, PATIENCE = timedelta(minutes=10), timedelta(days=1)  # to find each other; of collectives after that
BEAT, SILENCE = 1.0, 20.0  # seconds: between counts; without one until a process is held for dead
SUSPECT = 5.0  # the same, when a connection has broken already
GRACE = 3.0  # for the main thread to leave by itself


class Watch:
    """Around the work of one of several processes; turns the loss of another into RunFailed, or ends this one."""

    def __init__(self, rank: int, size: int):
        self.rank, self.others = rank, [r for r in range(size) if r != rank]
        self.store, *_ = next(rendezvous("env://", rank, size, timeout=START))
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.silence, self.words = SILENCE, ""
        self.lost, self.done = threading.Event(), threading.Event()

    def __enter__(self):
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        try:
            if error is None or isinstance(error, SystemExit):
                torch_dist.barrier()  # whoever leaves early would be taken for dead
            elif _is_broken_connection(error):
                self.silence = SUSPECT
                if self.lost.wait(2 * SUSPECT):
                    raise RunFailed(self.words) from None
            elif not isinstance(error, UserError):  # those, all processes meet alike
                self.store.add(f"failed/{self.rank}", 1)
        finally:
            self.done.set()

    def _listen(self) -> None:
        now = time.monotonic()
        heard = dict.fromkeys(self.others, (0, now))  # its last count, and when it changed
        while not self.done.wait(BEAT):
            if self.launcher and os.getppid() != self.launcher:  # the same command may be at work again beside us
                return self._end("this machine's launcher is lost")
            try:
                self.store.add(f"beat/{self.rank}", 1)
                counts = {rank: self.store.add(f"beat/{rank}", 0) for rank in self.others}
                failed = [rank for rank in self.others if self.store.add(f"failed/{rank}", 0)]
            except RuntimeError:  # the store lived in a process that is gone
                return self._end("rank 0, or the launcher, is lost")
            now = time.monotonic()
            heard = {r: (counts[r], now) if counts[r] != heard[r][0] else heard[r] for r in self.others}
            silent = [rank for rank, (_, when) in heard.items() if now - when > self.silence]
            if failed or silent:
                names = ", ".join(f"rank {rank}" for rank in failed or silent)
                return self._end(f"{names} {'failed, its message stands apart' if failed else 'is lost (killed?)'}")

    def _end(self, words: str) -> None:
        self.words = f"{words}; what was saved before is whole, --resume goes on from it"
        self.lost.set()
        if not self.done.wait(GRACE):  # the main thread hangs, or has not noticed
            print(f"failed: {self.words}", file=sys.stderr, flush=True)
            os._exit(1)


def _is_broken_connection(error: BaseException) -> bool:
    return isinstance(error, torch_dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
