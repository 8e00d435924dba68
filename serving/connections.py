"""A connection as uvicorn has it, and what uvicorn leaves open: silent clients, and clients that half-close."""

import asyncio
import logging
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # every client passes over it
COMMENT = b": \n\n"  # in an event stream, likewise
FIRST_PROBE, NEXT_PROBE = 0.05, 0.5  # seconds


class Connection(H11Protocol):
    """patience: seconds in which a request's head must be there, from its first byte or the connection's beginning.

    A client that has sent its request may close its own side and wait for the answer. One that has gone away looks the
    same, until something is sent: then its system says that nobody listens. So after the close a few bytes that mean
    nothing are sent now and then until the answer is there.
    """

    def __init__(self, *args, patience: float = 20.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.patience = patience
        self.head_timer: asyncio.TimerHandle | None = None
        self.probe_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self._stop(self.head_timer)
            self.head_timer = None
        elif self.head_timer is None and not self.transport.is_closing():
            self._await_head()  # once a head: a byte now and then buys no time

    def eof_received(self) -> bool:
        """-> whether the connection stays open."""
        if self.idle or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._probe(FIRST_PROBE)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self.head_timer)
        self._stop(self.probe_timer)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self.head_timer = self.loop.call_later(self.patience, self.transport.close)

    def _probe(self, pause: float) -> None:
        if self.idle or self.transport.is_closing():
            return
        if not self.cycle.response_started:
            self.transport.write(CONTINUE)
        elif not self.flow.write_paused:  # only event streams are sent in parts
            self.transport.write(self.conn.send(h11.Data(data=COMMENT)))
        self.probe_timer = self.loop.call_later(pause, self._probe, NEXT_PROBE)

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


class OnceASecond(logging.Filter):
    """The same message at most once a second: what anyone can cause must not fill a disk."""

    def __init__(self):
        super().__init__()
        self.last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self.last.get(record.msg, -1.0) < 1:
            return False
        self.last[record.msg] = now
        return True
