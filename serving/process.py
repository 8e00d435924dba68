"""The server as a process: its port, its descriptors, and shutting down."""

import asyncio
import logging
import socket
from functools import partial

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from inference.scheduler import Scheduler
from serving.connections import Connection, OnceASecond

log = logging.getLogger("uvicorn.error")  # where uvicorn itself writes
DESCRIPTORS = 65536  # a connection takes one


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. port 0: a free one. Raises ValueError.

    It is opened before the model is loaded, so that a mistake shows at once. It names its protocol, because asyncio
    sends small packets at once (TCP_NODELAY) only on a socket that says TCP. Otherwise a streamed token would wait for
    the receipt of the one before, 40 ms on Linux.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
        return listener
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None


def raise_descriptor_limit() -> None:
    """A process may open more files than it does at first (1,024, as a rule), up to the system's own limit."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Server(uvicorn.Server):
    """At shutdown it ends the running requests first. uvicorn alone would wait until they are done."""

    def __init__(self, app: FastAPI, scheduler: Scheduler, patience: float = 20.0):
        """patience: see Connection."""
        # backlog: asyncio accepts so many connections in one go, and where it cannot it fails as often.
        super().__init__(uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=10, http=partial(Connection, patience=patience),
            ws="none", backlog=64,
        ))  # fmt: skip
        self.scheduler = scheduler
        log.addFilter(OnceASecond())

    async def startup(self, sockets=None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._fault)
        await super().startup(sockets)

    def _fault(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        """For faults of the event loop: one that it has is that no connection can be accepted any more."""
        if "accept" not in context.get("message", ""):
            return loop.default_exception_handler(context)
        # Those that are served stay; those that ask nothing make room.
        silent = [connection for connection in self.server_state.connections if connection.idle]
        for connection in silent:
            connection.transport.close()
        log.error("no connection can be accepted (%s): those without a request are closed", context.get("exception"))

    async def shutdown(self, sockets=None) -> None:
        await run_in_threadpool(self.scheduler.close)
        await super().shutdown(sockets)
