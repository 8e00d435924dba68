"""The server: its routes, and the way of a request from the parsed body to the last byte of the answer.

    app = create_app(scheduler, names=["full_sft_512"])       an ASGI application, for uvicorn

A chat: chat() -> _encode_chat() (messages -> token ids) -> _respond() -> _submit() (to the scheduler); its pieces come
back through a RequestRun and become JSON or server-sent events. Before, serving/middleware.py has checked the key and
the size, serving/schema.py the body.

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health, GET /metrics; anything else is a 404.
Whoever made the scheduler closes it, which ends the requests that still run.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from inference.sampling import SamplingParams
from inference.scheduler import Closed, Handle, QueueFull, Scheduler
from inference.stream_text import CALL, AnswerReader, Piece, begun_call
from model.tokenizer import encode_text
from serving import errors
from serving.errors import ApiError, failed, shutting_down, timed_out
from serving.metrics import Metrics
from serving.middleware import Limits, RequestChecks
from serving.responses import DONE, ApiResponse, ChatChoice, TextChoice, Tokens, event
from serving.schema import ChatRequest, CompletionRequest, NamedTool, Sampling

log = logging.getLogger(__name__)
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

    def __init__(self, events: AsyncIterator[str], run: RequestRun):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.run = run

    async def __call__(self, scope, receive, send) -> None:
        # Here and not in the generator of the events: one that was never started runs none of its `finally`.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.end()


class Service:
    """What the routes share, and the routes."""

    def __init__(self, scheduler: Scheduler, names: list[str], limits: Limits, defaults: dict):
        self.scheduler, self.names, self.limits, self.defaults = scheduler, names, limits, defaults
        self.engine = scheduler.engine
        self.tokens = Tokens(self.engine.tokenizer)
        self.metrics = Metrics(scheduler)
        self.started = int(time.time())

    # --------------------------------------------------------------------------------------------------- addresses
    async def health(self) -> JSONResponse:
        if self.scheduler.closed:
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.names]})

    async def model(self, name: str) -> JSONResponse:
        self._check_model(name)
        return JSONResponse(self._card(name))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check_model(body.model)
        if len(body.messages) > self.limits.messages:
            raise ApiError(400, f"{len(body.messages)} messages; at most {self.limits.messages}", param="messages")
        params = self._params(body)
        # Rendering takes milliseconds: in a thread, or every stream would stutter meanwhile.
        ids, begun = await run_in_threadpool(self._encode_chat, body)
        # A call that was begun in the prompt stands after the think block: the answer starts outside of it.
        thinking = self._thinking(body) and not begun
        names = {tool.function.name for tool in self._offered(body)}
        choices = [
            ChatChoice(
                i, self.tokens, self.engine.end_tokens,
                AnswerReader(thinking, names, one_call=body.parallel_tool_calls is False), begun,
            )
            for i in range(params.n)
        ]  # fmt: skip
        return await self._respond(body, request, [ids], params, ApiResponse(body.model, choices, len(ids)))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        if len(body.prompts) > self.limits.prompts:
            raise ApiError(400, f"{len(body.prompts)} prompts; at most {self.limits.prompts}", param="prompt")
        params = self._params(body)
        prompts = await run_in_threadpool(self._encode_prompts, body.prompts)
        choices = [TextChoice(i, self.tokens, self.engine.end_tokens) for i in range(params.n * len(prompts))]
        answer = ApiResponse(body.model, choices, sum(map(len, prompts)))
        return await self._respond(body, request, prompts, params, answer)

    # ------------------------------------------------------------------------------------------ from request to ids
    def _check_model(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"no model {name!r} here; there is {known}", "model_not_found", param="model")

    def _card(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "local",
                "max_model_len": self.engine.context}  # fmt: skip

    def _params(self, body: Sampling) -> SamplingParams:
        try:
            params = body.sampling_params(self.limits.max_tokens, self.defaults)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        if len(params.stop) > self.limits.stops:
            raise ApiError(400, f"{len(params.stop)} stop strings; at most {self.limits.stops}", param="stop")
        return params

    def _thinking(self, body: ChatRequest) -> bool:
        """Whether the prompt opens a think block."""
        return (self.engine.enable_thinking if body.thinking is None else body.thinking) is True

    def _offered(self, body: ChatRequest) -> list:
        return [] if body.tool_choice == "none" else body.tools or []

    def _encode_chat(self, body: ChatRequest) -> tuple[list[int], str]:
        """-> (ids of the prompt, the beginning of a forced tool call, which the prompt ends with, or "")."""
        tools = [tool.model_dump(exclude_unset=True) for tool in self._offered(body)] or None
        must_call = tools and body.tool_choice not in (None, "auto")
        # A call that is begun in the prompt leaves no thinking to come: the think block is closed before it.
        thinking = False if must_call and self._thinking(body) else body.thinking
        name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
        begun = begun_call(name) if must_call else ""
        try:
            ids = self.engine.encode([message.plain() for message in body.messages], tools, thinking)
            if begun:
                ids += self._encode_begun(begun)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        except RecursionError:
            raise ApiError(400, "messages or tools are nested too deeply", param="tools") from None
        return self._fitting(ids, "messages"), begun

    def _encode_begun(self, begun: str) -> list[int]:
        tag = self.engine.tokenizer.get_vocab().get(CALL)
        if tag is None:  # a vocabulary in which the tag is no token of its own
            return encode_text(self.engine.tokenizer, begun)
        return [tag, *encode_text(self.engine.tokenizer, begun.removeprefix(CALL))]

    def _encode_prompts(self, prompts: list) -> list[list[int]]:
        try:
            return [self._fitting(self.engine.encode(prompt), "prompt") for prompt in prompts]
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from None

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if len(ids) >= self.engine.context:
            text = f"the prompt has {len(ids)} tokens; the model's context of {self.engine.context} has no room for it"
            raise ApiError(400, text, "context_length_exceeded", param=param)
        return ids

    def _submit(self, run: RequestRun, prompts: list[list[int]], params: SamplingParams) -> None:
        """Submits all prompts or none."""
        try:
            for i, ids in enumerate(prompts):
                run.handles.append(self.scheduler.submit(ids, params, partial(run.arrive, i)))
            return
        except QueueFull as error:
            refusal = ApiError(429, f"{error}; try again soon", "queue_full", headers={"Retry-After": "1"})
        except Closed:
            refusal = shutting_down()
        except ValueError as error:
            refusal = ApiError(400, str(error))
        for handle in run.handles:  # of several prompts the first may have found room
            handle.cancel()
        raise refusal

    # ------------------------------------------------------------------------------------------- from ids to answer
    async def _respond(
        self, body: Sampling, request: Request, prompts: list[list[int]], params: SamplingParams, answer: ApiResponse
    ) -> Response:
        run = RequestRun(self.metrics.observe)
        await run_in_threadpool(self._submit, run, prompts, params)  # it waits for the scheduler's lock
        # From here on rows are taken: run.end() must be reached on every way out.
        run.begin(request, self.limits.timeout)
        if body.stream:
            return EventStream(self._events(run, answer, body.include_usage, params.n), run)
        try:
            async for i, piece in run.pieces():
                answer.choices[i * params.n + piece.index].feed(piece)
        finally:
            run.end()
        return JSONResponse(answer.whole())

    async def _events(self, run: RequestRun, answer: ApiResponse, include_usage: bool, n: int) -> AsyncIterator[str]:
        # A choice of a chat opens with a chunk that names the role; clients wait for it.
        for choice in answer.choices:
            for part in choice.opening():
                yield answer.chunk([part], include_usage)
        try:
            async for i, piece in run.pieces():
                for part in answer.choices[i * n + piece.index].feed(piece):
                    yield answer.chunk([part], include_usage)
            if include_usage:
                yield answer.chunk([], include_usage, last=True)
        except ApiError as refusal:  # the status 200 has been sent: the error can only be an event
            if refusal.status == CLIENT_GONE:
                return
            yield event(refusal.body())
        yield DONE


def create_app(
    scheduler: Scheduler, names: list[str], api_key: str | None = None, limits: Limits | None = None,
    defaults: dict | None = None,
) -> FastAPI:  # fmt: skip
    """names: what requests may call the model; defaults: SamplingParams' fields for what a request leaves open."""
    limits = limits or Limits()
    service = Service(scheduler, names, limits, defaults or {})
    app = FastAPI(title="MiniMind", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.completions)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.get("/health")(service.health)
    app.get("/metrics")(service.show_metrics)
    errors.add_handlers(app)
    app.add_middleware(RequestChecks, limits=limits, count=service.metrics.count, api_key=api_key)
    return app
