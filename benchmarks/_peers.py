"""The contenders: each runs something under the limits of its kind, as well as it can.

All have three limits, for streams, for tools and for both together, and may have agents with limits of
their own below that of the tools. ``run(kind, n, body)`` calls ``body`` that many times, each time within
one place of every layer of its kind: ``"stream"``, ``"tool"``, or ``"agent 0"``, whose tools those are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any, ClassVar

from benchmarks._measure import PATIENCE, Broken, Gauge, at_rest
from governor import ConcurrencyGovernor, GovernorEvent

__all__ = [
    "NO_BLOCKS", "PACKAGES", "PEERS", "Floor", "GovernedWithListener", "Nested", "NestedGlobalFirst", "Peer",
    "installed", "left_out",
]  # fmt: skip

Body = Callable[[], object]

# What takes part somewhere, by the name of its distribution.
PACKAGES = (
    "anyio", "bounded-pool-executor", "bulkman", "more-executors", "pyresilience", "redis",
    "resource-semaphore",
)  # fmt: skip

# What has no way to say: run this under a limit of how many run at once, and wait for it here.
NO_BLOCKS = {
    "bounded-pool-executor": "cannot: bounds only its own pool's jobs, see `jobs`",
    "more-executors": "cannot: bounds only the jobs of executors, see `jobs`",
    "pyrate-limiter": "cannot: counts calls in a span of time, not what runs",
}


def installed(package: str) -> str | None:
    """Return the version of a distribution, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Peer:
    """One contender, with its limits.

    Attributes:
        name: In the tables.
        package: The distribution that it is from, None for the standard library and for governor.
        layers: How many layers of a path it can hold.
        slow: Whether a turn takes so much longer than the others' that a few will do.
    """

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    layers: ClassVar[int] = 3
    slow: ClassVar[bool] = False

    def __init__(self, streams: int, tools: int, everything: int, agents: int = 0, each: int = 1) -> None:
        self.agents = [f"agent {n}" for n in range(agents)]
        self.limits = {"stream": streams, "tool": tools, "global": everything} | dict.fromkeys(
            self.agents, each
        )
        self.paths: dict[str, tuple[str, ...]] = {"stream": ("stream", "global"), "tool": ("tool", "global")}
        self.paths |= {agent: (agent, "tool", "global") for agent in self.agents}
        self.build(self.limits)

    def build(self, limits: Mapping[str, int]) -> None:
        """Make what is needed of the limits of the layers."""

    def run(self, kind: str, n: int, body: Body) -> None:
        """Call ``body`` this many times, each time under the limits of this kind."""
        raise NotImplementedError

    def close(self) -> None:
        """End threads of its own."""

    def remark(self, layers: int) -> str:
        """Say what it leaves out of paths of so many layers."""
        return "" if self.layers >= layers else f"only {self.layers} of the {layers} layers"

    def check(self) -> None:
        """Raise unless as many as the limits say run at once, and in the end all."""
        tools = min(self.limits["tool"], 50)  # more would measure the operating system
        least = min(tools, self.limits["global"] if self.layers > 1 else tools)
        _crowd(self, {"tool": tools + 3}, least)
        if self.layers > 1:
            _crowd(self, {"tool": tools + 3, "stream": min(self.limits["stream"], 50) + 3}, least=1)
        for agent in self.agents[-1:]:
            _crowd(self, {agent: self.limits[agent] + 3}, least=min(least, self.limits[agent]))


def _crowd(peer: Peer, threads: dict[str, int], least: int) -> None:
    gauges = {kind: Gauge() for kind in (*threads, "global")}
    gate = threading.Event()

    def body(kind: str) -> None:
        with gauges[kind], gauges["global"]:
            gate.wait(PATIENCE)

    crew = [
        threading.Thread(target=peer.run, args=(kind, 1, lambda kind=kind: body(kind)), daemon=True)
        for kind, count in threads.items()
        for _ in range(count)
    ]
    for thread in crew:
        thread.start()
    deadline = monotonic() + 5
    while gauges["global"].inside < least and monotonic() < deadline:
        sleep(0.001)
    at_rest()
    inside = gauges["global"].inside
    gate.set()
    for thread in crew:
        thread.join(PATIENCE)
    if inside < least:
        raise Broken(f"{inside} inside where {least} should be")
    for kind, gauge in gauges.items():
        limit = peer.limits[kind]
        if gauge.peak > limit and (kind != "global" or peer.layers > 1):
            raise Broken(f"{gauge.peak} of {kind} inside at a limit of {limit}")
    if gauges["global"].entries < len(crew):
        raise Broken(f"only {gauges['global'].entries} of {len(crew)} had their turn")


class Nested(Peer):
    name = "nested BoundedSemaphores"

    def build(self, limits: Mapping[str, int]) -> None:
        made = {name: threading.BoundedSemaphore(limit) for name, limit in limits.items()}
        self.taken = {kind: [made[name] for name in path] for kind, path in self.paths.items()}

    def run(self, kind: str, n: int, body: Body) -> None:
        first, second, *rest = self.taken[kind]
        if rest:
            (third,) = rest
            for _ in range(n):
                with first, second, third:
                    body()
        else:
            for _ in range(n):
                with first, second:
                    body()


class NestedGlobalFirst(Nested):
    name = "the same, the global one first"

    def build(self, limits: Mapping[str, int]) -> None:
        super().build(limits)
        self.taken = {kind: taken[::-1] for kind, taken in self.taken.items()}


class SemaphoreAndCounter(Peer):
    """What one writes to know how many run, which a semaphore does not tell."""

    name = "Semaphore with a counter"
    layers = 1

    def build(self, limits: Mapping[str, int]) -> None:
        self.semaphore, self.lock, self.running = threading.Semaphore(limits["tool"]), threading.Lock(), 0

    def run(self, kind: str, n: int, body: Body) -> None:
        semaphore, lock = self.semaphore, self.lock
        for _ in range(n):
            with semaphore:
                with lock:
                    self.running += 1
                try:
                    body()
                finally:
                    with lock:
                        self.running -= 1


class TokenPools(Peer):
    name = "SimpleQueues as token pools"

    def build(self, limits: Mapping[str, int]) -> None:
        made: dict[str, SimpleQueue[object]] = {name: SimpleQueue() for name in limits}
        for name, pool in made.items():
            for token in range(limits[name]):
                pool.put(token)
        self.pools = {kind: [made[name] for name in path] for kind, path in self.paths.items()}

    def run(self, kind: str, n: int, body: Body) -> None:
        first, second, *rest = self.pools[kind]
        if rest:
            for _ in range(n):
                token = first.get()
                try:
                    self._run_two(second, rest[0], body)
                finally:
                    first.put(token)
        else:
            for _ in range(n):
                self._run_two(first, second, body)

    @staticmethod
    def _run_two(first: SimpleQueue[object], second: SimpleQueue[object], body: Body) -> None:
        token = first.get()
        try:
            other = second.get()
            try:
                body()
            finally:
                second.put(other)
        finally:
            first.put(token)


class ResourceSemaphores(Peer):
    name = "resource-semaphore"
    package = "resource-semaphore"

    def build(self, limits: Mapping[str, int]) -> None:
        from resource_semaphore import ResourceSemaphore

        self.semaphore = ResourceSemaphore(limits)
        self.demands = {kind: dict.fromkeys(path, 1) for kind, path in self.paths.items()}

    def run(self, kind: str, n: int, body: Body) -> None:
        # Its context manager does the same with a generator more.
        acquire, release, demand = self.semaphore.acquire, self.semaphore.release, self.demands[kind]
        for _ in range(n):
            ticket = acquire(demand)
            try:
                body()
            finally:
                release(ticket)


class PyresilienceBulkheads(Peer):
    """A decorator for each layer, one around the other."""

    name = "pyresilience, nested bulkheads"
    package = "pyresilience"

    def build(self, limits: Mapping[str, int]) -> None:
        from pyresilience import BulkheadConfig, resilient

        guards = {
            name: resilient(bulkhead=BulkheadConfig(max_concurrent=limit, max_wait=PATIENCE))
            for name, limit in limits.items()
        }

        def call(body: Body) -> object:
            return body()

        # One bulkhead for each decorated function: the layers that kinds share are shared functions.
        everything = guards["global"](call)
        tool = guards["tool"](lambda body: everything(body))
        self.guarded: dict[str, Callable[[Body], object]] = {
            "tool": tool,
            "stream": guards["stream"](lambda body: everything(body)),
        }
        for agent in self.agents:
            self.guarded[agent] = guards[agent](lambda body: tool(body))

    def run(self, kind: str, n: int, body: Body) -> None:
        guarded = self.guarded[kind]
        for _ in range(n):
            guarded(body)


class BulkmanBulkhead(Peer):
    """A pool of threads of its own: the caller waits for its job."""

    name = "bulkman, a pool of its own"
    package = "bulkman"
    layers = 1
    slow = True

    def build(self, limits: Mapping[str, int]) -> None:
        from bulkman import BulkheadConfig, BulkheadThreading

        config = BulkheadConfig("tools", max_concurrent_calls=limits["tool"], max_queue_size=1_000_000)
        self.bulkhead = BulkheadThreading(config)

    def run(self, kind: str, n: int, body: Body) -> None:
        execute = self.bulkhead.execute
        for _ in range(n):
            done = execute(body).result()
            if not done.success:
                raise Broken(str(done.error))

    def close(self) -> None:
        self.bulkhead.shutdown()


class CapacityLimiters(Peer):
    """Limiters on an event loop, asked from other threads: one trip to the loop for all layers."""

    name = "anyio.CapacityLimiters, from threads"
    package = "anyio"
    slow = True

    def build(self, limits: Mapping[str, int]) -> None:
        from anyio import CapacityLimiter
        from anyio.from_thread import start_blocking_portal

        self.context = start_blocking_portal()
        self.portal: Any = self.context.__enter__()

        async def make() -> dict[str, CapacityLimiter]:
            return {name: CapacityLimiter(limit) for name, limit in limits.items()}

        made = self.portal.call(make)
        self.limiters = {kind: [made[name] for name in path] for kind, path in self.paths.items()}

    def run(self, kind: str, n: int, body: Body) -> None:
        call, limiters = self.portal.call, self.limiters[kind]

        async def take(borrower: object) -> None:
            for limiter in limiters:
                await limiter.acquire_on_behalf_of(borrower)

        def give_back(borrower: object) -> None:
            for limiter in reversed(limiters):
                limiter.release_on_behalf_of(borrower)

        for _ in range(n):
            borrower = object()
            call(take, borrower)
            try:
                body()
            finally:
                call(give_back, borrower)

    def close(self) -> None:
        self.context.__exit__(None, None, None)


class Governed(Peer):
    name = "governor"

    def build(self, limits: Mapping[str, int]) -> None:
        self.governor = ConcurrencyGovernor(limits["stream"], limits["tool"], limits["global"])
        self.acquire = {"tool": self.governor.acquire_tool, "stream": self.governor.acquire_stream}
        for agent in self.agents:
            self.acquire[agent] = self.governor.agent(agent, max_tools=limits[agent]).acquire_tool

    def run(self, kind: str, n: int, body: Body) -> None:
        acquire = self.acquire[kind]
        for _ in range(n):
            with acquire():
                body()

    def check(self) -> None:
        super().check()
        stats = self.governor.stats()
        if stats.global_in_use or stats.tools_waiting or stats.streams_waiting:
            raise Broken(f"the books are wrong: {stats}")


class GovernedWithListener(Governed):
    name = "governor, with a listener"

    def build(self, limits: Mapping[str, int]) -> None:
        super().build(limits)
        self.governor.subscribe(_listen)


def _listen(event: GovernorEvent) -> None:
    pass


class Floor(Peer):
    """What no limit can go below: going in and out by one lock, and an object between. Bounds nothing."""

    name = "the floor: a lock and an object"

    def build(self, limits: Mapping[str, int]) -> None:
        self.lock = threading.Lock()

    def run(self, kind: str, n: int, body: Body) -> None:
        lock = self.lock
        for _ in range(n):
            with lock:
                permit = object()
            body()
            with lock:
                del permit

    def check(self) -> None:
        pass


# Those that hold a place for the length of a block, or of a call. The first is what all are held to.
PEERS: tuple[type[Peer], ...] = (
    Nested, Governed, SemaphoreAndCounter, TokenPools, ResourceSemaphores, PyresilienceBulkheads,
    BulkmanBulkhead, CapacityLimiters,
)  # fmt: skip


def left_out(peers: tuple[type[Peer], ...] = PEERS, layers: int = 1) -> dict[str, str]:
    """Return which of them cannot take part where so many layers are needed, and why."""
    reasons = {}
    for peer in peers:
        if peer.package is not None and installed(peer.package) is None:
            reasons[peer.name] = "not installed"
        elif peer.layers < layers:
            reasons[peer.name] = f"cannot: holds {peer.layers} of {layers} layers"
    return reasons | NO_BLOCKS
