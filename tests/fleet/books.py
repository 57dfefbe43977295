"""What a fleet's books say, read past the library."""

from __future__ import annotations

from typing import Any

__all__ = ["Books"]


class Books:
    """The keys of one fleet, as ``docs/fleet-protocol.md`` describes them."""

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self._prefix = f"governor:{{{name}}}:"

    def key(self, which: str) -> str:
        return self._prefix + which

    def rows(self, which: str) -> list[str]:
        rows: list[str] = self.client.zrange(self.key(which), 0, -1)
        return rows

    def state(self) -> dict[str, str]:
        state: dict[str, str] = self.client.hgetall(self.key("state"))
        return state

    @property
    def sessions(self) -> int:
        count: int = self.client.zcard(self.key("sessions"))
        return count

    @property
    def listeners(self) -> int:
        """How many sessions listen for what they are granted."""
        return len(self.client.pubsub_channels(f"{self._prefix}*"))

    def ends(self) -> dict[str, float]:
        """When the lease of each session ends."""
        return dict(self.client.zrange(self.key("sessions"), 0, -1, withscores=True))

    def empty(self) -> bool:
        """Whether nobody holds anything, or waits, or is known for something."""
        return not any(self.rows(which) for which in ("held", "line", "ids"))
