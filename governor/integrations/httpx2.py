"""Governed transports for httpx2: a request goes out once its permit is held."""

from __future__ import annotations

from collections.abc import Callable

try:
    import httpx2
except ImportError as error:
    raise ImportError(
        "governor.integrations.httpx2 needs httpx2: pip install 'concurrency-governor[httpx2]'"
    ) from error

from governor._governor import Governor
from governor._permit import Kind
from governor.integrations._http import Gate
from governor.integrations._transport import AsyncStream, AsyncTransport, Stream, Transport

__all__ = ["AsyncGovernedTransport", "GovernedTransport"]


class _Stream(Stream, httpx2.SyncByteStream):
    pass


class _AsyncStream(AsyncStream, httpx2.AsyncByteStream):
    pass


class GovernedTransport(Transport[httpx2.Request, httpx2.Response], httpx2.BaseTransport):
    """A transport whose requests wait for a permit each, before they go out.

    It is for a client::

        client = httpx2.Client(transport=GovernedTransport(gov))

    The permit comes back when the response is over: read to its end, closed or dropped, or when
    the client is closed. Each request of a redirect chain, and each retry, takes a permit of its own.
    """

    _stream = _Stream
    _pool_timeout = httpx2.PoolTimeout

    def __init__(
        self,
        governor: Governor,
        transport: httpx2.BaseTransport | None = None,
        *,
        kind: Kind = "stream",
        acquire_timeout: float | None = None,
        when: Callable[[httpx2.Request], object] | None = None,
    ) -> None:
        """Govern ``transport``.

        Args:
            governor: Whose permits the requests take.
            transport: What sends the requests, and is closed with this one. None:
                ``httpx2.HTTPTransport()``.
            kind: The kind of permit, ``"stream"`` or ``"tool"``.
            acquire_timeout: Seconds that a request waits for its permit, then ``PoolTimeout`` is
                raised; None: for ever.
            when: Called with each request. One for which it is false goes out without a permit.
                None: all need one.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the kind is another one, or the timeout is negative.
        """
        gate = Gate(governor, kind, acquire_timeout, when)
        if transport is None:
            transport = httpx2.HTTPTransport()
        elif not isinstance(transport, httpx2.BaseTransport):
            raise TypeError(f"transport must be an httpx2.BaseTransport, not {transport!r}")
        super().__init__(gate, transport)


class AsyncGovernedTransport(AsyncTransport[httpx2.Request, httpx2.Response], httpx2.AsyncBaseTransport):
    """As :class:`GovernedTransport`, for ``httpx2.AsyncClient`` under asyncio.

    Its tasks stand in the same line as threads do. A task that waits does not block the event loop.
    """

    _stream = _AsyncStream
    _pool_timeout = httpx2.PoolTimeout

    def __init__(
        self,
        governor: Governor,
        transport: httpx2.AsyncBaseTransport | None = None,
        *,
        kind: Kind = "stream",
        acquire_timeout: float | None = None,
        when: Callable[[httpx2.Request], object] | None = None,
    ) -> None:
        """Govern ``transport``; as :class:`GovernedTransport`, but for asynchronous transports."""
        gate = Gate(governor, kind, acquire_timeout, when)
        if transport is None:
            transport = httpx2.AsyncHTTPTransport()
        elif not isinstance(transport, httpx2.AsyncBaseTransport):
            raise TypeError(f"transport must be an httpx2.AsyncBaseTransport, not {transport!r}")
        super().__init__(gate, transport)
