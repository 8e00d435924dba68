"""The server as a process: opening its port, and shutting down."""

import socket

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from inference.scheduler import Scheduler


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


class Server(uvicorn.Server):
    """At shutdown it ends the running requests first. uvicorn alone would wait until they are done."""

    def __init__(self, app: FastAPI, scheduler: Scheduler):
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
        self.scheduler = scheduler

    async def shutdown(self, sockets=None) -> None:
        await run_in_threadpool(self.scheduler.close)
        await super().shutdown(sockets)
