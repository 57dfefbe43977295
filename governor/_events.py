"""What a governor tells those who have subscribed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

__all__ = ["GovernorEvent", "Listener"]


class GovernorEvent(NamedTuple):
    """Something that happened to a permit, or to a governor.

    Attributes:
        event: ``"queued"``: an operation stands in line. ``"acquired"``: it has a permit, or has it
            again after a suspension. ``"released"``: it has given it back, or suspended it.
            ``"rejected"``: it got none. ``"lost"``: its permit may have been granted to others (of a fleet,
            where its lease was over; ``"released"`` still follows). ``"resized"``, ``"closed"``: of the
            governor or agent itself.
        governor: The name of the governor, or None.
        agent: The name of its agent, those above it included (``"coder/tester"``), or None.
        kind: ``"stream"`` or ``"tool"``; None where it is about the governor itself.
        seconds: Since it asked (acquired, rejected), or held (released); else None.
        reason: Why it was rejected: ``"timeout"`` (also where it would not wait at all), ``"full"``
            (``max_queued``, or a place where it must not wait), ``"closed"``, ``"deadlock"``, or
            ``"cancelled"`` (a request that was cancelled, a wait that an exception ended).
        limits: The limits that were changed, by the name of the argument of ``resize``; else None.
    """

    event: Literal["queued", "acquired", "released", "rejected", "lost", "resized", "closed"]
    governor: str | None
    agent: str | None
    kind: Literal["stream", "tool"] | None = None
    seconds: float | None = None
    reason: Literal["timeout", "full", "closed", "deadlock", "cancelled"] | None = None
    limits: dict[str, int] | None = None


Listener = Callable[[GovernorEvent], object]
