"""One HTTP request between the scheduler's thread and the server's event loop, and its answer as a stream of events."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from fastapi import Request
from fastapi.responses import StreamingResponse

from inference.scheduler import Handle
from inference.stream_text import Piece
from serving.errors import ApiError, failed, shutting_down, timed_out

log = logging.getLogger(__name__)
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back
CLIENT_GONE = 499  # nginx' status for it; nobody reads the response


class RequestRun:
    """One HTTP request between the scheduler's thread and the server's event loop.

    The scheduler gives its pieces to arrive(), a response takes them from pieces(). end() must be called whatever
    happens: it frees the rows.
    """

    def __init__(self, ended: Callable[[Handle], None]):
        """ended: is called with each handle once all is over."""
        self.handles: list[Handle] = []  # one a prompt
        self.ended, self.over = ended, False
        self.stopped: ApiError | None = None
        self.loop = asyncio.get_running_loop()
        # (which handle, piece); in the place of a piece None where the handle has ended, an exception where it failed.
        self.arrived: asyncio.Queue = asyncio.Queue()
        # Three things can end a run early: this timer, a client that leaves (watcher) and an error from the scheduler.
        self.timer: asyncio.TimerHandle | None = None
        self.watcher: asyncio.Task | None = None

    def arrive(self, i: int, item: Piece | BaseException | None) -> None:
        """Called in the scheduler's thread."""
        # asyncio's queues belong to the loop's thread; this is the one way in from another.
        with contextlib.suppress(RuntimeError):  # the loop is closed already: nobody waits for this answer
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, (i, item))

    def begin(self, request: Request, timeout: float) -> None:
        """From now on the client's leaving and the time limit (seconds) end the run."""
        self.timer = self.loop.call_later(timeout, self._stop, timed_out(timeout))
        self.watcher = asyncio.create_task(self._watch(request))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(which handle, piece) as they come. Raises ApiError where the run ends early."""
        waiting = len(self.handles)
        while waiting:
            i, item = await self.arrived.get()
            # `stopped` first: pieces may still lie in the queue before the item that _stop() put behind them.
            if self.stopped:
                raise self.stopped
            if isinstance(item, BaseException):  # a failed step of the batch, out of memory for one
                log.error("a request failed", exc_info=item)
                raise failed()
            if item is not None:
                yield i, item
                continue
            waiting -= 1
            if any(sample.finish_reason == "cancelled" for sample in self.handles[i].samples):
                raise shutting_down()

    async def _watch(self, request: Request) -> None:
        """Nothing but a disconnect can follow the body."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._stop(ApiError(CLIENT_GONE, "the client has gone"))

    def _stop(self, reason: ApiError) -> None:
        """Ends the generation at once, even where a slow client keeps pieces() from being asked for the next item."""
        self.stopped = reason
        self.arrived.put_nowait((0, None))  # wakes pieces()
        for handle in self.handles:
            handle.cancel()

    def end(self) -> None:
        """Frees the rows; may be called twice."""
        if self.over:
            return
        self.over = True
        self.timer.cancel()
        self.watcher.cancel()
        for handle in self.handles:
            handle.cancel()
            self.ended(handle)


class EventStream(StreamingResponse):
    """Server-sent events. The run ends with the response, even where the client left before the first byte."""

    def __init__(self, events: AsyncIterator[str], run: RequestRun, headers: dict | None = None):
        super().__init__(events, media_type="text/event-stream", headers=HEADERS | (headers or {}))
        self.run = run

    async def __call__(self, scope, receive, send) -> None:
        # Here and not in the generator of the events: one that was never started runs none of its `finally`.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.end()
