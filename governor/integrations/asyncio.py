"""Permits for asyncio code: ``async with permit(gov, "tool"):``."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from governor._governor import Governor, check_governor
from governor._permit import ConcurrencyPermit, Kind, check_kind
from governor._validate import check_timeout

__all__ = ["acquire", "permit"]


async def acquire(governor: Governor, kind: Kind, timeout: float | None = None) -> ConcurrencyPermit:
    """Wait for a permit without blocking the event loop; whoever gets it releases it.

    It stands in the same line as threads do. A task that is cancelled while it waits leaves the line,
    and a permit that was on its way to it is given back.

    Args:
        governor: Whose permit.
        kind: ``"tool"`` or ``"stream"``.
        timeout: Seconds to wait; None and infinity wait for ever, 0 does not wait.

    Raises:
        AcquireTimeout: none came in time (also a ``TimeoutError``).
        SemaphoreClosed: the governor is closed, or was while waiting.
        ConcurrencyLimitExceeded: ``max_queued`` are waiting already.
        RuntimeError: no event loop of asyncio runs in this thread.
    """
    timeout = check_timeout(timeout)
    loop = asyncio.get_running_loop()
    if timeout == 0:
        return governor.acquire(kind, 0)  # which does not wait
    request: Any = governor.request(kind)
    timer = None
    try:
        if not request.done():
            if timeout is not None:
                timer = loop.call_later(timeout, request.expire, timeout)
            await asyncio.wrap_future(request)
        granted: ConcurrencyPermit = request.result()
    except BaseException:
        if not request.cancel() and request.exception() is None:
            request.result().release()
        raise
    finally:
        if timer is not None:
            timer.cancel()
        del request  # else its error and this frame would keep each other, and the agent
    return granted


class permit:
    """Hold a permit for the length of an ``async with`` block, without blocking the event loop.

    It waits as :func:`acquire` does. One is for one block at a time: make another for each task.
    """

    def __init__(self, governor: Governor, kind: Kind, timeout: float | None = None) -> None:
        """Ask for a permit on entering.

        Args:
            governor: Whose permit.
            kind: ``"tool"`` or ``"stream"``.
            timeout: Seconds to wait on entering; None waits for ever.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the kind is another one, or the timeout is negative.
        """
        check_governor(governor)
        check_kind(kind)
        self._governor = governor
        self._kind: Kind = kind
        self._timeout = check_timeout(timeout)
        self._in_use = False
        self._permit: ConcurrencyPermit | None = None

    async def __aenter__(self) -> ConcurrencyPermit:
        if self._in_use:
            raise RuntimeError("this permit is in use: make one for each block, and each task")
        self._in_use = True
        try:
            self._permit = await acquire(self._governor, self._kind, self._timeout)
        except BaseException:
            self._in_use = False
            raise
        return self._permit

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        held, self._permit, self._in_use = self._permit, None, False
        if held is not None:
            held.release()
