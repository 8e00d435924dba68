"""The server: its routes, and a request's way from the parsed body to the last byte.

    app = create_app(scheduler, names=["full_sft_512"])       an ASGI application, for uvicorn

A chat: chat() -> _encode_chat() (messages -> token ids) -> _submit() (to the scheduler) -> _respond() (pieces -> JSON
or server-sent events). serving/schema.py has checked the body before, serving/middleware.py the key and the size.

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health, GET /metrics; anything else is a 404.
The scheduler's owner closes it; requests that run are then ended.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from inference.sampling import SamplingParams
from inference.scheduler import Closed, Handle, QueueFull, Scheduler
from inference.stream_text import CALL, AnswerReader, Piece, begun_call
from model.tokenizer import encode_text, render
from serving import errors
from serving.errors import ApiError, failed, timed_out
from serving.metrics import Metrics
from serving.middleware import Gate, Limits
from serving.responses import DONE, ApiResponse, ChatChoice, TextChoice, Tokens, event
from serving.schema import ChatRequest, CompletionRequest, ErrorBody, NamedTool, Sampling

log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx' number for it; nobody reads the response
REFUSALS = {status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 503, 504)}


class RequestRun:
    """One HTTP request between the server's event loop and the scheduler's thread.

    Iterating over a handle blocks. So one thread a handle waits there and passes its pieces on to the event loop.
    end() must be called whatever happens: it frees the slots.
    """

    def __init__(self, handles: list[Handle], threads: ThreadPoolExecutor, timeout: float, ended: Callable):
        """ended: is called with each handle once all is over."""
        self.handles, self.ended, self.over = handles, ended, False
        self.stopped: ApiError | None = None
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue = asyncio.Queue()  # (which handle, piece); None for one that ends; ApiError
        # Three things can end a run early: this timer, a client that leaves (watcher) and an error from the scheduler.
        self.timer = self.loop.call_later(timeout, self._stop, timed_out(timeout))
        self.watcher: asyncio.Task | None = None
        for i, handle in enumerate(handles):
            threads.submit(self._listen, i, handle)

    def _listen(self, i: int, handle: Handle) -> None:
        """In a thread of its own: waits for pieces."""
        try:
            for piece in handle:
                # asyncio's queues belong to the loop's thread; this is the one way in from another.
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
            # `stopped` first: pieces may still lie in the queue before the reason that was put behind them.
            if self.stopped or isinstance(item, ApiError):
                raise self.stopped or item
            if item is None:
                waiting -= 1
            else:
                yield item

    async def _watch(self, request: Request) -> None:
        """Nothing but a disconnect can follow the body."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._stop(ApiError(CLIENT_GONE, "the client has gone"))

    def _stop(self, reason: ApiError) -> None:
        """Ends the generation at once, even where a slow client keeps pieces() from being asked for the next item."""
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

    def __init__(self, events: AsyncIterator[str], run: RequestRun):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.run = run

    async def __call__(self, scope, receive, send) -> None:
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
        # A thread a request that runs or waits: fewer would let one request's pieces wait for another's end.
        self.threads = ThreadPoolExecutor(scheduler.slots + scheduler.queue_limit, thread_name_prefix="answers")
        self.started = int(time.time())

    # --------------------------------------------------------------------------------------------------- addresses
    async def health(self) -> JSONResponse:
        if self.scheduler.closed:
            raise ApiError(503, "the server is shutting down", "shutting_down")
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
        # Rendering and the queue's lock take milliseconds: in a thread, or every stream would stutter meanwhile.
        ids, begun = await run_in_threadpool(self._encode_chat, body)
        (handle,) = await run_in_threadpool(self._submit, [ids], params)
        # A call that was begun in the prompt stands after the think block: the answer starts outside of it.
        thinking = self.engine.enable_thinking if body.thinking is None else body.thinking
        names = {tool.function.name for tool in self._offered(body)}
        choices = [
            ChatChoice(
                i, self.tokens, self.engine.end_tokens,
                AnswerReader(thinking is True and not begun, names, one_call=body.parallel_tool_calls is False), begun,
            )
            for i in range(params.n)
        ]  # fmt: skip
        return await self._respond(body, request, [handle], ApiResponse(body.model, choices, len(ids)))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        if len(body.prompts) > self.limits.prompts:
            raise ApiError(400, f"{len(body.prompts)} prompts; at most {self.limits.prompts}", param="prompt")
        params = self._params(body)
        prompts = await run_in_threadpool(self._encode_prompts, body.prompts)
        handles = await run_in_threadpool(self._submit, prompts, params)
        choices = [TextChoice(i, self.tokens, self.engine.end_tokens) for i in range(params.n * len(prompts))]
        return await self._respond(body, request, handles, ApiResponse(body.model, choices, sum(map(len, prompts))))

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

    def _offered(self, body: ChatRequest) -> list:
        return [] if body.tool_choice == "none" else body.tools or []

    def _encode_chat(self, body: ChatRequest) -> tuple[list[int], str]:
        """-> (ids of the prompt, what of the answer stands in it already: the beginning of a forced tool call)."""
        tools = [tool.model_dump(exclude_unset=True) for tool in self._offered(body)] or None
        thinking = self.engine.enable_thinking if body.thinking is None else body.thinking
        must_call = tools and body.tool_choice not in (None, "auto")
        thinking = False if must_call and thinking is True else thinking  # the call is begun, there is no thinking left
        name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
        begun = begun_call(name) if must_call else ""
        tokenizer = self.engine.tokenizer
        try:
            messages = [message.plain() for message in body.messages]
            ids, _ = render(tokenizer, messages, tools, add_generation_prompt=True, enable_thinking=thinking)
            if begun:
                ids += self._encode_begun(begun)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        except RecursionError:
            raise ApiError(400, "messages or tools are nested too deeply", param="tools") from None
        return self._fitting(ids, "messages"), begun

    def _encode_begun(self, begun: str) -> list[int]:
        tag = self.engine.tokenizer.get_vocab().get(CALL)
        if tag is None:  # a vocabulary to which the tags are plain text
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

    def _submit(self, prompts: list[list[int]], params: SamplingParams) -> list[Handle]:
        """All prompts or none."""
        handles = []
        try:
            for ids in prompts:
                handles.append(self.scheduler.submit(ids, params))
            return handles
        except QueueFull as error:
            refusal = ApiError(429, f"{error}; try again soon", "queue_full", headers={"Retry-After": "1"})
        except Closed:
            refusal = ApiError(503, "the server is shutting down", "shutting_down")
        except ValueError as error:
            refusal = ApiError(400, str(error))
        for handle in handles:
            handle.cancel()
        raise refusal

    # ------------------------------------------------------------------------------------------- from ids to answer
    async def _respond(self, body: Sampling, request: Request, handles: list[Handle], answer: ApiResponse) -> Response:
        # From here on rows are taken: run.end() must be reached on every way out.
        run = RequestRun(handles, self.threads, self.limits.timeout, self.metrics.observe)
        if body.stream:
            return EventStream(self._events(run, request, answer, body.include_usage, body.n or 1), run)
        try:
            async for i, piece in run.pieces(request):
                answer.choices[i * (body.n or 1) + piece.index].feed(piece)
        finally:
            run.end()
        return JSONResponse(answer.whole())

    async def _events(self, run: RequestRun, request: Request, answer: ApiResponse, include_usage: bool, n: int):
        for choice in answer.choices:
            for part in choice.opening():
                yield answer.chunk([part], include_usage)
        try:
            async for i, piece in run.pieces(request):
                for part in answer.choices[i * n + piece.index].feed(piece):
                    yield answer.chunk([part], include_usage)
            if include_usage:
                yield answer.chunk([], include_usage, last=True)
        except ApiError as refusal:
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
    app.post("/v1/chat/completions", responses=REFUSALS)(service.chat)
    app.post("/v1/completions", responses=REFUSALS)(service.completions)
    app.get("/v1/models", responses=REFUSALS)(service.models)
    app.get("/v1/models/{name:path}", responses=REFUSALS)(service.model)
    app.get("/health", responses=REFUSALS)(service.health)
    app.get("/metrics", responses=REFUSALS)(service.show_metrics)
    errors.add_handlers(app)
    app.add_middleware(Gate, limits=limits, count=service.metrics.count, api_key=api_key)
    return app
