"""The governor of one process: its limits, and where it gets them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from governor._governor import Governor
from governor._tree import UNLIMITED, Node
from governor._validate import check_count, check_name, check_timeout, count_from_env, seconds_from_env

__all__ = ["ConcurrencyGovernor"]

_DEFAULTS = {"max_streams": 4, "max_tools": 8, "max_global": 16}


class ConcurrencyGovernor(Governor):
    """Bounds an agent's concurrent streams, tools, and operations in all.

    An LLM agent's turn opens streams, fires a burst of tool calls, starts sub-agents that do the
    same. A governor is what they all ask first::

        gov = ConcurrencyGovernor(max_streams=4, max_tools=8, max_global=16)
        with gov.acquire_tool():
            run_tool()

    A permit takes one of its kind's layer and one of the global layer, both in one step, so that a
    waiter holds nothing of either. Waiters are served in the order of their coming, skipping only
    those whose layers are full. All methods may be called from any thread.

    Limits hold in one process: a forked child starts with its own full limits.
    """

    def __init__(
        self,
        max_streams: int,
        max_tools: int,
        max_global: int,
        *,
        max_queued: int | None = None,
        slow_wait: float | None = None,
        name: str | None = None,
    ) -> None:
        """Make a governor with these limits.

        Args:
            max_streams: Concurrent streams, a count >= 0. 0 pauses the layer until it is resized.
            max_tools: Concurrent tools, likewise.
            max_global: Concurrent operations of both kinds, likewise.
            max_queued: How many may wait for each kind, agents' waiters included; a further acquire
                raises ``ConcurrencyLimitExceeded`` at once. None: any number.
            slow_wait: Seconds after which a wait of a thread is logged as a warning, with who holds
                what, by the logger ``governor``. None: never.
            name: For messages and metrics.

        Raises:
            TypeError: a limit is not an integer, or the name not a string.
            ValueError: a limit is negative, or the name empty.
        """
        streams = check_count("max_streams", max_streams)
        tools = check_count("max_tools", max_tools)
        everything = check_count("max_global", max_global)
        queued = UNLIMITED if max_queued is None else check_count("max_queued", max_queued)
        self._name = None if name is None else check_name("name", name)
        self._parent = None
        self._global = Node(everything, "global")
        self._global.tree.slow_wait = check_timeout(slow_wait, "slow_wait")
        self._streams = Node(streams, "streams", self._global, "stream", queued)
        self._tools = Node(tools, "tools", self._global, "tool", queued)
        self._own: tuple[Node, ...] = (self._global,)
        self._begin((streams, tools, everything))

    @classmethod
    def with_defaults(cls) -> Self:
        """Make a governor with 4 streams, 8 tools, 16 operations in all."""
        return cls(*_DEFAULTS.values())

    @classmethod
    def from_env(cls, prefix: str = "GOVERNOR_") -> Self:
        """Make a governor with limits from the environment.

        Reads ``GOVERNOR_MAX_STREAMS``, ``GOVERNOR_MAX_TOOLS``, ``GOVERNOR_MAX_GLOBAL``,
        ``GOVERNOR_MAX_QUEUED`` and ``GOVERNOR_SLOW_WAIT``; those not set take the defaults: 4, 8, 16,
        no bound, and no log.

        Args:
            prefix: What the variables' names begin with.

        Raises:
            ValueError: a variable is not a number >= 0 as it should be; the message names it.
        """
        return cls(*_limits(prefix, {}), **_options(prefix))

    @classmethod
    def shared(
        cls,
        name: str = "default",
        *,
        max_streams: int | None = None,
        max_tools: int | None = None,
        max_global: int | None = None,
    ) -> ConcurrencyGovernor:
        """Return the one governor of that name in this process, made on first use.

        Closing it frees the name.

        Args:
            name: The name to share it under.
            max_streams: As for the class; None takes what ``from_env`` would, or what is there.
            max_tools: Likewise.
            max_global: Likewise.

        Raises:
            ValueError: it was made with other limits than these, or a limit is bad.
            TypeError: a limit is not an integer, or the name not a string.
        """
        check_name("name", name)
        asked = {"max_streams": max_streams, "max_tools": max_tools, "max_global": max_global}
        for argument, value in asked.items():
            if value is not None:
                asked[argument] = check_count(argument, value)

        def find_or_make() -> ConcurrencyGovernor:
            found = _shared.get(name)
            if found is None or found.closed:
                limits, options = _limits("GOVERNOR_", asked), _options("GOVERNOR_")
                found = _shared[name] = ConcurrencyGovernor(*limits, **options, name=name)
            return found

        found: ConcurrencyGovernor = _registry.tree.atomically(_registry, find_or_make)
        for (argument, value), made_with in zip(asked.items(), found._made_with, strict=True):
            if value not in (None, made_with):
                raise ValueError(
                    f"{argument}={value}: the shared governor {name!r} was made with {made_with}: "
                    "ask for that, or for none, or close it first"
                )
        return found

    def _close(self) -> bool:
        first = super()._close()

        def free_the_name() -> None:
            if self._name is not None and _shared.get(self._name) is self:
                del _shared[self._name]

        _registry.tree.atomically(_registry, free_the_name)
        return first


def _options(prefix: str) -> dict[str, Any]:
    return {
        "max_queued": count_from_env(f"{prefix}MAX_QUEUED"),
        "slow_wait": seconds_from_env(f"{prefix}SLOW_WAIT"),
    }


def _limits(prefix: str, given: Mapping[str, int | None]) -> list[int]:
    """The limits given; in place of those that are not, the environment's, or the defaults."""
    limits: list[int] = []
    for argument, default in _DEFAULTS.items():
        limit = given.get(argument)
        if limit is None:
            limit = count_from_env(prefix + argument.upper())
        limits.append(default if limit is None else limit)
    return limits


# The governors that `shared` hands out, and a tree of no other use than its lock, which no
# interrupt leaves taken and no fork inherits.
_shared: dict[str, ConcurrencyGovernor] = {}
_registry = Node(0, "registry")
