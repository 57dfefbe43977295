"""A model server on loopback: speaks as OpenAI and as Anthropic, obeys its prompt, and counts exactly."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

CALL = re.compile(r"^(\w+) (\{.*\})$", re.MULTILINE)  # a line of a prompt that asks for a tool call
STATUS = re.compile(r"^status (\d{3})$", re.MULTILINE)  # one that asks for an error


class Gauge:
    """Counts who is inside its block now, and the most there ever were."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        with self._lock:
            self.now += 1
            self.peak = max(self.peak, self.now)
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.now -= 1


def leisurely(kind: str) -> None:
    """Take the time that a word takes, or a page."""
    time.sleep(0.01 if kind == "stream" else 0.1)


class ModelServer(ThreadingHTTPServer):
    """Serves answers, and pages for tools to fetch; counts both, each by itself and together.

    The page ``/status/404`` comes with that status, ``/redirect/3`` is three redirects away from a
    page, and a prompt with the line ``status 500`` is answered by that error.

    Args:
        pace: Called with "stream" before each piece of an answer, with "page" before a page: so
            that an answer takes its time as a model's does, or as long as a test likes.
        port: 0 takes one that is free.
    """

    request_queue_size = 64

    def __init__(self, pace: Callable[[str], object] = leisurely, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.pace = pace
        self.streams, self.pages, self.everything, self.cut = Gauge(), Gauge(), Gauge(), Gauge()
        self.connections: set[socket.socket] = set()
        self.root = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.root}/v1"

    def stats(self) -> dict[str, int]:
        """Return what is served now, and the peaks."""
        gauges = {"streams": self.streams, "pages": self.pages, "everything": self.everything}
        now = {name: gauge.now for name, gauge in gauges.items()}
        return now | {f"{name}_peak": gauge.peak for name, gauge in gauges.items()} | {"cut": self.cut.now}

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client may go away at any time
            super().handle_error(request, client_address)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=[0.01], name="model server", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):  # whose clients keep them for a next request
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Handler(BaseHTTPRequestHandler):
    """One connection. It stops counting before the last byte, so before the client can know of the end."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ModelServer

    def do_GET(self) -> None:
        if self.path == "/stats":
            return self.reply(self.server.stats())
        with self.server.everything, self.server.pages:
            self.server.pace("page")
        match self.path.split("/")[1:]:
            case ["status", status]:
                self.reply({"page": self.path}, int(status))
            case ["redirect", left] if left != "0":
                self.reply({"page": self.path}, 302, {"Location": f"/redirect/{int(left) - 1}"})
            case _:
                self.reply({"page": self.path})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if status := STATUS.search(text(asked["messages"][-1])):
            with self.server.everything, self.server.streams:
                self.server.pace("stream")
            return self.reply(
                {"type": "error", "error": {"type": "asked_for", "message": "as asked"}}, int(status[1])
            )
        message = answer(asked["messages"], {tool["function"]["name"] for tool in asked.get("tools", [])})
        speak = anthropic if self.path == "/v1/messages" else openai
        whole, events, last = speak(asked["model"], message)
        if asked.get("stream"):
            return self.stream(events, last)
        with self.server.everything, self.server.streams:
            self.server.pace("stream")
        self.reply(whole)

    def stream(self, events: Iterator[bytes], last: bytes) -> None:
        whole = self.headers["Connection"] == "close"  # or else in chunks, so that the end is told
        framing = ("Connection", "close") if whole else ("Transfer-Encoding", "chunked")
        frame = b"%s" if whole else b"%x\r\n%s\r\n"

        def write(event: bytes) -> None:
            self.wfile.write(frame % (event if whole else (len(event), event)))

        try:
            with self.server.everything, self.server.streams:
                self.send(200, {"Content-Type": "text/event-stream", framing[0]: framing[1]})
                for event in events:
                    self.server.pace("stream")
                    write(event)
            write(last)
            if not whole:
                self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:  # the client went away amid its answer
            self.close_connection = True
            self.server.cut.__enter__()

    def reply(self, body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = b"" if status == 204 else json.dumps(body).encode()
        about = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        self.send(status, (about if content else {}) | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(content)

    def send(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


Spoken = tuple[dict[str, Any], Iterator[bytes], bytes]  # a whole answer, its events, and the last of them


def openai(model: str, message: dict[str, Any]) -> Spoken:
    """Say it as OpenAI's chat completions do."""
    reason = "tool_calls" if "tool_calls" in message else "stop"
    common = {"id": "answer", "created": 0, "model": model}
    chunk = common | {"object": "chat.completion.chunk"}

    def events() -> Iterator[bytes]:
        for delta in pieces(message):
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else reason}
            yield b"data: %s\n\n" % json.dumps(chunk | {"choices": [choice]}).encode()

    choice = {"index": 0, "message": message, "finish_reason": reason}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    whole = common | {"object": "chat.completion", "choices": [choice], "usage": usage}
    return whole, events(), b"data: [DONE]\n\n"


def anthropic(model: str, message: dict[str, Any]) -> Spoken:
    """Say it as Anthropic's messages do; in words only."""
    usage = {"input_tokens": 1, "output_tokens": 1}
    common = {"id": "answer", "type": "message", "role": "assistant", "model": model, "stop_sequence": None}
    end = {"stop_reason": "end_turn", "stop_sequence": None}

    def event(kind: str, **data: Any) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps({"type": kind} | data).encode())

    def events() -> Iterator[bytes]:
        start = common | {"content": [], "stop_reason": None, "usage": usage}
        yield event("message_start", message=start)
        yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for piece in pieces(message):
            if piece:
                delta = {"type": "text_delta", "text": piece["content"]}
                yield event("content_block_delta", index=0, delta=delta)
        yield event("content_block_stop", index=0)
        yield event("message_delta", delta=end, usage={"output_tokens": 1})

    block = {"type": "text", "text": message["content"]}
    return common | end | {"content": [block], "usage": usage}, events(), event("message_stop")


def answer(messages: list[dict[str, Any]], tools: set[str]) -> dict[str, Any]:
    """Call the tools that the prompt asks for, a line each; their results, or the prompt, are the answer."""
    prompt = text(next(message for message in messages if message["role"] == "user"))
    begun = any(message["role"] == "assistant" for message in messages)
    calls = [] if begun else [(name, args) for name, args in CALL.findall(prompt) if name in tools]
    content = f"Done: {text(messages[-1])}" if begun else f"You said: {prompt}"
    if not calls and "final_answer" in tools:  # how some frameworks want to be told
        calls = [("final_answer", json.dumps({"answer": content}))]
    if not calls:
        return {"role": "assistant", "content": content}
    functions = [{"name": name, "arguments": args} for name, args in calls]
    called = [{"id": f"call_{n}", "type": "function", "function": f} for n, f in enumerate(functions)]
    return {"role": "assistant", "content": None, "tool_calls": called}


def pieces(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Cut a message as a stream has it: a tool call or a word each, and an empty one as the end."""
    for number, call in enumerate(message.get("tool_calls", [])):
        yield {"role": "assistant", "tool_calls": [{"index": number, **call}]}
    for word in re.findall(r"\s*\S+\s*$|\s*\S+", message["content"] or ""):
        yield {"role": "assistant", "content": word}
    yield {}


def text(message: dict[str, Any]) -> str:
    """Return a message's text, whichever of the two forms it came in."""
    content = message["content"] or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def fetch(url: str) -> str:
    """Fetch a page."""
    with urllib.request.urlopen(url) as page:
        return page.read().decode()


if __name__ == "__main__":
    with ModelServer(port=int(sys.argv[1]) if len(sys.argv) > 1 else 8765) as server:
        print(f"serving the model at {server.url}, its counts at {server.root}/stats; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
