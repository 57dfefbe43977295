"""Two ways to let operations in: under a governor, and without one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

from governor import ConcurrencyGovernor
from governor._demo.gauge import Gauge, Gauges
from governor._demo.settings import Settings

__all__ = ["Admission", "Governed", "Kind", "Level", "Regime", "Ungoverned"]

Kind = Literal["stream", "tool"]


@dataclass(frozen=True)
class Level:
    """How full one layer is at this moment."""

    name: str
    in_use: int
    limit: int
    waiting: int = 0


class Admission(Protocol):
    """What the demo wants to know of a permit."""

    @property
    def waited(self) -> float:
        """Seconds in the line."""
        ...


class Regime(Protocol):
    """Lets the agents' operations in."""

    title: str
    """What a run under it is called on the screen."""

    def acquire(self, agent: str, kind: Kind) -> AbstractContextManager[Admission]:
        """Wait until the operation may run, which is while the block runs."""
        ...

    def layers(self) -> list[Level]:
        """Return how full the shared layers are."""
        ...

    def agents(self) -> list[Level]:
        """Return how full each agent's own layer of tools is."""
        ...

    def close(self) -> None:
        """Let nobody in any more."""
        ...


class Governed:
    """One governor for all, and under it one for each agent."""

    def __init__(self, settings: Settings) -> None:
        self.title = (
            f"Governed: {settings.agents} agents, at most {settings.streams} streams, "
            f"{settings.tools} tools ({settings.tools_per_agent} of one agent), "
            f"{settings.total} in all"
        )
        self._governor = ConcurrencyGovernor(
            max_streams=settings.streams,
            max_tools=settings.tools,
            max_global=settings.total,
            name="demo",
        )
        own = settings.tools_per_agent
        self._agents = {name: self._governor.agent(name, max_tools=own) for name in settings.names}

    def acquire(self, agent: str, kind: Kind) -> AbstractContextManager[Admission]:
        """Take a permit of the agent's own governor."""
        return self._agents[agent].acquire(kind)

    def layers(self) -> list[Level]:
        """Ask the governor; whoever waits for a stream or a tool waits at the global layer too."""
        now = self._governor.stats()
        return [
            Level("streams", now.streams_in_use, now.streams_max, now.streams_waiting),
            Level("tools", now.tools_in_use, now.tools_max, now.tools_waiting),
            Level(
                "global",
                now.global_in_use,
                now.global_max,
                now.streams_waiting + now.tools_waiting,
            ),
        ]

    def agents(self) -> list[Level]:
        """Ask the agents' own governors."""
        now = {name: agent.stats() for name, agent in self._agents.items()}
        return [
            Level(name, stats.tools_in_use, stats.tools_max, stats.tools_waiting)
            for name, stats in now.items()
        ]

    def close(self) -> None:
        """Close the governor, which wakes all who wait with `SemaphoreClosed`."""
        self._governor.close()


class Ungoverned:
    """Everybody may run at once; the limits are only there to compare with."""

    title = "Ungoverned: the same work, nothing held back"

    def __init__(self, settings: Settings, gauges: Gauges) -> None:
        self._settings = settings
        self._gauges = gauges

    def acquire(self, agent: str, kind: Kind) -> AbstractContextManager[Admission]:
        """Let the operation in without a wait."""
        return nullcontext(_NO_WAIT)

    def layers(self) -> list[Level]:
        """Read the gauges of the server and the tools, for want of a governor."""
        limits, gauges = self._settings, self._gauges
        return [
            _level("streams", gauges.streams, limits.streams),
            _level("tools", gauges.tools, limits.tools),
            _level("global", gauges.total, limits.total),
        ]

    def agents(self) -> list[Level]:
        """Read the agents' gauges."""
        limit = self._settings.tools_per_agent
        return [_level(name, gauge, limit) for name, gauge in self._gauges.agents.items()]

    def close(self) -> None:
        """Do nothing: there is no line to send home."""


class _NoWait:
    """The admission of an operation that nobody held back."""

    waited = 0.0


_NO_WAIT = _NoWait()


def _level(name: str, gauge: Gauge, limit: int) -> Level:
    """Return a gauge's reading."""
    return Level(name, gauge.inside, limit)
