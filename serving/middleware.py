"""What is checked before the routes see a request: the key, the size of the body, how long it takes to come."""

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from serving.errors import ApiError

MEGABYTE = 2**20


@dataclass
class Limits:
    """The most that a request may hold and take."""

    body: int = MEGABYTE  # bytes
    body_seconds: float = 30.0  # until the body is complete
    messages: int = 1000
    prompts: int = 16
    stops: int = 16  # stop strings
    max_tokens: int | None = None  # of an answer; None: what fits into the context
    timeout: float = 600.0  # seconds until the answer is complete


class RequestChecks:
    """The checks, as an ASGI middleware. With a key every address but /health needs `Authorization: Bearer KEY`.

    A body is read whole before the routes see it. One that is too large is read to its end and thrown away, up to DRAIN
    bytes: a client that is still sending when the connection closes would never see the refusal.
    """

    DRAIN = 256 * MEGABYTE

    def __init__(self, app, limits: Limits, count: Callable[[int], None], api_key: str | None = None):
        """count: is called with the status of every response."""
        self.app, self.limits, self.count = app, limits, count
        self.expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message):
            if message["type"] == "http.response.start":
                self.count(message["status"])
            await send(message)

        try:
            self._check_key(scope)
            body = await asyncio.wait_for(self._read(receive), self.limits.body_seconds)
        except TimeoutError:
            refusal = ApiError(408, f"the body did not arrive within {self.limits.body_seconds:g} seconds", "timeout")
            return await refusal.response()(scope, receive, counted)
        except ApiError as refusal:
            return await refusal.response()(scope, receive, counted)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        # The routes read the body from here; whatever they receive after it (a disconnect) comes from the client.
        async def replay():
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, counted)

    def _check_key(self, scope) -> None:
        if self.expected is None or scope["path"] == "/health":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self.expected):  # takes equally long wherever the two differ
            text = "a wrong API key" if given else "no API key; send the header Authorization: Bearer KEY"
            raise ApiError(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, receive) -> bytes:
        size, parts = 0, []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left before its request was complete")
            part = message.get("body", b"")
            size += len(part)  # counted as it comes: the Content-Length header may be wrong or missing
            if size <= self.limits.body:
                parts.append(part)
            if not message.get("more_body") or size > self.DRAIN:
                break
        if size > self.limits.body:
            text = f"the request is larger than {self.limits.body} bytes"
            raise ApiError(413, text, "request_too_large", headers={"Connection": "close"})
        return b"".join(parts)
