"""The model: an HTTP server on loopback that streams its answers token by token."""

from __future__ import annotations

import json
import socketserver
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Self, cast

from governor._demo.gauge import Gauges
from governor._demo.script import Script, Turn

__all__ = ["ModelServer"]

# Seconds from one token to the next: a model that says some 66 of them a second.
_PACE = 0.015


class ModelServer(ThreadingHTTPServer):
    """Serves a script's turns while its `with` block runs, and counts its open streams.

    ``POST /`` with ``{"agent": name, "turn": number}`` is answered with a chunk for
    each token, a line of JSON: ``{"word": ...}`` or ``{"tool": ..., "argument": ...}``.

    Args:
        script: What the model says.
        gauges: Where the open streams are counted.
    """

    # So that closing waits for the threads of the last requests.
    daemon_threads = False
    # The default of five would turn away agents that all connect at the same moment.
    request_queue_size = 128

    def __init__(self, script: Script, gauges: Gauges) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.gauges = gauges
        self._ending = Event()
        # Asking every 0.05 s whether to shut down keeps the end of a run short.
        self._thread = Thread(target=self.serve_forever, args=(0.05,), name="model-server")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end_streams()
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port to connect to."""
        host, port = self.socket.getsockname()
        return host, port

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name: offline it can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.address

    def pace(self, turn: Turn) -> Iterator[bytes]:
        """Yield the tokens of a turn as the model thinks of them, until streams are to end."""
        words = [{"word": word} for word in turn.words]
        calls = [{"tool": call.tool, "argument": call.argument} for call in turn.calls]
        for token in words:
            if self._ending.wait(_PACE):
                return
            yield _line(token)
        # The calls come as one, as the last thing that the model says.
        for token in calls:
            yield _line(token)

    def end_streams(self) -> None:
        """Let the open streams, and those still to come, end early but in good order."""
        self._ending.set()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request with one turn, streamed."""

    protocol_version = "HTTP/1.1"  # which brought the chunks
    disable_nagle_algorithm = True  # a token is sent when it is there
    timeout = 10  # seconds, for a client that connects and says nothing

    def do_POST(self) -> None:
        """Stream the turn that was asked for."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = cast(ModelServer, self.server)
        turn = model.script.turn(asked["agent"], asked["turn"])
        with model.gauges.total, model.gauges.streams:
            self._begin()
            for token in model.pace(turn):
                self._chunk(token)
        # Counted out before the client can see the end: it may then give its permit
        # back, and the next stream may come in before this thread runs again.
        self._chunk(b"")

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal to the demo."""

    def _begin(self) -> None:
        """Send the head of the answer."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        """Send one chunk; an empty one ends the answer."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


def _line(token: dict[str, str]) -> bytes:
    """Write a token as a line of JSON."""
    return json.dumps(token).encode() + b"\n"
