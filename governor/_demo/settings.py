"""What the demo was asked to do."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_AGENTS", "Settings"]

# Each agent brings a thread of its own and one for every call of a burst.
MAX_AGENTS = 32
# Larger bursts would only need more threads: those of several agents add up anyway.
_MAX_BURST = 24

_ROLES = ("researcher", "coder", "reviewer", "tester", "writer", "planner")


@dataclass(frozen=True)
class Settings:
    """The limits, and the work that runs into them.

    Attributes:
        streams: Limit of streams open at once.
        tools: Limit of tools running at once.
        total: Limit of both together, the governor's global layer.
        agents: How many agents work at once, at most `MAX_AGENTS`.
        seconds: How long each of the two runs lasts.
        seed: Fixes the plan: what the model says and which tools it asks for.
    """

    streams: int = 4
    tools: int = 8
    total: int = 10
    agents: int = 6
    seconds: float = 3.0
    seed: int = 1

    @property
    def tools_per_agent(self) -> int:
        """The limit of one agent's own layer: half of the tools, but at least one."""
        return max(1, self.tools // 2)

    @property
    def bursts(self) -> range:
        """The sizes of a burst: unless capped, one agent's alone is above every limit of tools."""
        largest = min(max(self.tools, self.total) + 5, _MAX_BURST)
        return range(largest - 3, largest + 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The agents' names: researcher, coder, ..., then researcher-2 and so on."""
        return tuple(_name(index) for index in range(self.agents))


def _name(index: int) -> str:
    """Name the agent with this index."""
    generation, role = divmod(index, len(_ROLES))
    return f"{_ROLES[role]}-{generation + 1}" if generation else _ROLES[role]
