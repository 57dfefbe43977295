"""The core against what one would use in its place: two nested semaphores."""

from __future__ import annotations

import gc
import statistics
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from benchmarks._measure import Row, crowd, interleaved, rows
from governor import ConcurrencyGovernor, GovernorEvent
from governor._tree import Holder, nothing


def uncontended() -> list[Row]:
    """One thread, room for all."""
    gov = ConcurrencyGovernor(max_streams=4, max_tools=8, max_global=16)
    agent = gov.agent("agent", max_tools=4)
    own, tools, everything = (threading.BoundedSemaphore(n) for n in (4, 8, 16))

    def two_nested(n: int) -> None:
        for _ in range(n):
            with tools, everything:
                pass

    def governor(n: int) -> None:
        for _ in range(n):
            with gov.acquire_tool():
                pass

    def three_nested(n: int) -> None:
        for _ in range(n):
            with own, tools, everything:
                pass

    def an_agent(n: int) -> None:
        for _ in range(n):
            with agent.acquire_tool():
                pass

    found = interleaved(
        "uncontended, against two nested semaphores",
        {
            "two nested BoundedSemaphores": two_nested,
            "governor": governor,
        },
        operations=20_000,
    )
    found += interleaved(
        "uncontended, against three nested semaphores",
        {"three nested BoundedSemaphores": three_nested, "an agent under a governor": an_agent},
        operations=20_000,
    )
    gov.subscribe(_listen)
    return found + interleaved(
        "uncontended, with a listener",
        {"two nested BoundedSemaphores": two_nested, "governor": governor},
        operations=20_000,
    )


def _listen(event: GovernorEvent) -> None:
    pass


def contended() -> list[Row]:
    """32 threads on 2 permits, each holding one for a millisecond of input or output."""
    gov = ConcurrencyGovernor(max_streams=2, max_tools=2, max_global=4)
    tools, everything = threading.BoundedSemaphore(2), threading.BoundedSemaphore(4)

    def nested() -> None:
        with tools, everything:
            time.sleep(0.001)

    def governed() -> None:
        with gov.acquire_tool():
            time.sleep(0.001)

    contenders: dict[str, Callable[[], None]] = {"two nested BoundedSemaphores": nested, "governor": governed}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    fairness: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(5):
        for name, use in contenders.items():
            throughput, fair = crowd(32, 100 if name == "governor" else 1_000, use)
            seconds[name].append(1 / throughput)
            fairness[name].append(fair)
    found = rows("32 threads on 2 permits", seconds)
    for row in found:
        row.notes = {
            "throughput ratio": 1 / row.ratio,
            "unluckiest/luckiest": statistics.median(fairness[row.contender]),
        }
    return found


def grants() -> list[Row]:
    """What one hand-over costs, by how many agents and waiters there are."""
    return [
        *_grants("a grant, agents", [(10, 500), (500, 1_000)]),
        *_grants("a grant, waiters of one kind", [(0, 50), (0, 5_000)]),
    ]


def _grants(scenario: str, sizes: list[tuple[int, int]], measured: int = 40, rounds: int = 7) -> list[Row]:
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for agents, waiters in sizes:
            name = f"{waiters:,} waiters" + (f" of {agents} agents" if agents else "")
            times.setdefault(name, []).append(_grant(agents, waiters, measured))
    return rows(scenario, times)


def _grant(agents: int, waiters: int, measured: int) -> float:
    """Seconds that a release takes which hands its place on to one of the waiters.

    The waiters stand in line as threads do, on the governor's own books, but nobody sleeps behind
    their gates: five thousand threads would measure the operating system.
    """
    gov = ConcurrencyGovernor(max_streams=1, max_tools=100_000, max_global=1)
    crew = [gov.agent(f"agent {n}", max_tools=1) for n in range(agents)] or [gov]
    first = gov.acquire_tool()
    tree = gov._global.tree
    line = []
    for n in range(waiters):
        source = crew[n % len(crew)]
        line.append(_stand_in_line(source))
    took = []
    first.release()
    for ticket in line[:measured]:
        if ticket.state != "held":
            raise AssertionError("the oldest was not served first")
        began = time.perf_counter()
        tree.give_back(ticket)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _stand_in_line(gov: ConcurrencyGovernor) -> Any:
    leaf = gov._tools
    hold = Holder(leaf, gov)
    hold.__del__ = nothing
    ticket = hold._ticket
    ticket.gate = threading.Lock()
    ticket.gate.acquire()
    ticket.waiter = None
    leaf.tree.stand(ticket)
    return ticket


def memory() -> list[Row]:
    """Bytes that a waiting thread (its stack apart) and an agent take."""
    found = []
    gov = ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=1)
    held = gov.acquire_tool()
    for name, make in (
        ("a waiter", lambda n: [_stand_in_line(gov) for _ in range(n)]),
        ("an agent", lambda n: [gov.agent(f"agent {i}", max_tools=1) for i in range(n)]),
    ):
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        kept = make(1_000)
        size = (tracemalloc.get_traced_memory()[0] - before) / 1_000
        tracemalloc.stop()
        found.append(Row("memory", name, 0.0, 1.0, (1.0, 1.0), {"bytes": size}))
        del kept
    held.release()
    return found


SCENARIOS: dict[str, Callable[[], list[Row]]] = {
    "uncontended": uncontended,
    "contended": contended,
    "grants": grants,
    "memory": memory,
}
