"""What every governor is: the named layers of an agent, and the ways to get a permit."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutinefunction
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, Self, TypeVar, overload

from governor._calls import governed_stream, governed_tool
from governor._events import GovernorEvent, Listener
from governor._permit import ConcurrencyPermit, Kind, check_kind, try_acquire, wait_for
from governor._request import request
from governor._tree import HELD, UNLIMITED, Node, PermitHolder, is_closed, path
from governor._validate import check_count, check_name, check_timeout

__all__ = ["Governor", "GovernorStats", "check_governor"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class GovernorStats:
    """One consistent snapshot of a governor.

    Attributes:
        streams_available: Streams that could still be opened under the stream limit alone.
        streams_max: The limit of streams.
        tools_available: Tools that could still be run under the tool limit alone.
        tools_max: The limit of tools.
        global_available: Operations that could still be begun under the global limit.
        global_max: The global limit.
        streams_waiting: Waiters for a stream permit, agents' waiters included.
        tools_waiting: Waiters for a tool permit, agents' waiters included.
    """

    streams_available: int
    streams_max: int
    tools_available: int
    tools_max: int
    global_available: int
    global_max: int
    streams_waiting: int
    tools_waiting: int
    # By how much each layer is over its limit, after it shrank under those who hold it. No field.
    _over = (0, 0, 0)

    @property
    def streams_in_use(self) -> int:
        """Streams that hold a permit; more than ``streams_max`` only after it shrank."""
        return self.streams_max - self.streams_available + self._over[0]

    @property
    def tools_in_use(self) -> int:
        """Tools that hold a permit; more than ``tools_max`` only after it shrank."""
        return self.tools_max - self.tools_available + self._over[1]

    @property
    def global_in_use(self) -> int:
        """Operations that hold a permit; more than ``global_max`` only after it shrank."""
        return self.global_max - self.global_available + self._over[2]


class Governor:
    """What every governor can do: :class:`ConcurrencyGovernor` in one process, others in many.

    For annotations, and for ``isinstance``: whatever takes a governor takes each kind.
    """

    _name: str | None
    _parent: Self | None
    _global: Node
    _streams: Node
    _tools: Node
    _own: tuple[Node, ...]
    _permit = ConcurrencyPermit

    def _begin(self, limits: tuple[int | None, ...]) -> None:
        self._made_with = limits
        self._agents: weakref.WeakValueDictionary[str, Governor]
        self._agents = weakref.WeakValueDictionary()
        self._listeners: tuple[tuple[Governor, Listener], ...] = ()  # the root's
        self._closing = False

    # ---------------------------------------------------------------------------- permits

    def acquire_stream(self, timeout: float | None = None) -> ConcurrencyPermit:
        """Wait for a stream permit, first come, first served.

        Args:
            timeout: Seconds to wait; None and infinity wait for ever, 0 does not wait.

        Returns:
            A permit that is held; use it in a ``with`` block, or release it.

        Raises:
            AcquireTimeout: none came in time (also a ``TimeoutError``).
            SemaphoreClosed: the governor is closed, or was while waiting.
            ConcurrencyLimitExceeded: ``max_queued`` are waiting already.
            DeadlockError: it could never come, as this thread is part of a circle of waits.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        permit = ConcurrencyPermit(self._streams, self)
        return permit if permit._ticket.state is HELD else wait_for(permit, timeout)

    def acquire_tool(self, timeout: float | None = None) -> ConcurrencyPermit:
        """Wait for a tool permit; as :meth:`acquire_stream`."""
        if timeout is not None:
            timeout = check_timeout(timeout)
        permit = ConcurrencyPermit(self._tools, self)
        return permit if permit._ticket.state is HELD else wait_for(permit, timeout)

    def acquire(self, kind: Kind, timeout: float | None = None) -> ConcurrencyPermit:
        """Wait for a permit of this kind, ``"stream"`` or ``"tool"``; as :meth:`acquire_stream`."""
        if self._leaf(kind) is self._tools:
            return self.acquire_tool(timeout)
        return self.acquire_stream(timeout)

    def try_acquire_stream(self) -> ConcurrencyPermit | None:
        """Return a stream permit, or None at once where there is no room, or all is closed.

        Never overtakes a waiter that could run.
        """
        return try_acquire(self._streams, self)

    def try_acquire_tool(self) -> ConcurrencyPermit | None:
        """Return a tool permit, or None at once; as :meth:`try_acquire_stream`."""
        return try_acquire(self._tools, self)

    def try_acquire(self, kind: Kind) -> ConcurrencyPermit | None:
        """Return a permit of this kind, or None at once; as :meth:`try_acquire_stream`."""
        return try_acquire(self._leaf(kind), self)

    def request_stream(self) -> Future[ConcurrencyPermit]:
        """Return a future that stands in line for a stream permit, for code that may not block.

        It stands in the same line under the same rules, and resolves to a permit, or fails with
        what ``acquire_stream`` would raise. Cancelling it leaves the line. Its callbacks run in the
        thread that gives the place back. From asyncio: ``await asyncio.wrap_future(...)``.
        """
        return request(self._streams, self)

    def request_tool(self) -> Future[ConcurrencyPermit]:
        """Return a future that stands in line for a tool permit; as :meth:`request_stream`."""
        return request(self._tools, self)

    def request(self, kind: Kind) -> Future[ConcurrencyPermit]:
        """Return a future that stands in line for such a permit; as :meth:`request_stream`."""
        return request(self._leaf(kind), self)

    def _leaf(self, kind: Kind) -> Node:
        check_kind(kind)
        return self._tools if kind == "tool" else self._streams

    @overload
    def tool(self, fn: Callable[P, R], /, *, timeout: float | None = None) -> Callable[P, R]: ...
    @overload
    def tool(self, /, *, timeout: float | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def tool(self, fn: Any = None, /, *, timeout: float | None = None) -> Any:
        """Decorate a function so that each call runs under a tool permit: ``@gov.tool``.

        Name, signature, annotations and docstring stay, so that frameworks can build schemas from
        them. With ``@staticmethod`` or ``@classmethod``, put those outermost.

        Args:
            fn: The function.
            timeout: Seconds that a call waits for its permit: ``@gov.tool(timeout=5)``.

        Raises:
            TypeError: when decorated, a coroutine function, a generator function or a class; when
                called, an awaitable or an asynchronous iterator was returned.
        """
        decorate = partial(governed_tool, acquire=partial(self.acquire_tool, check_timeout(timeout)))
        return decorate if fn is None else decorate(fn)

    @overload
    def stream(self, fn: Callable[P, R], /, *, timeout: float | None = None) -> Callable[P, R]: ...
    @overload
    def stream(self, /, *, timeout: float | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
    def stream(self, fn: Any = None, /, *, timeout: float | None = None) -> Any:
        """Decorate a function so that each call takes a stream permit: ``@gov.stream``.

        The permit is had before the call and kept by the stream that it returns until that is
        exhausted, fails, is closed, or is dropped. A stream is what has ``__next__``, or both
        ``__iter__`` and ``close``. Anything else is returned as it is, the permit given back.

        Works on any callable: ``gov.stream(client.chat.completions.create)(..., stream=True)``.

        Args:
            fn: The function.
            timeout: Seconds that a call waits for its permit.

        Raises:
            TypeError: as :meth:`tool`, generator functions being welcome.
        """
        decorate = partial(governed_stream, acquire=partial(self.acquire_stream, check_timeout(timeout)))
        return decorate if fn is None else decorate(fn)

    # ------------------------------------------------------------------------------- agents

    def agent(self, name: str, *, max_tools: int, max_streams: int | None = None) -> Self:
        """Return the governor of one agent (or provider, or tool): its own limits under this one's.

        It has the same API, agents of its own included. The same name again gives the same agent
        as long as it is in use; nothing of it is left when its last user and permit are gone.
        Closing it stops only it, and frees the name; closing this governor closes it too.

        Args:
            name: Unique among this governor's agents, without ``/``.
            max_tools: Concurrent tools of this agent, a count >= 0.
            max_streams: Concurrent streams of this agent; None: only the limits above hold.

        Raises:
            ValueError: the agent exists with other limits, or a limit or the name is bad.
            TypeError: a limit is not an integer, or the name not a string.
        """
        if "/" in check_name("name", name):
            raise ValueError(
                f"name must have no '/', which stands between an agent and its own agents: {name!r}"
            )
        tools = check_count("max_tools", max_tools)
        streams = None if max_streams is None else check_count("max_streams", max_streams)

        def find_or_make() -> Any:
            found = self._agents.get(name)
            if found is None or any(node.closed for node in found._own):
                found = self._agents[name] = self._make_agent(name, tools, streams)
            return found

        found: Self = self._global.tree.atomically(self._global, find_or_make)
        if found._made_with != (streams, tools):
            raise ValueError(
                f"agent {name!r} exists with max_streams={found._made_with[0]}, "
                f"max_tools={found._made_with[1]}: ask for these, or close it first"
            )
        return found

    def _make_agent(self, name: str, tools: int, streams: int | None) -> Self:
        agent = type(self).__new__(type(self))
        agent._name = name if self._name is None else f"{self._name}/{name}"
        agent._parent = self
        agent._global = self._global
        own = UNLIMITED if streams is None else streams
        agent._streams = self._branch(name, own, self._streams, f"streams of {agent._name!r}")
        agent._tools = self._branch(name, tools, self._tools, f"tools of {agent._name!r}")
        agent._own = (agent._streams, agent._tools)
        agent._begin((streams, tools))
        return agent

    def _branch(self, name: str, limit: int, above: Node, label: str) -> Node:
        """Return an agent's layer."""
        return Node(limit, label, above, above.kind)

    # --------------------------------------------------------------------- looking and steering

    @property
    def name(self) -> str | None:
        """The name it was given; an agent's begins with the names above it: ``api/researcher``."""
        return self._name

    @property
    def parent(self) -> Self | None:
        """The governor that this agent belongs to; None for one that is no agent."""
        return self._parent

    def stats(self) -> GovernorStats:
        """Return one consistent snapshot: ``available == max(0, limit - held)`` in every layer.

        An agent's streams and tools are its own, the global numbers are those of all.
        """
        own = (self._streams, self._tools)
        (_, streams_waiting, _), (_, tools_waiting, _), *layers = self._global.tree.usage(
            *own, *map(_limited, own), self._global
        )
        free = [max(0, limit - used) for used, _, limit in layers]
        over = [max(0, used - limit) for used, _, limit in layers]
        stats = GovernorStats(
            streams_available=free[0],
            streams_max=layers[0][2],
            tools_available=free[1],
            tools_max=layers[1][2],
            global_available=free[2],
            global_max=layers[2][2],
            streams_waiting=streams_waiting,
            tools_waiting=tools_waiting,
        )
        object.__setattr__(stats, "_over", tuple(over))
        return stats

    def _survey(self) -> list[tuple[str | None, str, int, int, int]]:
        """Return one snapshot of all limits: this governor's, and those of its agents that are in use.

        Returns:
            For each limit, whose it is (None: this governor's own; else the agent's name, as in
            :class:`GovernorEvent`), ``"stream"``, ``"tool"`` or ``"global"``, and how many hold a
            permit, wait for one, and may hold one.
        """
        rows: list[tuple[str | None, str, Node]] = []
        found = [self]
        for gov in found:
            label = None if gov is self else gov._label()
            for node in dict.fromkeys((gov._streams, gov._tools, *gov._own)):
                if node.limit != UNLIMITED:
                    rows.append((label, node.kind or "global", node))
            below = [agent for ref in gov._agents.valuerefs() if (agent := ref()) is not None]
            found += [agent for agent in below if agent._name != gov._name]  # no executor's branch
        usage = self._global.tree.usage(*(node for _, _, node in rows)) if rows else []
        return [(label, kind, *used) for (label, kind, _), used in zip(rows, usage, strict=True)]

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with a :class:`GovernorEvent` for what happens from now on, agents included.

        It is called in the thread concerned, with no lock held: in the one that waits, acquires or
        gives back; for a request, in the one that hands the permit over, in the context in which it
        was asked for; for a permit that was dropped, in a new one. It should be quick, as that thread
        waits for it. An exception that it raises is logged by the logger ``governor``, and does no
        harm.

        Every acquisition of which it is told is followed by one release. Of permits that were acquired
        before anybody listened it hears nothing. While there are listeners each operation takes longer.

        Returns:
            What to call to listen no longer.

        Raises:
            TypeError: the listener is not callable, or async.
        """
        if not callable(listener) or iscoroutinefunction(listener):
            raise TypeError(f"listener must be a function that is not async, not {listener!r}")
        root, tree = self._lineage()[-1], self._global.tree
        entry = (self, listener)

        def listen() -> None:
            # Straight line.
            root._listeners += (entry,)
            tree.observed = True

        def stop() -> None:
            root._listeners = tuple(it for it in root._listeners if it is not entry)
            tree.observed = bool(root._listeners)

        tree.atomically(self._global, listen)
        return lambda: tree.atomically(self._global, stop)

    def _lineage(self) -> list[Governor]:
        """This governor, the one it belongs to, and so on up to the root."""
        line: list[Governor] = [self]
        while (parent := line[-1]._parent) is not None:
            line.append(parent)
        return line

    def _label(self) -> str | None:
        """The agent's name below the root's, or None for what is the root's."""
        root = self._lineage()[-1]._name
        if self._name == root or self._name is None:
            return None
        return self._name if root is None else self._name.removeprefix(f"{root}/")

    def _tell(
        self,
        event: str,
        kind: str | None = None,
        seconds: float | None = None,
        reason: str | None = None,
        limits: dict[str, int] | None = None,
    ) -> None:
        """Tell those who listen to this governor, or to one that it belongs to."""
        line = self._lineage()
        what: Any = (event, line[-1]._name, self._label(), kind, seconds, reason)
        made = GovernorEvent(*what)
        stop: BaseException | None = None
        for whose, listener in line[-1]._listeners:
            # Those of an agent hear when the governor above it closes, as then it is closed, too.
            if whose in line or (event == "closed" and self in whose._lineage()):
                try:
                    listener(made._replace(limits=None if limits is None else dict(limits)))
                except Exception:
                    logging.getLogger("governor").exception("%r failed to hear of %r", listener, made)
                except BaseException as error:
                    stop = error  # when all have heard
        if stop is not None:
            try:
                raise stop
            finally:
                del stop

    def holders(self) -> list[PermitHolder]:
        """Return who holds a permit of this governor or of its agents, the longest first.

        For the post-mortem of a hang: ``python -X faulthandler`` shows the stacks, this the permits.
        """
        return self._global.tree.holders(*self._own)

    def resize(
        self,
        *,
        max_streams: int | None = None,
        max_tools: int | None = None,
        max_global: int | None = None,
    ) -> None:
        """Change limits while in use. Those not given stay.

        Growing admits waiters at once, in order. Shrinking revokes nothing: it takes effect as
        permits come back.

        Args:
            max_streams: A count >= 0.
            max_tools: A count >= 0.
            max_global: A count >= 0. An agent shares it and cannot change it.

        Raises:
            TypeError: a limit is not an integer.
            ValueError: a limit is negative, or of a layer that this agent only shares.
        """
        changes: list[tuple[Node, int | None]] = []
        limits: dict[str, int] = {}
        for argument, node, value in (
            ("max_global", self._global, max_global),
            ("max_streams", self._streams, max_streams),
            ("max_tools", self._tools, max_tools),
        ):
            if value is not None:
                limit = check_count(argument, value)
                if self._parent is not None and (node is self._global or node.limit == UNLIMITED):
                    raise ValueError(
                        f"{argument}={limit}: agent {self._name!r} shares this limit and cannot "
                        "change it: resize the governor it belongs to"
                    )
                changes.append((node, limit))
                limits[argument] = limit
        if changes:
            tree = self._global.tree
            tree.revise(*changes)
            if tree.observed:
                tree.tell_of(self, "resized", None, None, None, limits)

    # ---------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Wake every waiter with ``SemaphoreClosed`` and refuse newcomers, at once.

        Permits that are held stay valid; those suspended were admitted already and may resume.
        Closing twice does nothing.
        """
        tree = self._global.tree
        if self._close() and tree.observed:
            tree.tell_of(self, "closed")

    def _close(self) -> bool:
        """Close. Returns whether it was open: of several threads that close, one gets True."""
        tree = self._global.tree

        def claim() -> bool:
            first, self._closing = not self._closing, True
            return first and not self.closed

        first: bool = tree.atomically(self._global, claim)
        tree.revise(*((node, None) for node in self._own))
        return first

    @property
    def closed(self) -> bool:
        """Whether it, or a governor it belongs to, was closed."""
        return is_closed(self._tools)

    def drain(self, timeout: float | None = None) -> bool:
        """Close, then wait until all permits are back, suspended ones too.

        Args:
            timeout: Seconds to wait; None waits for ever.

        Returns:
            Whether all are back.

        Raises:
            RuntimeError: this thread is itself inside a permit, and would wait for itself. Nothing
                is closed then.
        """
        timeout = check_timeout(timeout)
        if any(not set(self._own).isdisjoint(path(it.leaf)) for it in self._global.tree.owned()):
            raise RuntimeError("drain() in a thread that is inside a permit would wait for itself")
        self.close()
        return self._global.tree.drain(self._own, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<{type(self).__name__}{'' if self._name is None else f' {self._name!r}'}"
            f"{' closed' if self.closed else ''}"
            f" streams {stats.streams_in_use}/{stats.streams_max}"
            f" tools {stats.tools_in_use}/{stats.tools_max}"
            f" global {stats.global_in_use}/{stats.global_max}>"
        )

    def __copy__(self) -> Self:
        return self  # frameworks copy what they are configured with; the limits are one

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a governor cannot be pickled, as its limits hold in one process: "
            "make one in each process, for example with ConcurrencyGovernor.shared()"
        )


def check_governor(governor: object) -> None:
    """Refuse what is no governor.

    Raises:
        TypeError: it is not a governor.
    """
    if not isinstance(governor, Governor):
        raise TypeError(f"governor must be a ConcurrencyGovernor, or a RedisGovernor, not {governor!r}")


def _limited(node: Node) -> Node:
    """The layer whose limit an agent's users meet: its own, or the nearest above that has one."""
    while node.limit == UNLIMITED and node.parent is not None:
        node = node.parent
    return node
