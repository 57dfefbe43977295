"""Streams to browsers under real servers: gunicorn's threads, Flask's and Starlette's streaming."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.error import HTTPError

import pytest
from threads import Crew, Gauge, is_idle, until

import governor
from governor import ConcurrencyGovernor

pytest.importorskip("flask")
pytest.importorskip("gunicorn")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what a framework does is its own affair
]

PATIENCE = 25.0

PROGRAM = """
import threading
from flask import Flask, Response
from governor import ConcurrencyGovernor
from governor.integrations.wsgi import GovernorMiddleware

gov = ConcurrencyGovernor(max_streams=1, max_tools=2, max_global=3, max_queued=2)
gate, lock, counts = threading.Event(), threading.Lock(), {"inside": 0, "peak": 0}
app = Flask(__name__)

@app.get("/stream")
def stream():
    def pieces():
        with lock:
            counts["inside"] += 1
            counts["peak"] = max(counts["peak"], counts["inside"])
        try:
            yield "one "
            assert gate.wait(20)
            yield "two" * 100_000
        finally:
            with lock:
                counts["inside"] -= 1
    return Response(pieces(), mimetype="text/plain")

governed = GovernorMiddleware(app.wsgi_app, gov)

@app.get("/steer/<what>")  # past the governor
def steer(what):
    gate.set() if what == "open" else gate.clear()
    stats = gov.stats()
    return counts | {"in_use": stats.tools_in_use, "waiting": stats.tools_waiting}

past = app.wsgi_app
def by_path(environ, start_response):
    ungoverned = environ["PATH_INFO"].startswith("/steer")
    return (past if ungoverned else governed)(environ, start_response)
app.wsgi_app = by_path
"""


@contextmanager
def gunicorn(folder: Path) -> Iterator[str]:
    """Run the program in a gunicorn of one worker with sixteen threads; give its address."""
    (folder / "program.py").write_text(PROGRAM, "utf-8")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as door:
        command = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "16"]
        options = ["--bind", f"fd://{door.fileno()}", "--no-control-socket", "--log-level", "warning"]
        server = subprocess.Popen(
            [*command, *options, "program:app"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(governor.__file__).parents[1])},
            pass_fds=[door.fileno()],
        )
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
    try:
        yield url
    finally:
        server.terminate()
        server.wait(PATIENCE)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE) as page:
        return page.read().decode()


def steer(url: str, what: str = "look") -> dict[str, int]:
    return json.loads(get(f"{url}/steer/{what}"))


def first_word_only(url: str, path: str) -> HTTPConnection:
    """Begin to read a stream, and leave the rest."""
    browser = HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    browser.request("GET", path)
    response = browser.getresponse()
    assert response.read(4) == b"one "
    browser.response = response  # which would else close with its last reference
    return browser


def test_flask_streams_under_gunicorns_threads_within_the_limit(tmp_path: Path) -> None:
    with gunicorn(tmp_path) as url, Crew(patience=PATIENCE) as crew:
        answers: list[str] = []
        for _ in range(4):
            crew.start(lambda: answers.append(get(f"{url}/stream")))
        until(lambda: steer(url)["waiting"] == 2, "two streams, two requests in line", patience=PATIENCE)
        until(lambda: steer(url)["inside"] == 2, "both streams to have begun", patience=PATIENCE)
        with pytest.raises(HTTPError) as caught:
            get(f"{url}/stream")
        with caught.value as refused:
            assert (refused.code, refused.headers["Retry-After"]) == (503, "5")
        steer(url, "open")
        crew.join()

        assert answers == ["one " + "two" * 100_000] * 4
        until(lambda: steer(url)["in_use"] == 0, "the last response to be closed")
        assert steer(url)["peak"] == 2


def test_a_browser_that_leaves_gunicorn_amid_a_stream_gives_its_place_to_the_next(tmp_path: Path) -> None:
    with gunicorn(tmp_path) as url:
        browsers = [first_word_only(url, "/stream") for _ in range(2)]
        assert steer(url)["in_use"] == 2
        for browser in browsers:
            browser.response.close()
            browser.close()
        steer(url, "open")
        assert get(f"{url}/stream").startswith("one two")
        until(lambda: steer(url)["in_use"] == 0, "all to be given back")


# ---------------------------------------------------------------------------------------- Starlette


@contextmanager
def starlette(app: Starlette) -> Iterator[str]:
    """Serve an app by uvicorn in a thread; give its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as door:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([door])), name="uvicorn")
        thread.start()
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def test_starlette_sends_governed_streams_from_its_threads_within_the_limit() -> None:
    gov = ConcurrencyGovernor(max_streams=2, max_tools=1, max_global=2)
    gauge, gate, threads = Gauge(), threading.Event(), set()

    @gov.stream
    def pieces() -> Iterator[str]:
        with gauge:
            yield "one "
            assert gate.wait(PATIENCE)
            for _ in range(20):
                threads.add(threading.get_ident())
                yield "two"

    def stream(request: object) -> StreamingResponse:  # which starlette runs in its threads
        return StreamingResponse(pieces(), media_type="text/plain")

    answers: list[str] = []
    with (
        starlette(Starlette(routes=[Route("/stream", stream)])) as url,
        Crew(patience=PATIENCE) as crew,
    ):
        for _ in range(5):
            crew.start(lambda: answers.append(get(f"{url}/stream")))
        until(
            lambda: gauge.inside == 2 and gov.stats().streams_waiting == 3,
            "two streams, three requests in line",
            patience=PATIENCE,
        )
        gate.set()
        crew.join()

    assert answers == ["one " + "two" * 20] * 5
    assert (gauge.peak, gauge.entries) == (2, 5)
    assert len(threads) > 1
    assert is_idle(gov)
