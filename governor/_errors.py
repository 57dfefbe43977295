"""What can go wrong: the tree of errors, their fields, and the messages built from them.

Every error builds its message from its own fields, so that a log line can be written from either,
and survives pickling, so that it can cross a process pool.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "AcquireTimeout",
    "ConcurrencyError",
    "ConcurrencyLimitExceeded",
    "DeadlockError",
    "LayerUse",
    "LeaseLost",
    "SemaphoreClosed",
    "ThreadWait",
]


class LayerUse(NamedTuple):
    """How full one layer was at the moment of a refusal."""

    name: str
    in_use: int
    limit: int

    def __str__(self) -> str:
        return f"{self.name} {self.in_use}/{self.limit}"


class ThreadWait(NamedTuple):
    """One thread of a circle: what it holds, a permit each, and what it waits for."""

    thread: str
    holds: tuple[str, ...]
    waits_for: str

    def __str__(self) -> str:
        held = ", ".join(f"{self.holds.count(it)} {it}" for it in dict.fromkeys(self.holds))
        return f"thread {self.thread!r} holds {held} and waits for 1 {self.waits_for}"


class ConcurrencyError(Exception):
    """Base of every error that this library raises on purpose."""


class SemaphoreClosed(ConcurrencyError):
    """The governor, agent or layer was closed before a permit was had.

    Attributes:
        what: What was asked for, such as ``"tool permit"``.
        governor: The name of the governor or layer asked, or None.
    """

    def __init__(self, what: str, governor: str | None = None) -> None:
        self.what, self.governor = what, governor
        super().__init__(f"no {what}: {_called(governor)}closed")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.governor), self.__dict__


class _Refused(ConcurrencyError):
    """A permit was refused while everything is open; says what was in the way."""

    def __init__(
        self,
        what: str,
        bound: float | None,
        layers: tuple[LayerUse, ...] = (),
        waiting: int = 0,
        governor: str | None = None,
    ) -> None:
        self.what, self.bound, self.layers = what, bound, layers
        self.waiting, self.governor = waiting, governor
        uses = [str(use) for use in layers]
        if uses:
            uses[0] += " in use"
        super().__init__(f"{_called(governor)}no {what} {self._why()}: " + ", ".join(uses + self._rest()))

    def _why(self) -> str:
        raise NotImplementedError

    def _rest(self) -> list[str]:
        return [f"{self.waiting} waiting ahead"]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.bound, self.layers, self.waiting, self.governor), self.__dict__


class AcquireTimeout(_Refused, TimeoutError):
    """No permit came within the timeout. The waiter has left the line.

    Attributes:
        what: What was asked for, such as ``"tool permit"``.
        bound: The timeout, in seconds.
        layers: How full each layer of the path was, the narrowest first.
        waiting: How many of the same kind stood ahead.
        governor: The name of the governor asked, or None.
    """

    def _why(self) -> str:
        return f"within {self.bound} s" if self.bound else "at once"


class ConcurrencyLimitExceeded(_Refused):
    """The line is full, or the caller is where waiting is impossible.

    Attributes:
        what: What was asked for, such as ``"tool permit"``.
        bound: ``max_queued``, a count; None inside a signal handler or finalizer that interrupted
            the governor itself, where a wait could never end.
        layers: How full each layer of the path was, the narrowest first.
        waiting: How many of the same kind stood in line.
        governor: The name of the governor asked, or None.
    """

    def _why(self) -> str:
        if self.bound is None:
            return "inside a signal handler or finalizer that interrupted the governor itself"
        return f"as the line is full (max_queued={self.bound})"

    def _rest(self) -> list[str]:
        if self.bound is None:
            return ["it must not wait there: use try_acquire"]
        return [f"{self.waiting} waiting: raise max_queued, or submit less at once"]


class LeaseLost(ConcurrencyError):
    """A permit of a fleet was held for longer than its process could renew its lease.

    Its place may have been granted to another process meanwhile.

    Attributes:
        what: What was held, such as ``"tool permit"``.
        governor: The name of the fleet, or None.
    """

    def __init__(self, what: str, governor: str | None = None) -> None:
        self.what, self.governor = what, governor
        super().__init__(
            f"{_called(governor)}this {what} is lost: its lease was over before it could be renewed, "
            "and its place may be another's by now"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.governor), self.__dict__


class DeadlockError(ConcurrencyError):
    """A wait could never end: the permits it needs are held by threads that wait for each other.

    Attributes:
        what: What was asked for, such as ``"tool permit"``.
        layers: How full each layer of the path was, the narrowest first.
        circle: Who holds what and waits for what, the thread that asked first.
        governor: The name of the governor asked, or None.
    """

    def __init__(
        self,
        what: str,
        layers: tuple[LayerUse, ...],
        circle: tuple[ThreadWait, ...],
        governor: str | None = None,
    ) -> None:
        self.what, self.layers, self.circle, self.governor = what, layers, circle, governor
        super().__init__(
            f"{_called(governor)}no {what} can ever come: {', '.join(map(str, layers))} in use; "
            f"{'; '.join(map(str, circle))}. Give the place back while waiting for others: "
            "'with governor.suspended():'"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.layers, self.circle, self.governor), self.__dict__


def _called(governor: str | None) -> str:
    return "" if governor is None else f"governor {governor!r}: "
