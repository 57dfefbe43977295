"""Counters that the server and the tools keep themselves, apart from the governor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Self

__all__ = ["Gauge", "Gauges"]


class Gauge:
    """Counts who is inside its `with` block now, and the most that ever were at once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._peak = 0

    def __enter__(self) -> Self:
        with self._lock:
            self._inside += 1
            self._peak = max(self._peak, self._inside)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._inside -= 1

    @property
    def inside(self) -> int:
        """How many are inside now."""
        return self._inside

    @property
    def peak(self) -> int:
        """The most that were inside at once."""
        return self._peak


@dataclass(frozen=True)
class Gauges:
    """The gauges of one run.

    Attributes:
        agents: One gauge an agent, of the tools that run for it.
        streams: The streams that the server has open.
        tools: The tools that run, whoever asked for them.
        total: Streams and tools together.
    """

    agents: Mapping[str, Gauge]
    streams: Gauge = field(default_factory=Gauge)
    tools: Gauge = field(default_factory=Gauge)
    total: Gauge = field(default_factory=Gauge)

    @classmethod
    def of(cls, agents: Iterable[str]) -> Self:
        """Return gauges that stand at zero, for the agents of these names."""
        return cls({name: Gauge() for name in agents})
