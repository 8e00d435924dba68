"""The server: its routes, and the way of a request from the parsed body to the last byte of the answer.

    app = create_app(scheduler, names=["full_sft_512"])       an ASGI application, for uvicorn

A chat: chat() -> Prompts.chat() (messages -> token ids) -> _respond() -> _submit() (to the scheduler); its pieces come
back through a RequestRun and become JSON or server-sent events. Before, serving/middleware.py has checked the key and
the size, serving/schema.py the body.

POST /v1/chat/completions, /v1/completions and /v1/responses, GET /v1/models; POST /tokenize and /detokenize, GET
/tokenizer_info, /health and /metrics; anything else is a 404. Whoever made the scheduler closes it, which ends the
requests that still run.
"""

import time
from collections.abc import AsyncIterator
from functools import partial

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from inference.grammar import Grammar
from inference.sampling import SamplingParams
from inference.scheduler import Closed, QueueFull, Scheduler
from inference.stream_text import CALL, CALL_END, AnswerReader
from serving import errors
from serving.conversations import NamedTool, Tool
from serving.errors import ApiError, shutting_down
from serving.forms import FormCheck, chat_grammar
from serving.metrics import Metrics
from serving.middleware import Limits, RequestChecks
from serving.prompts import Prompts
from serving.request_run import CLIENT_GONE, EventStream, RequestRun
from serving.responses import ApiResponse, ChatChoice, Shown, TextChoice, Tokens
from serving.responses_api import ResponsesAnswer
from serving.responses_schema import ResponsesRequest
from serving.schema import ChatRequest, CompletionRequest, Sampling
from serving.token_routes import TokenRoutes


class Service:
    """What the routes share, and the routes."""

    def __init__(
        self, scheduler: Scheduler, names: list[str], limits: Limits, defaults: dict, ignore_tools: bool = False
    ):
        self.scheduler, self.limits, self.defaults = scheduler, limits, defaults
        self.engine = scheduler.engine
        self.base, self.adapters = names[0], self.engine.adapters.names
        self.names = [*names, *self.adapters]  # an adapter is a model of its own
        for name in set(names) & set(self.adapters):
            raise ValueError(f"the model and an adapter are both called {name}; give one of them another name")
        self.prompts = Prompts(self.engine, ignore_tools)
        self.tokens = Tokens(self.engine.tokenizer, self.engine.token_bytes)
        self.metrics = Metrics(scheduler)
        self.tags = {tag: self.engine.tokenizer.get_vocab().get(tag) for tag in (CALL, CALL_END)}
        self.forms = FormCheck(lambda grammar: self.engine.grammars.compiled(grammar))
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
        ids, params, reading, headers = await self._read(body)
        shown = Shown(bool(body.return_token_ids), body.prompt_logprobs)
        choices = [
            ChatChoice(i, self.tokens, self.engine.end_tokens, AnswerReader(**reading), ids, shown)
            for i in range(params.n)
        ]
        answer = ApiResponse(body.model, choices, len(ids), body.include_usage)
        return await self._respond(body, request, [ids], params, answer, headers)

    async def responses(self, body: ResponsesRequest, request: Request) -> Response:
        chat = body.chat()
        ids, params, reading, headers = await self._read(chat)
        answer = ResponsesAnswer(body, AnswerReader(**reading), len(ids))
        return await self._respond(chat, request, [ids], params, answer, headers)

    async def _read(self, body: ChatRequest) -> tuple[list[int], SamplingParams, dict, dict]:
        """A chat -> token ids, what is asked for, how its answer is read (AnswerReader), headers."""
        self._check_model(body.model)
        if len(body.messages) > self.limits.messages:
            raise ApiError(400, f"{len(body.messages)} messages; at most {self.limits.messages}", param="messages")
        params = self._params(body)
        # Rendering takes milliseconds: in a thread, or every stream would stutter meanwhile.
        ids, tools, why = await run_in_threadpool(self.prompts.chat, body)
        params.grammar = await run_in_threadpool(self._chat_grammar, body, tools)
        await self.forms.check(params.grammar)
        thinking = (self.engine.enable_thinking if body.thinking is None else body.thinking) is True
        reading = {
            "thinking": body.thinks_already if body.continued else thinking,
            "names": {tool.function.name for tool in tools},
            "one_call": body.parallel_tool_calls is False,
            "one_line": params.grammar is not None and params.grammar.kind == "calls",
        }
        return ids, params, reading, {"X-Tools-Left-Out": why} if why else {}

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        if len(body.prompts) > self.limits.prompts:
            raise ApiError(400, f"{len(body.prompts)} prompts; at most {self.limits.prompts}", param="prompt")
        params = self._params(body)
        params.grammar = body.asked_form()
        await self.forms.check(params.grammar)
        prompts = await run_in_threadpool(self.prompts.texts, body)
        shown = Shown(bool(body.return_token_ids), body.prompt_logprobs, bool(body.echo), body.logprobs)
        choices = [
            TextChoice(i, self.tokens, self.engine.end_tokens, prompts[i // params.n], shown)
            for i in range(params.n * len(prompts))
        ]
        answer = ApiResponse(body.model, choices, sum(map(len, prompts)), body.include_usage)
        return await self._respond(body, request, prompts, params, answer)

    # ------------------------------------------------------------------------------------------ from request to ids
    def _check_model(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"no model {name!r} here; there is {known}", "model_not_found", param="model")

    def _card(self, name: str) -> dict:
        card = {"id": name, "object": "model", "created": self.started, "owned_by": "local",
                "max_model_len": self.engine.context}  # fmt: skip
        return card | ({"parent": self.base} if name in self.adapters else {})  # as vLLM says it

    def _params(self, body: Sampling) -> SamplingParams:
        try:
            params = body.sampling_params(self.limits.max_tokens, self.defaults)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        params.adapter = body.model if body.model in self.adapters else None
        if len(params.stop) > self.limits.stops:
            raise ApiError(400, f"{len(params.stop)} stop strings; at most {self.limits.stops}", param="stop")
        return params

    def _chat_grammar(self, body: ChatRequest, offered: list[Tool]) -> Grammar | None:
        """What the answer must match: the form it must have, the calls it must or may make."""
        tools, named = [tool.function for tool in offered], isinstance(body.tool_choice, NamedTool)
        if named:
            tools = [tool for tool in tools if tool.name == body.tool_choice.function.name]
        one = named or body.parallel_tool_calls is False
        try:
            return chat_grammar(body.asked_form(), [tool.signature() for tool in tools], body.must_call, one, self.tags)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        except RecursionError:
            raise ApiError(400, "tools are nested too deeply", param="tools") from None

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
        self, body: Sampling, request: Request, prompts: list[list[int]], params: SamplingParams,
        answer: ApiResponse | ResponsesAnswer,
        headers: dict | None = None,
    ) -> Response:  # fmt: skip
        run = RequestRun(self.metrics.observe)
        await run_in_threadpool(self._submit, run, prompts, params)  # it waits for the scheduler's lock
        # From here on rows are taken: run.end() must be reached on every way out.
        run.begin(request, self.limits.timeout)
        if body.stream:
            return EventStream(self._events(run, answer, params.n), run, headers)
        try:
            async for i, piece in run.pieces():
                answer.feed(i * params.n + piece.index, piece)
        finally:
            run.end()
        return JSONResponse(answer.whole(), headers=headers)

    async def _events(self, run: RequestRun, answer: ApiResponse | ResponsesAnswer, n: int) -> AsyncIterator[str]:
        try:
            for body in answer.opening():
                yield answer.line(body)
            async for i, piece in run.pieces():
                for body in answer.feed(i * n + piece.index, piece):
                    yield answer.line(body)
            last = answer.closing()
        except ApiError as refusal:  # the status 200 has been sent: the error can only be an event
            if refusal.status == CLIENT_GONE:
                return
            last = answer.failed(refusal)
        for body in last:
            yield answer.line(body)
        yield answer.last_line


def create_app(
    scheduler: Scheduler, names: list[str], api_key: str | None = None, limits: Limits | None = None,
    defaults: dict | None = None, docs: bool = False, ignore_tools: bool = False, cors_origins: list[str] | None = None,
) -> FastAPI:  # fmt: skip
    """names: what requests may call the model, besides its adapters, which have names of their own (ValueError
    where two are the same); defaults: SamplingParams' fields for what a request leaves open.

    docs: /openapi.json and /docs are served, to everybody. ignore_tools: see Prompts. cors_origins: pages of these
    addresses may ask from a browser; "*": of any.
    """
    limits = limits or Limits()
    service = Service(scheduler, names, limits, defaults or {}, ignore_tools)
    tokens = TokenRoutes(service.engine, service.prompts)
    addresses = {"openapi_url": "/openapi.json", "docs_url": "/docs"} if docs else {"openapi_url": None}
    app = FastAPI(title="MiniMind", redoc_url=None, redirect_slashes=False, **addresses)
    app.state.service = service
    # Some clients are given the server's address without /v1.
    for prefix in ("/v1", ""):
        shown = {"include_in_schema": prefix == "/v1"}
        app.post(f"{prefix}/chat/completions", **shown)(service.chat)
        app.post(f"{prefix}/completions", **shown)(service.completions)
        app.post(f"{prefix}/responses", **shown)(service.responses)
        app.get(f"{prefix}/models", **shown)(service.models)
        app.get(f"{prefix}/models/{{name:path}}", **shown)(service.model)
    app.post("/tokenize")(tokens.tokenize)
    app.post("/detokenize")(tokens.detokenize)
    app.get("/tokenizer_info")(tokens.info)
    app.get("/health")(service.health)
    app.get("/metrics")(service.show_metrics)
    errors.add_handlers(app)
    app.add_middleware(RequestChecks, limits=limits, count=service.metrics.count, api_key=api_key, docs=docs)
    if cors_origins:
        # Added last, so it comes first: a browser asks whether it may send the key before it sends it.
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["X-Tools-Left-Out", "Retry-After"],
        )  # fmt: skip
    return app
