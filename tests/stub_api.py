"""A server that speaks as much of OpenAI's chat API as a test needs: answers are given to it, requests are kept."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubApi(ThreadingHTTPServer):
    """reply(request) -> the text of the answer, a message (an object), an int, the HTTP status of a refusal, or
    bytes, a page that is no answer of an API.

    A request with "stream" gets the content in pieces of two characters, `pause` seconds apart. A message with
    "breaks" ends in the middle of the stream.
    """

    daemon_threads = True

    def __init__(self, reply, pause=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.pause, self.requests, self.keys, self.hung_up = reply, pause, [], [], 0
        self.models = {"object": "list", "data": [{"id": "stub", "object": "model", "created": 0, "owned_by": "x"}]}
        self.address = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        models = self.server.models
        self.send(*((models, {}) if isinstance(models, int) else (200, models)))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers.get("Authorization"))
        answer = self.server.reply(request)
        if isinstance(answer, bytes):
            return self.send(200, answer)
        if isinstance(answer, int):
            return self.send(answer, {"error": {"message": "the stub refuses", "type": "x", "code": None}})
        message = {"role": "assistant"} | ({"content": answer} if isinstance(answer, str) else answer)
        if request.get("stream"):
            return self.stream(message)
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.send(200, self.frame("chat.completion", [choice]) | {"usage": {"total_tokens": 1}})

    def stream(self, message):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        deltas = [{"role": "assistant"}]
        for key in ("reasoning_content", "content"):
            text = message.get(key) or ""
            deltas += [{key: text[i : i + 2]} for i in range(0, len(text), 2)]
        for i, call in enumerate(message.get("tool_calls", [])):
            arguments = call["function"]["arguments"]
            head = {"index": i, "id": call["id"], "type": "function", "function": {"name": call["function"]["name"]}}
            deltas += [{"tool_calls": [head]}]
            deltas += [{"tool_calls": [{"index": i, "function": {"arguments": letter}}]} for letter in arguments]
        try:
            for delta in deltas:
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                self.line(json.dumps(self.frame("chat.completion.chunk", [choice])))
                time.sleep(self.server.pause)
            if message.get("breaks"):
                self.line('{"error": {"message": "the stub broke"}}')
            self.line("[DONE]")
        except OSError:
            self.server.hung_up += 1

    def frame(self, kind, choices):
        return {"id": "x", "object": kind, "created": 0, "model": "stub", "choices": choices}

    def line(self, text):
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def send(self, status, content):
        page = isinstance(content, bytes)
        body = content if page else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if page else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *args):
        pass
