"""The server as a process: its port, and its end."""

import socket

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from inference.scheduler import Scheduler


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; taken before a model is loaded, so that a mistake shows at once. port 0: a free one.

    It names its protocol: asyncio sends small packets at once (TCP_NODELAY) only where the socket says TCP, and a
    streamed token otherwise waits for the receipt of the one before, 40 ms on Linux. Raises ValueError.
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
    """Ends the running requests first: uvicorn on its own waits until they are done."""

    def __init__(self, app: FastAPI, scheduler: Scheduler):
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
        self.scheduler = scheduler

    async def shutdown(self, sockets=None) -> None:
        await run_in_threadpool(self.scheduler.close)
        await super().shutdown(sockets)
