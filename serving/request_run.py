"""A request between the server's event loop and the scheduler's thread.

The scheduler hands the pieces of an answer to whoever iterates over the handle, which blocks. One thread a request
waits there and passes the pieces on to the event loop; so many threads as requests can run or wait are enough.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi.responses import StreamingResponse
from starlette.requests import Request

from inference.batch import Piece
from inference.scheduler import Handle
from serving.errors import ApiError, failed, timed_out

log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx' number for it; nobody reads the response


class Run:
    """The handles of one HTTP request. Whoever makes one calls end(), whatever happens: it frees the slots."""

    def __init__(self, handles: list[Handle], threads: ThreadPoolExecutor, timeout: float, ended: Callable):
        """ended: is called with each handle once all is over."""
        self.handles, self.ended, self.over = handles, ended, False
        self.stopped: ApiError | None = None
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue = asyncio.Queue()  # (which handle, piece); None for one that ends; ApiError
        self.timer = self.loop.call_later(timeout, self._stop, timed_out(timeout))
        self.watcher: asyncio.Task | None = None
        for i, handle in enumerate(handles):
            threads.submit(self._listen, i, handle)

    def _listen(self, i: int, handle: Handle) -> None:
        """In a thread of its own: waits for pieces."""
        try:
            for piece in handle:
                self.loop.call_soon_threadsafe(self.arrived.put_nowait, (i, piece))
            cut = any(sample.finish_reason == "cancelled" for sample in handle.samples)
            end = ApiError(503, "the server is shutting down", "shutting_down") if cut else None
        except Exception:  # a failed step of the batch, out of memory for one
            log.exception("a request failed")
            end = failed()
        self.loop.call_soon_threadsafe(self.arrived.put_nowait, end)

    async def pieces(self, request: Request) -> AsyncIterator[tuple[int, Piece]]:
        """(which handle, piece) as they come. Raises ApiError at the time limit, and if the client has gone."""
        self.watcher = asyncio.create_task(self._watch(request))
        waiting = len(self.handles)
        while waiting:
            item = await self.arrived.get()
            if self.stopped or isinstance(item, ApiError):
                raise self.stopped or item
            if item is None:
                waiting -= 1
            else:
                yield item

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._stop(ApiError(CLIENT_GONE, "the client has gone"))

    def _stop(self, reason: ApiError) -> None:
        """At once, even if a slow client keeps the answer from being sent."""
        self.stopped = reason
        self.arrived.put_nowait(reason)
        for handle in self.handles:
            handle.cancel()

    def end(self) -> None:
        if self.over:
            return
        self.over = True
        self.timer.cancel()
        if self.watcher:
            self.watcher.cancel()
        for handle in self.handles:
            handle.cancel()
            self.ended(handle)


class EventStream(StreamingResponse):
    """Server-sent events of a run, which ends with the response even if the client left before the first byte."""

    def __init__(self, events: AsyncIterator[str], run: Run):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.run = run

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.end()
