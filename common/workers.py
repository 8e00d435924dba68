"""Runs one function over batches on all cores and gives the results back in the batches' order.

Why a pool of processes and not `datasets.map`: cleaning must keep a reason for every row it leaves out, and must hold a
few batches in memory however large the collection is. `datasets.map` writes the whole table to its cache once per step,
and reads some of our files (a broken CSV, a line of 500 MB) whole or not at all. The steps themselves are plain
functions over rows, so they run under `datasets`, datatrove or Ray Data too; docs/data.md shows how.
cleaning/cluster.py has another class with Pool's map(), for a cluster.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from common.errors import RunFailed

try:
    import resource
except ImportError:  # Windows
    resource = None

_worker: dict = {}


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """map() runs a function over batches, in order, on the cores of this machine."""

    def __init__(self, workers: int):
        self.workers = workers
        self.held_here = workers if workers > 1 else 0  # workers whose memory counts as this machine's

    def map(self, function: Callable, batches: Iterable, *context) -> Iterator:
        return ordered_map(function, batches, self.workers, *context)


def ordered_map(function: Callable, batches: Iterable, workers: int, *context) -> Iterator:
    """Yields function(batch, *context) for each batch, in order; `context` is sent to each worker once.

    workers 1 runs in this process. At most 2 x workers batches are under way, so memory does not grow with the input.
    Raises RunFailed if a worker is killed (usually by the system, for want of memory).
    """
    if workers == 1:
        for batch in batches:
            yield function(batch, *context)
        return
    # fork shares what is loaded; elsewhere a worker imports it anew
    method = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    initial = (function, context, os.getpid())
    with ProcessPoolExecutor(workers, mp_context=method, initializer=_start_worker, initargs=initial) as pool:
        waiting = deque()  # results in the batches' order, whichever worker is ready first
        try:
            for batch in batches:
                waiting.append(pool.submit(_run_in_worker, batch))
                # Two batches a worker: one at work, one waiting. Then no more are read until the oldest is done.
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunFailed("a worker process was killed, perhaps for want of memory; try --workers 1") from None
        finally:  # also if the caller stops early: batches that are still waiting are not started
            pool.shutdown(cancel_futures=True)


def peak_memory(workers: int) -> int | None:
    """The most bytes that this process and so many workers held; pages they share are counted for each. None where the
    system does not say."""
    if resource is None:
        return None
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss includes the memory of the program that started this one
        own = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * (own + workers * child)


# ------------------------------------------------------------------------------------------------------- in a worker
def _start_worker(function, context, parent: int):
    _worker["function"], _worker["context"] = function, context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int):
    """Ends this worker when its parent is gone: a killed parent cannot end it, and it would wait forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_in_worker(batch):
    return _worker["function"](batch, *_worker["context"])
