"""What tests of governors ask of one, and do with one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from threads import Crew

from governor import ConcurrencyPermit, Governor

__all__ = ["books", "expect", "give_back", "limits", "race", "take", "waiting"]


def limits(gov: Governor) -> tuple[int, int, int]:
    stats = gov.stats()
    return stats.streams_max, stats.tools_max, stats.global_max


def books(gov: Governor) -> tuple[int, int, int]:
    stats = gov.stats()
    return stats.streams_in_use, stats.tools_in_use, stats.global_in_use


def waiting(gov: Governor) -> int:
    return gov.stats().streams_waiting + gov.stats().tools_waiting


def take(gov: Governor, *kinds: str) -> list[ConcurrencyPermit]:
    permits = [gov.try_acquire(kind) for kind in kinds]
    assert None not in permits
    return permits


def give_back(permits: list[ConcurrencyPermit]) -> None:
    while permits:
        permits.pop().release()


def expect(error: type[Exception], call: Callable[..., object], *args: object) -> None:
    with pytest.raises(error):
        call(*args)


def race(make: Callable[[], Governor]) -> set[int]:
    """Call it on many threads at once. Returns the different governors that came of it, by id."""
    made: list[Governor] = []
    together = threading.Barrier(16)
    with Crew() as crew:
        for _ in range(16):
            crew.start(lambda: (together.wait(), made.append(make())))
    assert len(made) == 16
    return {id(it) for it in made}
