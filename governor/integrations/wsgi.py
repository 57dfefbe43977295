"""A WSGI middleware: each request runs under a permit until its response is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from governor._errors import AcquireTimeout, ConcurrencyLimitExceeded, SemaphoreClosed
from governor._governor import Governor
from governor._permit import ConcurrencyPermit, Kind, check_kind
from governor._validate import check_count, check_timeout

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["GovernorMiddleware"]


class GovernorMiddleware:
    """A WSGI app around another: each request waits for a permit, and keeps it until its end.

    A request ends when the server closes its response, after the last byte or when the browser has
    gone away. So a response that streams keeps its permit while it does::

        app.wsgi_app = GovernorMiddleware(app.wsgi_app, gov)

    A request that gets no permit is answered with ``503 Service Unavailable`` and ``Retry-After``:
    when none came in time, when ``max_queued`` wait already, or when the governor is closed.
    """

    def __init__(
        self,
        app: WSGIApplication,
        governor: Governor,
        *,
        kind: Kind = "tool",
        acquire_timeout: float | None = 30.0,
        retry_after: int = 5,
    ) -> None:
        """Govern ``app``.

        Args:
            app: The WSGI app.
            governor: Whose permits to take.
            kind: ``"tool"`` or ``"stream"``.
            acquire_timeout: Seconds that a request waits for its permit, in its thread of the
                server; None waits for ever.
            retry_after: Seconds after which who was refused is told to try again.

        Raises:
            TypeError: ``acquire_timeout`` is not a number, or ``retry_after`` not an integer.
            ValueError: one of them is negative, or the kind is another one.
        """
        check_kind(kind)
        self._app = app
        self._governor = governor
        self._kind: Kind = kind
        self._timeout = check_timeout(acquire_timeout, "acquire_timeout")
        self._retry_after = str(check_count("retry_after", retry_after))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        try:
            permit = self._governor.acquire(self._kind, self._timeout)
        except (AcquireTimeout, ConcurrencyLimitExceeded, SemaphoreClosed):
            return self._refuse(environ, start_response)
        with permit:
            return _Response(self._app(environ, start_response), permit)

    def _refuse(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = b"Too many requests are running: try again later.\n"
        start_response(
            "503 Service Unavailable",
            [
                ("Content-Type", "text/plain"),
                ("Content-Length", str(len(body))),
                ("Retry-After", self._retry_after),
            ],
        )
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class _Response:
    """What the app returned, keeping the permit until it is closed."""

    def __init__(self, chunks: Iterable[bytes], permit: ConcurrencyPermit) -> None:
        # Any thread may send it. And who drops it, as clients in tests do, is not to be warned.
        self._permit = permit._pass_on()
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        # A generator, which keeps this response while a server keeps only the iterator.
        yield from self._chunks

    def close(self) -> None:
        """Close what the app returned, where it can be closed, and give the permit back."""
        try:
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()
        finally:
            self._permit.release()

    def __del__(self) -> None:
        self._chunks = ()  # it ends first: only then may another take its place
