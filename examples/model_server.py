"""A model server on loopback that speaks OpenAI's wire format, obeys its prompt, and counts exactly."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

CALL = re.compile(r"^(\w+) (\{.*\})$", re.MULTILINE)  # a line of a prompt that asks for a tool call


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
        self.root = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.root}/v1"

    def stats(self) -> dict[str, int]:
        """Return what is served now, and the peaks."""
        gauges = {"streams": self.streams, "pages": self.pages, "everything": self.everything}
        now = {name: gauge.now for name, gauge in gauges.items()}
        return now | {f"{name}_peak": gauge.peak for name, gauge in gauges.items()} | {"cut": self.cut.now}

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=[0.01], name="model server", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request. It stops counting before the last byte, so before the client can know of the end."""

    server: ModelServer

    def do_GET(self) -> None:
        if self.path == "/stats":
            return self.reply(self.server.stats())
        with self.server.everything, self.server.pages:
            self.server.pace("page")
        self.reply({"page": self.path})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = answer(asked["messages"], {tool["function"]["name"] for tool in asked.get("tools", [])})
        reason = "tool_calls" if "tool_calls" in message else "stop"
        whole = {"id": "answer", "created": 0, "model": asked["model"]}
        if asked.get("stream"):
            return self.stream(whole | {"object": "chat.completion.chunk"}, message, reason)
        with self.server.everything, self.server.streams:
            self.server.pace("stream")
        choice = {"index": 0, "message": message, "finish_reason": reason}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self.reply(whole | {"object": "chat.completion", "choices": [choice], "usage": usage})

    def stream(self, whole: dict[str, Any], message: dict[str, Any], reason: str) -> None:
        try:
            with self.server.everything, self.server.streams:
                self.send("text/event-stream")
                for delta in pieces(message):
                    self.server.pace("stream")
                    choice = {"index": 0, "delta": delta, "finish_reason": None if delta else reason}
                    self.wfile.write(b"data: %s\n\n" % json.dumps(whole | {"choices": [choice]}).encode())
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:  # the client went away amid its answer
            self.server.cut.__enter__()

    def reply(self, body: dict[str, Any]) -> None:
        self.send("application/json")
        self.wfile.write(json.dumps(body).encode())

    def send(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


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
