"""What it costs to wait: a hand-over, the time until the woken thread runs, the memory of a waiter."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from functools import partial
from typing import Any

from benchmarks._measure import (
    PATIENCE,
    Broken,
    Contender,
    Effort,
    Figures,
    Row,
    absent,
    at_rest,
    interleaved,
    rank,
)
from benchmarks._peers import NO_BLOCKS, PEERS, Peer, left_out
from governor import ConcurrencyGovernor

__all__ = ["grants", "latency", "memory"]


def grants(effort: Effort) -> list[Row]:
    """One permit goes from waiter to waiter: what is one grant, the change of threads included?"""
    found = []
    for waiters in (10, 20) if effort.quick else (10, 500, 5_000):
        case = f"{waiters:,} waiting threads"
        missing = left_out()
        peers: list[Peer] = [peer(1, 1, 1) for peer in PEERS if peer.name not in missing]
        contenders = {
            it.name: Contender(partial(_grants, it, waiters), it.check, it.remark(2)) for it in peers
        }
        contenders["governor, requests without threads"] = Contender(partial(_requests, waiters), _no_check)
        contenders[LOCKS] = Contender(partial(_chain, waiters), _no_check)
        few = waiters < 1_000
        rounds = 2 if effort.quick else 11 if waiters < 100 else 3 if few else 1
        found += interleaved("grants", case, contenders, rounds=rounds, floor=LOCKS, warms=few, weighs=few)
        found += absent("grants", case, missing)
        for it in peers:
            it.close()
    return found


LOCKS = "the floor: a lock for each waiter"


def _grants(peer: Peer, waiters: int) -> Figures:
    with Line(peer, waiters) as line:
        pass
    return Figures((max(line.ran) - line.released) / waiters)


def _requests(waiters: int) -> Figures:
    gov = ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=1)
    first = gov.acquire_tool()
    line = [gov.request_tool() for _ in range(waiters)]
    began = time.perf_counter()
    first.release()
    for request in line:
        request.result(PATIENCE).release()
    took = time.perf_counter() - began
    if gov.stats().global_in_use or gov.stats().tools_waiting:
        raise Broken("requests are left in line")
    return Figures(took / waiters)


def _chain(waiters: int) -> Figures:
    """Let each thread open the next one's lock."""
    gates = [threading.Lock() for _ in range(waiters)]
    ran: list[float] = []

    def wait(me: int) -> None:
        with gates[me]:
            ran.append(time.perf_counter())
        if me + 1 < waiters:
            gates[me + 1].release()

    for gate in gates:
        gate.acquire()
    crew = [threading.Thread(target=wait, args=(me,), daemon=True) for me in range(waiters)]
    _start(crew)
    at_rest()
    began = time.perf_counter()
    gates[0].release()
    for thread in crew:
        thread.join(PATIENCE)
    if len(ran) != waiters:
        raise Broken(f"{len(ran)} of {waiters} ran")
    return Figures((max(ran) - began) / waiters)


def _no_check() -> None:
    """The round itself has checked all."""


class Line:
    """Threads in line for the only permit, which is given back at the end of the block.

    Attributes:
        released: When that was.
        ran: When each of the threads had the permit.
    """

    def __init__(self, peer: Peer, waiters: int, *, traced: bool = False) -> None:
        self.released = 0.0
        self.ran: list[float] = []
        self.bytes = 0.0
        self._peer, self._waiters, self._traced = peer, waiters, traced
        self._held, self._free = threading.Event(), threading.Event()
        self._asking = threading.Barrier(waiters + 1)

    def __enter__(self) -> Line:
        holder = threading.Thread(target=self._peer.run, args=("tool", 1, self._hold), daemon=True)
        self._crew = [
            holder,
            *(threading.Thread(target=self._wait, daemon=True) for _ in range(self._waiters)),
        ]
        holder.start()
        if not self._held.wait(PATIENCE):
            raise Broken("the only permit is not to be had")
        _start(self._crew[1:])
        if self._traced:
            at_rest()
            gc.collect()
            tracemalloc.start()
            self._asking.wait(PATIENCE)
        at_rest()
        if self._traced:
            gc.collect()
            self.bytes = tracemalloc.get_traced_memory()[0] / self._waiters
            tracemalloc.stop()
        if self.ran:
            raise Broken(f"{len(self.ran)} had a permit that was not free")
        return self

    def __exit__(self, *_: object) -> None:
        self._free.set()
        deadline = time.monotonic() + PATIENCE
        for thread in self._crew:
            thread.join(max(0.0, deadline - time.monotonic()))
        if len(self.ran) != self._waiters:
            raise Broken(f"{len(self.ran)} of {self._waiters} had their turn")

    def _hold(self) -> None:
        self._held.set()
        self._free.wait()
        self.released = time.perf_counter()

    def _wait(self) -> None:
        if self._traced:
            self._asking.wait(PATIENCE)  # so that of the threads themselves nothing is counted
        self._peer.run("tool", 1, self._run)

    def _run(self) -> None:
        self.ran.append(time.perf_counter())


def _start(crew: list[threading.Thread]) -> None:
    usual = threading.stack_size(256 * 1024)  # five thousand of the usual ones would be 40 GB of addresses
    try:
        for thread in crew:
            thread.start()
    finally:
        threading.stack_size(usual)


def latency(effort: Effort) -> list[Row]:
    """One thread waits: how long from the release until it runs?"""
    missing = left_out()
    peers: list[Peer] = [peer(1, 1, 1) for peer in PEERS if peer.name not in missing]
    times = effort.of(15, 3)
    contenders = {it.name: Contender(partial(_latency, it, times), it.check, it.remark(2)) for it in peers}
    contenders["the floor: one lock"] = Contender(partial(_lock_latency, times), _no_check)
    found = interleaved(
        "latency", "release to run", contenders, rounds=effort.rounds(5), floor="the floor: one lock"
    )
    found += absent("latency", "release to run", missing)
    for it in peers:
        it.close()
    return found


def _latency(peer: Peer, times: int) -> Figures:
    took = []
    for _ in range(times):
        with Line(peer, 1) as line:
            pass
        took.append((line.ran[0] - line.released) * 1e6)
    return _summary(took)


def _lock_latency(times: int) -> Figures:
    took = []
    for _ in range(times):
        lock = threading.Lock()
        lock.acquire()
        ran: list[float] = []

        def wait(lock: Any = lock, ran: list[float] = ran) -> None:
            with lock:
                ran.append(time.perf_counter())

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        at_rest()
        released = time.perf_counter()
        lock.release()
        thread.join(PATIENCE)
        took.append((ran[0] - released) * 1e6)
    return _summary(took)


def _summary(took: list[float]) -> Figures:
    middle = rank(took, 0.5)
    return Figures(middle / 1e6, notes={"median, us": middle, "95 %, us": rank(took, 0.95)})


def memory(effort: Effort) -> list[Row]:
    """Bytes that a waiter takes beside its thread, and an agent."""
    waiters, agents = effort.of(1_000, 50), effort.of(1_000, 50)
    found = []
    for peer in PEERS:
        missing = left_out().get(peer.name)
        if missing:
            found.append(Row("memory", WAITER, peer.name, remark=missing))
            continue
        it = peer(1, 1, 1)
        with Line(it, waiters, traced=True) as line:
            pass
        found.append(Row("memory", WAITER, peer.name, notes={"bytes": line.bytes}, remark=it.remark(2)))
        it.close()
    for peer in PEERS:
        missing = left_out(layers=3).get(peer.name)
        if missing:
            found.append(Row("memory", AGENT, peer.name, remark=missing))
            continue
        size = (_bytes(peer, agents) - _bytes(peer, 0) - _bytes(Peer, agents)) / agents
        found.append(Row("memory", AGENT, peer.name, notes={"bytes": size}))
    return found + absent("memory", WAITER, NO_BLOCKS) + absent("memory", AGENT, NO_BLOCKS)


WAITER, AGENT = "a waiter", "an agent"


def _bytes(peer: type[Peer], agents: int) -> int:
    gc.collect()
    tracemalloc.start()
    it = peer(1, 1, 1, agents=agents)
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    it.close()
    return size
