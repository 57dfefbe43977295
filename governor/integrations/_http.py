"""What the adapters of HTTP clients share: which requests need a permit, and how to have one."""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import Generic, TypeVar

from governor._governor import Governor, check_governor
from governor._permit import ConcurrencyPermit, Kind, check_kind
from governor._validate import check_timeout
from governor.integrations.asyncio import acquire

__all__ = ["Gate"]

R = TypeVar("R")


class Gate(Generic[R]):
    """What requests pass on their way out."""

    def __init__(
        self,
        governor: Governor,
        kind: Kind,
        acquire_timeout: float | None,
        when: Callable[[R], object] | None,
    ) -> None:
        """Check what an adapter was given.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the kind is another one, or the timeout is negative.
        """
        check_governor(governor)
        check_kind(kind)
        if when is not None and (not callable(when) or iscoroutinefunction(when)):
            raise TypeError(f"when must be a function of a request, not async, or None, not {when!r}")
        self.timeout = check_timeout(acquire_timeout, "acquire_timeout")
        self.governor = governor
        self.kind: Kind = kind
        self._when = when

    def governs(self, request: R) -> bool:
        """Whether this request needs a permit."""
        return self._when is None or bool(self._when(request))

    def acquire(self) -> ConcurrencyPermit:
        """Wait for a permit that a response may keep: to drop it is to end it."""
        return self.governor.acquire(self.kind, self.timeout)._pass_on()

    async def acquire_async(self) -> ConcurrencyPermit:
        """Wait for such a permit, the event loop running on."""
        return (await acquire(self.governor, self.kind, self.timeout))._pass_on()
