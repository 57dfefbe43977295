"""Permits for asyncio code: ``async with permit(gov, "tool"):``."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import TracebackType

from governor._governor import ConcurrencyGovernor
from governor._permit import ConcurrencyPermit, Kind

__all__ = ["permit"]


class permit:
    """Hold a permit for the length of an ``async with`` block, without blocking the event loop.

    It stands in the same line as threads do. A task that is cancelled while it waits leaves the
    line, and a permit that was on its way to it is given back.

    One is for one block at a time: make another for each task.
    """

    def __init__(self, governor: ConcurrencyGovernor, kind: Kind) -> None:
        """Ask ``governor`` for a permit of ``kind``, ``"tool"`` or ``"stream"``, on entering."""
        self._governor = governor
        self._kind: Kind = kind
        self._request: Future[ConcurrencyPermit] | None = None

    async def __aenter__(self) -> ConcurrencyPermit:
        if self._request is not None:
            raise RuntimeError("this permit is in use: make one for each block, and each task")
        try:
            self._request = self._governor.request(self._kind)
            return await asyncio.wrap_future(self._request)
        except BaseException:
            self._give_back()
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        request, self._request = self._request, None
        if request is not None and not request.cancel() and request.exception() is None:
            request.result().release()
