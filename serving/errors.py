"""Refusals in OpenAI's shape: {"error": {"message", "type", "param", "code"}} under an HTTP status.

The official client turns the status into an exception: 400 BadRequestError, 401 AuthenticationError, 404 NotFoundError,
429 RateLimitError, 5xx InternalServerError; an error inside a stream becomes APIError.
"""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {"str", "int", "float", "bool", "dict", "list"}
LONGEST = 500  # characters of a message, which may quote the request


class ApiError(Exception):
    """A request ends without an answer. param: the field at fault; code: a word that programs can test."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        # Half of a surrogate pair in a quoted field cannot be sent: it becomes "?".
        message = str(self)[:LONGEST].encode("utf-8", "replace").decode("utf-8")
        param = self.param and self.param[:LONGEST].encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def timed_out(seconds: float) -> ApiError:
    """The header stops OpenAI's client from asking again by itself: the second try would take as long."""
    text = f"the answer took longer than {seconds:g} seconds; ask for fewer tokens"
    return ApiError(504, text, "timeout", headers={"x-should-retry": "false"})


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down")


def failed() -> ApiError:
    """For a fault of the server: the traceback is in the log, the client gets this sentence."""
    return ApiError(500, "the server failed; its log says why", "internal_error")


def add_handlers(app: FastAPI) -> None:
    """However a request fails, the client gets OpenAI's shape."""
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)


async def _refused(request, error: ApiError) -> JSONResponse:
    return error.response()


async def _invalid(request, error: RequestValidationError) -> JSONResponse:
    """Wrong types and values, and bodies that are no JSON: FastAPI would answer 422, OpenAI's API answers 400."""
    # Where a field may have several types, pydantic reports a fault for each it tried. The most telling one is a
    # sentence of our own, else the fault deepest inside the body.
    faults = error.errors()
    fault = max(faults, key=lambda fault: (fault["type"] == "value_error", len(fault["loc"])))
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {fault['ctx']['error']} at {fault['loc'][-1]}").response()
    if fault["loc"] == ("body",) and fault["type"] != "value_error":
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json").response()
    text = fault["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in fault["loc"][1:] if is_field(part))
    return ApiError(400, f"{field}: {text}" if field else text, "invalid_value", param=field or None).response()


def is_field(part: str | int) -> bool:
    """Whether a part of pydantic's path is a field or an index, and not the name of a type that it tried."""
    return isinstance(part, int) or (part.replace("_", "").isalnum() and part.islower() and part not in TYPES)


async def _http(request, error: HTTPException) -> JSONResponse:
    """What the framework refuses: unknown addresses, wrong methods, bodies that cannot be decoded."""
    place = f"{request.method} {request.url.path}"
    text, code = {
        404: (f"{place}: no such address", "unknown_url"),
        405: (f"{place}: not with this method", "method_not_allowed"),
        400: ("the body cannot be read as JSON in UTF-8", "invalid_json"),
    }.get(error.status_code, (str(error.detail), None))
    return ApiError(error.status_code, text, code, headers=error.headers).response()


async def _failed(request, error: Exception) -> JSONResponse:
    return failed().response()
