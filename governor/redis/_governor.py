"""The governor of a fleet."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

from redis import Redis

from governor._errors import ConcurrencyError, LeaseLost
from governor._governor import Governor
from governor._permit import ConcurrencyPermit, wait_for
from governor._tree import Node, PermitHolder
from governor._validate import check_count, check_name, check_timeout
from governor.redis._session import LIMITS, Session
from governor.redis._tree import MOST, FleetNode, FleetTree, agent_of
from governor.redis._wire import grouped

__all__ = ["FleetPermit", "FleetSurvey", "LayerSurvey", "RedisGovernor", "SessionSurvey"]


class FleetPermit(ConcurrencyPermit):
    """A permit of a fleet. It may be lost, where its process could not renew its lease in time."""

    __slots__ = ()

    @property
    def lost(self) -> bool:
        """Whether the place may be another's by now, though it is held here."""
        ticket = self._ticket
        tree: Any = ticket.leaf.tree
        found: bool = tree.is_lost(ticket)
        return found

    @property
    def fence(self) -> int:
        """A number that is greater than those of all that were admitted before, in the whole fleet.

        A resource outside can refuse who comes with a smaller one than it has seen: a fencing token.
        """
        return self._ticket.fence

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Give the place back.

        Raises:
            LeaseLost: it was lost, and the block has not failed.
        """
        try:
            lost = exc_type is None and self.lost
        finally:
            self._end()
        if lost:
            raise LeaseLost(f"{self.kind} permit", self._ticket.source.name)


class RedisGovernor(Governor):
    """A governor whose limits hold over all processes and hosts that name the same fleet.

    Its books are in Redis (6.2 or newer) or Valkey::

        gov = RedisGovernor("redis://localhost", "shop", max_streams=4, max_tools=8, max_global=16)
        with gov.acquire_tool():
            run_tool()

    It does all that a :class:`governor.ConcurrencyGovernor` does, under the same rules, over all of the
    fleet. An agent of a name is the same in all processes. Closing it, or an agent, ends this process'
    part only. Every operation is a command to the server, and may raise redis-py's errors; giving back
    never does.

    A process holds what it has under a lease, which a thread of it renews. Who dies, or is cut off for
    longer, loses it. A forked child takes part by itself.
    """

    _permit = FleetPermit

    def __init__(
        self,
        client_or_url: Redis | str,
        name: str,
        *,
        max_streams: int | None = None,
        max_tools: int | None = None,
        max_global: int | None = None,
        lease: float | None = None,
        max_queued: int | None = None,
        slow_wait: float | None = None,
    ) -> None:
        """Join a fleet, or make it. The first to come sets its limits.

        A new fleet grants nothing for half a lease.

        Args:
            client_or_url: A client of redis-py, or what ``Redis.from_url`` takes. Of a client's pool it
                uses two connections.
            name: The fleet's name, without spaces and braces.
            max_streams: Concurrent streams, a count >= 0. None: as the fleet has it.
            max_tools: Concurrent tools, likewise.
            max_global: Concurrent operations of both kinds, likewise.
            lease: Seconds for which what a silent process holds is kept for it. None: as the fleet has
                it, and 30 for a new one.
            max_queued: How many may wait for each kind, in all processes. None: as the fleet has it, and
                any number for a new one.
            slow_wait: Seconds after which a wait of a thread of this process is logged as a warning, with
                who holds what, by the logger ``governor``. None: never.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: an argument is out of range; the fleet has other limits, or there is none yet and
                not all three limits were given.
            ConcurrencyError: the server is too old, or may evict keys.
            RedisError: the server could not be reached, or refused.
        """
        if not isinstance(client_or_url, (str, Redis)):
            raise TypeError(f"client_or_url must be a redis.Redis or a URL, not {client_or_url!r}")
        if any(it in "{}" or it.isspace() for it in check_name("name", name)):
            raise ValueError(f"name must have no spaces and no braces: {name!r}")
        given: dict[str, int | None] = dict(
            zip(LIMITS, (max_streams, max_tools, max_global, max_queued), strict=True)
        )
        for argument, value in given.items():
            if value is not None:
                given[argument] = min(check_count(argument, value), MOST)
        seconds = check_timeout(lease, "lease")
        if lease is not None and (seconds is None or not 0.1 <= seconds <= 86_400):
            raise ValueError(f"lease must be a number of seconds from 0.1 to 86400, not {lease!r}")
        if seconds is not None:
            seconds = round(seconds, 3)  # as the fleet keeps it
        library: Any = Redis  # whose types are not complete
        client: Any = client_or_url
        if isinstance(client_or_url, str):
            try:
                client = library.from_url(client_or_url)
            except ValueError as error:
                raise ValueError(
                    f"client_or_url must be a redis.Redis, or a URL as redis://host or unix:///path: {error}"
                ) from None
        tree = FleetTree()
        tree.slow_wait = check_timeout(slow_wait, "slow_wait")
        tree.session = session = Session(client, name, tree, owns_client=client is not client_or_url)
        try:
            _check_server(client)
            session.join(given, seconds)
            asked: dict[str, float | None] = {**given, "lease": seconds}
            there: dict[str, float | None] = {**session.limits, "lease": session.lease}
            for argument, wanted in asked.items():
                has = there[argument]
                if wanted is not None and wanted != has:
                    how = ", or change it with resize()" if argument in LIMITS[:3] else ""
                    raise ValueError(
                        f"{argument}={wanted}: the fleet {name!r} has {has}: ask for that, or for none{how}"
                    )
        except BaseException:
            session.close()
            raise
        self._name = name
        self._parent = None
        self._global = tree.root = FleetNode(0, "global")
        tree.root.tree = tree
        self._streams = FleetNode(0, "streams", tree.root, "stream")
        self._tools = FleetNode(0, "tools", tree.root, "tool")
        self._own = (self._global,)
        for node, argument in zip((self._streams, self._tools, self._global), LIMITS, strict=False):
            node.limit = session.limits[argument] or 0
        tree.main = (self._streams, self._tools, self._global)
        self._begin((max_streams, max_tools, max_global))

    def acquire_stream(self, timeout: float | None = None) -> ConcurrencyPermit:
        """Wait for a stream permit, first come, first served over the whole fleet.

        As :meth:`governor.Governor.acquire_stream`; it may also raise redis-py's errors.
        """
        if timeout is not None:
            timeout = check_timeout(timeout)
        return wait_for(FleetPermit(self._streams, self), timeout)

    def acquire_tool(self, timeout: float | None = None) -> ConcurrencyPermit:
        """Wait for a tool permit; as :meth:`acquire_stream`."""
        if timeout is not None:
            timeout = check_timeout(timeout)
        return wait_for(FleetPermit(self._tools, self), timeout)

    def _branch(self, name: str, limit: int, above: Node, label: str) -> Node:
        assert isinstance(above, FleetNode)
        return FleetNode.of_agent(name, limit, label, above)

    def _survey_fleet(self) -> FleetSurvey:
        """Return how the fleet is, over all processes."""
        session, tree = self._session, self._global.tree
        assert isinstance(tree, FleetTree)
        keys = ["", "stream/", "tool/", *sorted(key.decode() for key in session.look("agents"))]
        layers: list[LayerSurvey] = []
        for key, usage in zip(keys, tree.usage_of(keys), strict=True):
            kind, agent = key.partition("/")[0] or "global", agent_of(key)
            label = "global" if kind == "global" else f"{kind}s"
            layers.append(LayerSurvey(f"{label} of {agent!r}" if agent else label, kind, *usage))
        settles, *rest = session.look("sessions")
        sessions = [
            SessionSurvey(name.decode().rpartition(":")[0], int(held), int(waiting), int(left) / 1000)
            for name, held, waiting, left in grouped(rest, 4)
        ]
        return FleetSurvey(layers, self.holders(), sessions, int(settles) / 1000)

    @property
    def _session(self) -> Session:
        tree = self._global.tree
        assert isinstance(tree, FleetTree)
        return tree.session

    def __repr__(self) -> str:
        # Without its numbers, for which the server would have to be asked.
        return f"<{type(self).__name__} {self._name!r}{' closed' if self.closed else ''}>"


class LayerSurvey(NamedTuple):
    """One layer of a fleet: what it is called, of which kind it is, and its numbers."""

    name: str
    kind: str
    in_use: int
    waiting: int
    limit: int | None


class SessionSurvey(NamedTuple):
    """One process of a fleet: how much it has, and the seconds until its lease ends."""

    process: str
    held: int
    waiting: int
    lease_left: float


class FleetSurvey(NamedTuple):
    """How a fleet is. It ``settles`` for so many seconds before it grants anything."""

    layers: list[LayerSurvey]
    holders: list[PermitHolder]
    sessions: list[SessionSurvey]
    settles: float


def _check_server(client: Any) -> None:
    """Refuse a server that is too old, or that would forget the books.

    Raises:
        ConcurrencyError: it is one of these.
    """
    info = client.info()
    version = str(info.get("redis_version", "0"))
    if tuple(map(int, version.split(".")[:2])) < (6, 2):
        raise ConcurrencyError(f"the server must be Redis 6.2 or newer, or Valkey, not Redis {version}")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys"):
        raise ConcurrencyError(
            f"the server's maxmemory-policy is {policy}, by which it may forget the books: "
            "it must be noeviction, or a volatile one"
        )
