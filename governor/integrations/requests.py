"""A governed adapter for requests: a request goes out once its permit is held."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

try:
    import requests
except ImportError as error:
    raise ImportError(
        "governor.integrations.requests needs requests: pip install 'concurrency-governor[requests]'"
    ) from error

from requests.adapters import HTTPAdapter
from urllib3.response import HTTPResponse

from governor._errors import AcquireTimeout
from governor._governor import Governor
from governor._permit import ConcurrencyPermit, Kind
from governor.integrations._http import Gate

__all__ = ["GovernedAdapter"]


class _Body(HTTPResponse):
    """The body of a response. Keeps the permit until it is read to the end, closed or dropped.

    A response becomes one by its ``__class__``, so that it stays what urllib3 made, and what other
    code knows: only its end is noticed.
    """

    _governor_permit: ConcurrencyPermit | None

    def release_conn(self) -> None:
        # urllib3 calls it as soon as there is nothing left to read, however that came.
        try:
            super().release_conn()
        finally:
            self._governor_give_back()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._governor_give_back()

    def _governor_give_back(self) -> None:
        if self._governor_permit is not None:
            self._governor_permit.release()

    def __del__(self) -> None:
        # A finalizer must not wait for a lock, as `release` may. The permit's own does not, and runs
        # at the end of this one, when the body is closed.
        permit, self._governor_permit = self._governor_permit, None
        super().__del__()
        del permit


class GovernedAdapter(HTTPAdapter):
    """An adapter whose requests wait for a permit each, before they go out.

    It is for a session::

        session = requests.Session()
        session.mount("https://", GovernedAdapter(gov))

    The permit comes back when the response is over. Without ``stream=True`` that is before the call
    returns; with it, when the body is read to its end, closed or dropped.

    A copy shares the governor. It can be pickled if the governor can.
    """

    __attrs__ = [*HTTPAdapter.__attrs__, "_governor_gate"]  # noqa: RUF012

    def __init__(
        self,
        governor: Governor,
        *,
        kind: Kind = "stream",
        acquire_timeout: float | None = None,
        when: Callable[[requests.PreparedRequest], object] | None = None,
        **http_adapter_options: Any,
    ) -> None:
        """Make an adapter.

        Args:
            governor: Whose permits the requests take.
            kind: The kind of permit, ``"stream"`` or ``"tool"``.
            acquire_timeout: Seconds that a request waits for its permit, then ``ConnectTimeout`` is
                raised; None: for ever.
            when: Called with each prepared request. One for which it is false goes out without a
                permit. None: all need one.
            http_adapter_options: As for ``HTTPAdapter``: ``pool_maxsize``, ``max_retries`` and others.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the kind is another one, or the timeout is negative.
        """
        self._governor_gate = Gate(governor, kind, acquire_timeout, when)
        super().__init__(**http_adapter_options)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """Wait for a permit, then send the request. The response keeps the permit until it is over.

        Raises:
            ConnectTimeout: no permit came within ``acquire_timeout``; its ``__cause__`` is the
                ``AcquireTimeout``.
            SemaphoreClosed: the governor is closed, or was while waiting.
            ConcurrencyLimitExceeded: too many wait already.
            DeadlockError: it could never come, as this thread is part of a circle of waits.
        """
        if not self._governor_gate.governs(request):
            return super().send(request, *args, **kwargs)
        try:
            permit = self._governor_gate.acquire()
        except AcquireTimeout as error:
            raise requests.ConnectTimeout(error, request=request) from error
        try:
            response = super().send(request, *args, **kwargs)
            _let_keep(response.raw, permit)
        except BaseException:
            permit.release()
            raise
        return response


def _let_keep(body: HTTPResponse, permit: ConcurrencyPermit) -> None:
    """Let the body of a response keep the permit, unless nothing of it is still to come."""
    if body.connection is None or body.length_remaining == 0:  # from a cache; after HEAD, with 204
        permit.release()
        return
    keeper: Any = body
    keeper._governor_permit = permit
    keeper.__class__ = _governed(type(body))


@cache
def _governed(kind: type[HTTPResponse]) -> type[HTTPResponse]:
    return _Body if kind is HTTPResponse else type(kind.__name__, (_Body, kind), {})
