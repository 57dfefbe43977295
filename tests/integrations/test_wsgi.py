"""The WSGI middleware under the stdlib's server, with threads: limits as the app itself counts them."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from socketserver import ThreadingMixIn
from typing import Any
from urllib.error import HTTPError
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from threads import Crew, Gauge, is_idle, until

import governor
from governor import ConcurrencyGovernor
from governor.integrations.wsgi import GovernorMiddleware

pytestmark = pytest.mark.every_governor


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=2, max_global=3, max_queued=2)


class Server(ThreadingMixIn, WSGIServer):
    request_queue_size = 64


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an app, held to the protocol from both sides; give its address."""
    with make_server("127.0.0.1", 0, validator(app), server_class=Server, handler_class=Quiet) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=8) as page:
        return page.read()


class App:
    """Answers in two pieces, and waits for its gate before the second."""

    def __init__(self) -> None:
        self.gauge, self.gate = Gauge(), threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return self.pieces()

    def pieces(self) -> Iterator[bytes]:
        with self.gauge:
            yield b"one "
            assert self.gate.wait(8)
            yield b"two"


# --------------------------------------------------------------------------------------- the permit


def test_requests_wait_in_line_and_a_stream_keeps_its_permit_to_the_end(gov: ConcurrencyGovernor) -> None:
    app, answers = App(), []
    with serving(validator(GovernorMiddleware(validator(app), gov))) as url, Crew() as crew:
        for _ in range(4):
            crew.start(lambda: answers.append(get(url)))
        until(lambda: app.gauge.inside == 2 and gov.stats().tools_waiting == 2, "two inside, two in line")
        app.gate.set()
        crew.join()

        until(lambda: is_idle(gov), "the last response to be closed")
    assert answers == [b"one two"] * 4
    assert (app.gauge.peak, app.gauge.entries) == (2, 4)


def test_the_permit_is_back_only_when_the_response_is_closed(gov: ConcurrencyGovernor) -> None:
    closed: list[int] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"one"])

        def close(self) -> None:
            closed.append(gov.stats().streams_in_use)

    response: Any = call(GovernorMiddleware(lambda environ, start: Body(), gov, kind="stream"))
    assert list(response) == [b"one"]
    assert gov.stats().streams_in_use == 1
    response.close()
    assert closed == [1]
    assert is_idle(gov)


def call(middleware: GovernorMiddleware, **environ: str) -> Any:
    """Call it as a server does, and give what it returned."""
    given: dict[str, Any] = dict(environ)
    setup_testing_defaults(given)
    return middleware(given, lambda status, headers, exc_info=None: lambda data: None)


def test_an_app_or_a_close_that_fails_gives_the_permit_back(gov: ConcurrencyGovernor) -> None:
    class Body:
        def __iter__(self) -> Iterator[bytes]:
            raise AssertionError("never iterated over")

        def close(self) -> None:
            raise ValueError("close")

    def fail(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise ValueError("app")

    with pytest.raises(ValueError, match="app"):
        call(GovernorMiddleware(fail, gov))
    response = call(GovernorMiddleware(lambda environ, start: Body(), gov))
    with pytest.raises(ValueError, match="close"):
        response.close()
    assert is_idle(gov)


def test_a_response_that_is_dropped_ends_and_then_gives_its_permit_back(gov: ConcurrencyGovernor) -> None:
    in_use: list[int] = []

    def body() -> Iterator[bytes]:
        try:
            yield b"one"
        finally:
            in_use.append(gov.stats().tools_in_use)

    response = call(GovernorMiddleware(lambda environ, start: body(), gov))
    iterator = iter(response)
    assert next(iterator) == b"one"
    del response
    assert gov.stats().tools_in_use == 1  # a server may keep only the iterator
    del iterator
    assert in_use == [1]
    assert is_idle(gov)


def test_a_browser_that_goes_away_ends_the_response(gov: ConcurrencyGovernor) -> None:
    many, left = threading.Event(), threading.Event()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            yield b"one"
            assert left.wait(8)
            while True:
                yield b"more" * 10_000
        finally:
            many.set()

    with serving(GovernorMiddleware(app, gov)) as url:
        browser = HTTPConnection(url.removeprefix("http://"), timeout=8)
        browser.request("GET", "/")
        response: HTTPResponse = browser.getresponse()
        assert response.read(3) == b"one"
        assert gov.stats().tools_in_use == 1
        response.close()
        browser.close()
        left.set()
        assert many.wait(8)
        until(lambda: is_idle(gov), "the permit to come back")


def test_an_app_may_lend_its_place(gov: ConcurrencyGovernor) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        with governor.suspended():
            return [str(gov.stats().tools_in_use).encode()]

    response = call(GovernorMiddleware(app, gov))
    assert list(response) == [b"0"]
    response.close()
    assert is_idle(gov)


# --------------------------------------------------------------------------------------- no permit


def refusal(url: str, method: str = "GET") -> tuple[int, str | None, bytes]:
    with pytest.raises(HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=8)
    with caught.value as error:
        return error.code, error.headers["Retry-After"], error.read()


SORRY = b"Too many requests are running: try again later.\n"


def test_a_request_that_gets_no_permit_in_time_is_told_to_come_again(gov: ConcurrencyGovernor) -> None:
    app = App()
    middleware = GovernorMiddleware(app, gov, acquire_timeout=0.01, retry_after=7)
    with serving(middleware) as url, gov.acquire_tool(), gov.acquire_tool():
        assert refusal(url) == (503, "7", SORRY)
        assert refusal(url, "HEAD") == (503, "7", b"")
    assert app.gauge.entries == 0
    assert is_idle(gov)


def test_a_request_that_finds_the_line_full_is_told_to_come_again(gov: ConcurrencyGovernor) -> None:
    app, held = App(), [gov.acquire_tool(), gov.acquire_tool()]
    app.gate.set()
    answers: list[bytes] = []
    with serving(GovernorMiddleware(app, gov)) as url, Crew() as crew:
        for _ in range(2):
            crew.start(lambda: answers.append(get(url)))
        until(lambda: gov.stats().tools_waiting == 2, "a full line")
        assert refusal(url) == (503, "5", SORRY)
        for permit in held:
            permit.release()
        crew.join()
        until(lambda: is_idle(gov), "the last response to be closed")
    assert answers == [b"one two"] * 2


def test_a_request_to_a_closed_governor_is_told_to_come_again(gov: ConcurrencyGovernor) -> None:
    gov.close()
    with serving(GovernorMiddleware(App(), gov)) as url:
        assert refusal(url) == (503, "5", SORRY)


def test_mistakes_are_told_when_it_is_made(gov: ConcurrencyGovernor) -> None:
    with pytest.raises(ValueError, match="retry_after must be an integer >= 0"):
        GovernorMiddleware(App(), gov, retry_after=-1)
    with pytest.raises(ValueError, match="acquire_timeout must be a number of seconds >= 0"):
        GovernorMiddleware(App(), gov, acquire_timeout=-1)
    wrong: Any = "tools"
    with pytest.raises(ValueError, match="kind must be 'stream' or 'tool', not 'tools'"):
        GovernorMiddleware(App(), gov, kind=wrong)
