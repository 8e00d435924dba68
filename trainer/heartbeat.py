"""Ends a process that waits for a dead one, and names the rank that is lost or never started.

torchrun ends the processes of its own machine. But when a process on another machine has died, a collective hangs, on
some backends for half an hour, and its error does not name the rank. So every process raises a counter once a second in
the store through which the processes connected, and reads the counters of the others. This also allows a long timeout
for the collectives themselves: the others may wait for hours while the first process tokenises a large corpus.
"""

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as torch_dist

from common.errors import RunFailed, UserError

START, PATIENCE = timedelta(minutes=5), timedelta(days=1)  # to find each other; of collectives after that
TOLD = 20.0  # seconds of waiting for others until a line says for whom
BEAT, SILENCE = 1.0, 20.0  # seconds between counts; seconds without one after which a process counts as lost
SUSPECT = 5.0  # the same, when a connection has broken already
GRACE = 3.0  # seconds for the main thread to leave by itself


class Heartbeat:
    """A context around the work of one of several processes. If another process is lost it raises RunFailed; if the
    main thread hangs in a collective, it ends the process."""

    def __init__(self, rank: int, size: int):
        self.rank, self.others = rank, [r for r in range(size) if r != rank]
        self.store = meet(rank, size)
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.silence, self.words = SILENCE, ""
        self.lost, self.done = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if error is None or isinstance(error, SystemExit):
                torch_dist.barrier()  # a process that left before the others would count as lost
            elif _is_broken_connection(error):
                self.silence = SUSPECT  # give the listening thread time to see whose counter stands still
                if self.lost.wait(2 * SUSPECT):
                    raise RunFailed(self.words) from None
        finally:
            self.done.set()

    def _listen(self) -> None:
        # rank -> (last count, seconds without a change). The seconds are counted in this process's own beats and not by
        # the clock: after Ctrl-Z or a laptop's sleep the clock would show all others as lost.
        heard = dict.fromkeys(self.others, (0, 0.0))
        while not self.done.wait(BEAT):
            # Without its launcher this process would be left over, perhaps beside a new run of the same command.
            if self.launcher and os.getppid() != self.launcher:
                return self._end("this machine's launcher is lost")
            try:
                self.store.add(f"beat/{self.rank}", 1)
                counts = {rank: self.store.add(f"beat/{rank}", 0) for rank in self.others}
            except RuntimeError:  # the store lived in a process that is gone
                return self._end("rank 0, or the launcher, is lost")
            heard = {r: (counts[r], heard[r][1] + BEAT if counts[r] == heard[r][0] else 0.0) for r in self.others}
            silent = [rank for rank, (_, seconds) in heard.items() if seconds > self.silence]
            if silent:
                names = ", ".join(f"rank {rank}" for rank in silent)
                return self._end(f"{names} is lost (killed, or it failed with a message of its own)")

    def _end(self, words: str) -> None:
        self.words = f"{words}; what was saved before is whole, --resume goes on from it"
        self.lost.set()
        if not self.done.wait(GRACE):  # the main thread hangs, or has not noticed
            print(f"failed: {self.words}", file=sys.stderr, flush=True)
            os._exit(1)


def meet(rank: int, size: int):
    """The store through which the launcher's processes connect, once all have arrived. RunFailed names the ranks that
    do not arrive in time."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(f"WORLD_SIZE is {size}, and MASTER_ADDR:MASTER_PORT no place to meet; use torchrun") from None
    ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher's, or rank 0's
    waiting = Waiting(rank)
    while not ours and not _answers(host, port):  # torch, when it waits itself, fills the screen with its sockets
        waiting.for_ranks([0])
    try:
        store = torch_dist.TCPStore(host, port, size, ours, START, wait_for_workers=False, multi_tenant=True)
        store.set(f"here/{rank}", "")
        while not store.check([f"here/{r}" for r in range(size)]):
            waiting.for_ranks([r for r in range(size) if not store.check([f"here/{r}"])])
    except RuntimeError as error:  # torch's DistError
        words = str(error).partition("\n")[0]
        raise RunFailed(f"the processes cannot meet at {host}:{port}, or rank 0 has gone: {words}") from None
    return store


class Waiting:
    """Waits for other ranks: prints once which, and raises RunFailed when START has passed."""

    def __init__(self, rank: int):
        self.rank, self.begin, self.told = rank, time.monotonic(), False

    def for_ranks(self, missing: list[int]) -> None:
        names, seconds = ", ".join(f"rank {rank}" for rank in missing), time.monotonic() - self.begin
        if seconds > START.total_seconds():
            minutes = START.total_seconds() / 60
            raise RunFailed(f"{names} did not come within {minutes:g} minutes; see what it said, and start all again")
        if seconds > TOLD and not self.told:
            print(f"rank {self.rank} is waiting for {names}", file=sys.stderr, flush=True)
            self.told = True
        time.sleep(0.2)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _is_broken_connection(error: BaseException) -> bool:
    return isinstance(error, torch_dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
