"""Many requests at once: a thread that runs one batch, which requests join and leave between steps.

    with Scheduler(engine, slots=8, queue=64) as scheduler:
        handle = scheduler.submit(engine.encode(messages), SamplingParams(max_tokens=100))
        for piece in handle: print(piece.text, end="")

A request waits in the queue until a row of the cache is free. The next step reads its prompt, and from then on it gets
a token in every step of the batch. While rows are free no request waits for another to finish, and once it runs none
has to make room. (Orca, Yu et al. 2022, OSDI, calls this iteration-level scheduling.)
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import Completion, Piece, Sequence, sequences


class QueueFull(RuntimeError):
    """The queue holds as many requests as it may; try again later."""


class Closed(RuntimeError):
    """The scheduler has been closed."""


class Handle:
    """A submitted request. Iterate over it, in one thread, for the pieces of its answers as they come.

    With `deliver` the pieces go there instead, see Scheduler.submit.
    """

    def __init__(self, scheduler: "Scheduler", samples: list[Sequence], deliver: Callable | None = None):
        self.scheduler, self.samples = scheduler, samples
        self.open = len(samples)  # samples that go on
        self.submitted = time.monotonic()
        self.first_token: float | None = None  # when it came, on the same clock; finished likewise
        self.finished: float | None = None
        self.cancelled = False
        # What the worker delivers: pieces, then None at the end or the exception that ended it.
        self._pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        self.deliver = deliver or self._pieces.put

    def __iter__(self):
        while True:
            piece = self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                return
            yield piece

    def result(self) -> list[Completion]:
        """Waits for the end -> the n samples. A cancelled request gives what it has, finish_reason "cancelled"."""
        for _ in self:
            pass
        return [sample.completion() for sample in self.samples]

    def cancel(self) -> None:
        """Ends the request and frees its rows before the next step. Does nothing if it has ended already."""
        self.scheduler._cancel(self)

    @property
    def prompt_tokens(self) -> int:
        return len(self.samples[0].prompt)


class Scheduler:
    """One worker thread over one batch.

    slots: rows of the batch; a request of n samples takes n. queue: requests that may wait. compile: decode steps as
    CUDA graphs, see Engine.batch.
    """

    def __init__(self, engine: Engine, slots: int = 8, queue: int = 64, compile: bool = False):
        if slots < 1 or queue < 0:
            raise ValueError(f"slots must be at least 1 and queue at least 0, not {slots} and {queue}")
        self.engine, self.slots, self.queue_limit = engine, slots, queue
        self.compile = compile
        self.batch = engine.batch(slots, compile)
        self.waiting: deque[Handle] = deque()
        self.running: set[Handle] = set()
        self.leaving: list[Handle] = []  # cancelled ones whose rows the worker has yet to free
        self.counts = dict.fromkeys(
            ("requests", "finished", "cancelled", "failed", "refused", "prompt_tokens", "new_tokens", "steps"), 0
        )
        self.closed = False
        # One lock for all of the above. The worker sleeps on it while there is nothing to do. A step of the batch runs
        # outside it, so submit() and cancel() never wait for the model.
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------- for the requesters
    def submit(
        self, prompt: list[int], params: SamplingParams | None = None,
        deliver: Callable[[Piece | BaseException | None], None] | None = None,
    ) -> Handle:  # fmt: skip
        """Any thread may call it; returns at once. prompt: token ids, see Engine.encode.

        deliver: the worker calls it with each piece, then with None or with the exception that ended the request. All
        requests wait while it runs, so it must return at once. Without it iterate over the handle.

        Raises ValueError for a prompt that cannot be answered or more samples than there are rows, QueueFull, Closed.
        """
        params = params or SamplingParams()
        if params.n > self.slots:
            raise ValueError(f"n is {params.n}, but only {self.slots} answers are generated at once")
        # Outside the lock: checking the request and setting up its samplers need not hold up the others.
        handle = Handle(self, sequences(self.engine, prompt, params), deliver)
        for sample in handle.samples:
            sample.request = handle
        with self._wake:
            if self.closed:
                raise Closed("the scheduler has been closed")
            if len(self.waiting) >= self.queue_limit and not self._fits(handle):
                self.counts["refused"] += 1
                raise QueueFull(f"{len(self.waiting)} requests wait already")
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += handle.prompt_tokens
            self.waiting.append(handle)
            self._wake.notify()
        return handle

    def stats(self) -> dict:
        """Counts since the start, and how many requests wait and run and how many rows are taken now."""
        with self._wake:
            taken = self.slots - self.batch.free
            return self.counts | {"waiting": len(self.waiting), "running": len(self.running), "rows": taken}

    def close(self) -> None:
        """Ends all requests as cancelled and stops the thread."""
        with self._wake:
            self.closed = True
            self._wake.notify()
        self._thread.join()  # it ends the requests: only the worker may touch the batch

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _fits(self, handle: Handle) -> bool:
        """Whether it can start at once: nobody waits before it and enough rows are free."""
        return not self.waiting and self.batch.free >= len(handle.samples)

    def _cancel(self, handle: Handle) -> None:
        with self._wake:
            if handle.finished or handle.cancelled:
                return
            handle.cancelled = True
            if handle in self.waiting:  # it has no rows: it can be ended here
                self.waiting.remove(handle)
                self._end(handle, "cancelled")
            else:  # the batch may be in a step now: the worker frees the rows between two steps
                self.leaving.append(handle)
                self._wake.notify()

    # ----------------------------------------------------------------------------------------------- for the worker
    def _work(self) -> None:
        while True:
            try:
                if not self._let_in_and_out():
                    return
                gained = self.batch.step()
            except Exception as error:  # out of memory, for one: the requests that ran end, the next get a new batch
                self._fail(error)
                continue
            # While the step ran, some of these requests may have been cancelled: _hand_over() looks again.
            with self._wake:
                self.counts["steps"] += 1
                for sequence, piece in gained:
                    self._hand_over(sequence.request, piece)

    def _let_in_and_out(self) -> bool:
        """Between two steps: frees the rows of cancelled requests, then starts waiting ones while rows last.

        Sleeps while there is nothing to do. False where the scheduler has been closed.
        """
        with self._wake:
            while True:
                # Out before in: rows that become free now are given away in the same pause.
                if self.closed:
                    self.leaving += [handle for handle in self.running if not handle.cancelled]
                for handle in self.leaving:
                    for sample in handle.samples:
                        self.batch.leave(sample)
                    self._end(handle, "cancelled")
                self.leaving.clear()
                if self.closed:
                    while self.waiting:
                        self._end(self.waiting.popleft(), "cancelled")
                    return False
                # Strictly first come first served: a request of n samples is not overtaken by smaller ones for ever.
                while self.waiting and self.batch.free >= len(self.waiting[0].samples):
                    handle = self.waiting.popleft()
                    self.running.add(handle)
                    self.batch.join(list(handle.samples))
                if self.batch.busy:
                    return True
                self._wake.wait()

    def _hand_over(self, handle: Handle, piece: Piece) -> None:
        """Delivers one piece, and the end of the request after the last piece of its last sample."""
        if handle.finished or handle.cancelled:
            return
        handle.first_token = handle.first_token or time.monotonic()
        self.counts["new_tokens"] += len(piece.token_ids)
        handle.deliver(piece)
        handle.open -= piece.finish_reason is not None
        if not handle.open:
            self._end(handle, "finished")

    def _end(self, handle: Handle, how: str, error: BaseException | None = None) -> None:
        """Ends a handle: the last thing it is given is None or the error. `how`: the count it is added to."""
        if handle.finished:
            return
        handle.finished = time.monotonic()
        self.running.discard(handle)
        self.counts[how] += 1
        for sample in handle.samples:
            sample.finish_reason = sample.finish_reason or "cancelled"
        handle.deliver(error)

    def _fail(self, error: Exception) -> None:
        """Ends what ran and begins with a new batch: after half a step nobody knows what the old cache holds."""
        with self._wake:
            for handle in list(self.running):
                self._end(handle, "failed", error)
            self.leaving.clear()  # their rows went with the old batch
            self.batch = self.engine.batch(self.slots, self.compile)
