"""An answer in the form of POST /v1/responses: items (thinking, message, calls), whole or as the events of a stream.

response.created, response.in_progress
response.output_item.added, [response.content_part.added,] ...delta, ...delta, ...done, response.output_item.done
response.completed, response.incomplete (a limit was reached) or response.failed
"""

import time
import uuid
from collections.abc import Iterator

from inference.stream_text import AnswerReader, Piece, ToolCall
from serving.errors import ApiError
from serving.responses import event
from serving.responses_schema import ResponsesRequest

PART = {"reasoning": "reasoning_text", "content": "output_text"}  # the kinds of an AnswerReader: of parts here


class ResponsesAnswer:
    """It has ApiResponse's methods, so the server sends both in the same way."""

    def __init__(self, request: ResponsesRequest, reader: AnswerReader, prompt_tokens: int):
        self.reader, self.prompt_tokens, self.completion_tokens = reader, prompt_tokens, 0
        self.number, self.finish_reason = 0, None
        self.items: list[dict] = []
        self.open: str | None = None  # the kind of the last item while it grows
        self.response = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "error": None, "incomplete_details": None, "model": request.model,
            "instructions": request.instructions, "output": self.items, "usage": None,
            "parallel_tool_calls": getattr(request, "parallel_tool_calls", None) is not False,
            "tool_choice": request.tool_choice or "auto", "tools": request.tools or [],
            "temperature": getattr(request, "temperature", None), "top_p": getattr(request, "top_p", None),
            "max_output_tokens": request.max_output_tokens, "metadata": getattr(request, "metadata", None) or {},
            "text": request.text.model_dump(by_alias=True) if request.text else {"format": {"type": "text"}},
            "previous_response_id": None, "truncation": "disabled", "store": False,
        }  # fmt: skip

    @staticmethod
    def line(body: dict) -> str:
        return f"event: {body['type']}\n{event(body)}"

    def opening(self) -> list[dict]:
        return [self._event(f"response.{name}", response=self.response) for name in ("created", "in_progress")]

    def feed(self, i: int, piece: Piece) -> list[dict]:
        """A piece -> the events that it makes."""
        self.completion_tokens += len(piece.token_ids)
        self.finish_reason = piece.finish_reason
        parts = self.reader.feed(piece.text, piece.finish_reason is not None)
        return [made for kind, part in parts for made in self._add(kind, part)]

    def closing(self) -> list[dict]:
        events = list(self._end_item())
        if not self.items:  # an answer without a word is a message all the same
            events += [*self._add("content", ""), *self._end_item()]
        self._finish()
        return [*events, self._event(f"response.{self.response['status']}", response=self.response)]

    def failed(self, refusal: ApiError) -> list[dict]:
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": str(refusal)}}
        return [self._event("response.failed", response=self.response)]

    def whole(self) -> dict:
        self.closing()
        return self.response

    last_line = ""  # chats end with [DONE]

    def _event(self, kind: str, **fields) -> dict:
        self.number += 1
        response = {"response": dict(self.response, output=list(self.items))} if "response" in fields else {}
        return {"type": kind, "sequence_number": self.number - 1} | fields | response

    def _add(self, kind: str, part: str | ToolCall) -> Iterator[dict]:
        if isinstance(part, ToolCall):
            yield from self._end_item()
            yield from self._call(part)
            return
        if self.open != kind:
            yield from self._end_item()
            yield from self._begin_item(kind)
        self.items[-1]["content"][0]["text"] += part
        if part:
            yield self._of_item(f"response.{PART[kind]}.delta", delta=part, **self._logprobs())

    def _begin_item(self, kind: str) -> Iterator[dict]:
        self.open = kind
        empty = {"type": PART[kind], "text": ""} | ({"annotations": []} if kind == "content" else {})
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        if kind == "reasoning":
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": []}
        self.items.append(item | {"status": "in_progress", "content": []})
        yield self._event("response.output_item.added", output_index=len(self.items) - 1, item=dict(self.items[-1]))
        self.items[-1]["content"] = [empty]
        yield self._of_item("response.content_part.added", part=dict(empty))

    def _end_item(self) -> Iterator[dict]:
        if self.open is None:
            return
        item, part, kind = self.items[-1], self.items[-1]["content"][0], self.open
        item["status"] = "incomplete" if self.finish_reason == "length" else "completed"
        yield self._of_item(f"response.{PART[kind]}.done", text=part["text"], **self._logprobs())
        yield self._of_item("response.content_part.done", part=part)
        self.open = None
        yield self._event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _call(self, call: ToolCall) -> Iterator[dict]:
        """A call comes whole: it is known to be one at its end only."""
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": f"call_{uuid.uuid4().hex[:24]}",
                "name": call.name, "arguments": "", "status": "in_progress"}  # fmt: skip
        self.items.append(item)
        index = {"output_index": len(self.items) - 1}
        yield self._event("response.output_item.added", **index, item=dict(item))
        item |= {"arguments": call.arguments, "status": "completed"}
        of_item = index | {"item_id": item["id"]}
        yield self._event("response.function_call_arguments.delta", **of_item, delta=call.arguments)
        done = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **of_item, **done)
        yield self._event("response.output_item.done", **index, item=item)

    def _of_item(self, kind: str, **fields) -> dict:
        index = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
        return self._event(kind, **index, **fields)

    def _logprobs(self) -> dict:
        return {"logprobs": []} if self.open == "content" else {}

    def _finish(self) -> None:
        cut = self.finish_reason == "length"
        total = self.prompt_tokens + self.completion_tokens
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": self.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": self.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": total,
            },
        }  # fmt: skip
