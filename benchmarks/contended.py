"""Threads that compete: for the same limit, or with a burst of the other kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from benchmarks._measure import (
    PATIENCE,
    Broken,
    Contender,
    Effort,
    Figures,
    Gauge,
    Row,
    absent,
    interleaved,
    rank,
)
from benchmarks._peers import PEERS, Floor, Nested, NestedGlobalFirst, Peer, left_out

__all__ = ["SECONDS", "burst", "contended"]

PERMITS = 2
SECONDS = {2: 0.15, 8: 0.15, 32: 0.4, 128: 0.64}  # by the number of threads, so that each has several turns


def contended(effort: Effort) -> list[Row]:
    """Threads on 2 permits, each held for a millisecond of input or output, or for a tenth of one."""
    found = []
    for threads, held in ((2, 0.001), (8, 0.001), (32, 0.001), (32, 0.0001), (128, 0.001)):
        case = f"{threads} threads, {PERMITS} permits, held {held * 1_000:g} ms"
        missing = left_out()
        peers: list[Peer] = [
            peer(PERMITS, PERMITS, 2 * PERMITS) for peer in (*PEERS, Floor) if peer.name not in missing
        ]
        seconds = 0.02 if effort.quick else SECONDS[threads]
        contenders = {
            it.name: Contender(
                # The floor bounds nobody, so there are no more threads than permits.
                partial(_compete, it, PERMITS if isinstance(it, Floor) else threads, held, seconds),
                it.check,
                it.remark(2),
            )
            for it in peers
        }
        found += interleaved(
            "contended",
            case,
            contenders,
            rounds=effort.rounds(3),
            floor=Floor.name,
            warms=False,
            weighs=threads < 100,
        )
        found += absent("contended", case, missing)
        for it in peers:
            it.close()
    return found


def _compete(peer: Peer, threads: int, held: float, seconds: float) -> Figures:
    counts = [0] * threads
    gauge, over = Gauge(), threading.Event()
    began = threading.Barrier(threads + 1)

    def body() -> None:
        with gauge:
            time.sleep(held)

    def work(me: int) -> None:
        began.wait()
        while not over.is_set():
            peer.run("tool", 1, body)
            counts[me] += 1

    crew = _start([partial(work, me) for me in range(threads)])
    began.wait()
    at = time.perf_counter()
    time.sleep(seconds)
    while not any(counts) and time.perf_counter() - at < PATIENCE:
        time.sleep(0.01)
    counted, took = list(counts), time.perf_counter() - at
    over.set()
    _join(crew)
    if gauge.peak > PERMITS or gauge.entries != sum(counts):
        raise Broken(f"{gauge.peak} inside at a limit of {PERMITS}, {gauge.entries} turns of {sum(counts)}")
    if not sum(counted):
        raise Broken("nobody had a turn")
    turns = [float(it) for it in sorted(counted)]
    return Figures(took / sum(counted), fairness=turns[0] / turns[-1], samples=turns)


TOOLS, TURNS = 64, 5


def burst(effort: Effort) -> list[Row]:
    """64 threads want tools at once, and streams go on arriving: how long does a stream wait?

    Of 10 operations in all, 8 may be tools. Two streams at a time find room beside them; of four, two
    have to compete with the tools for it.
    """
    found = []
    for streams in (2, 4):
        case = f"{streams} threads with streams, {TOOLS} with tools"
        missing = left_out((*PEERS, NestedGlobalFirst), layers=2)
        everyone = (Nested, NestedGlobalFirst, *PEERS[1:])
        peers: list[Peer] = [peer(4, 8, 10) for peer in everyone if peer.name not in missing]
        contenders = {it.name: Contender(partial(_burst, it, streams), it.check) for it in peers}
        found += interleaved("burst", case, contenders, rounds=effort.rounds(5), warms=False)
        found += absent("burst", case, missing)
        for it in peers:
            it.close()
    return found


def _burst(peer: Peer, streams: int) -> Figures:
    gauges = {"stream": Gauge(), "tool": Gauge(), "global": Gauge()}
    waits: list[float] = []
    over = threading.Event()
    began = threading.Barrier(TOOLS + streams + 1)

    def tool() -> None:
        with gauges["tool"], gauges["global"]:
            time.sleep(0.002)

    def work() -> None:
        began.wait()
        peer.run("tool", TURNS, tool)

    def arrive() -> None:
        began.wait()
        while not over.is_set():
            asked = time.perf_counter()

            def stream(asked: float = asked) -> None:
                waits.append((time.perf_counter() - asked) * 1_000)
                with gauges["stream"], gauges["global"]:
                    time.sleep(0.002)

            peer.run("stream", 1, stream)
            time.sleep(0.002)

    readers = _start([arrive] * streams)
    crew = _start([work] * TOOLS)
    began.wait()
    at = time.perf_counter()
    _join(crew)
    took = time.perf_counter() - at
    over.set()
    _join(readers)
    for kind, gauge in gauges.items():
        if gauge.peak > peer.limits[kind]:
            raise Broken(f"{gauge.peak} of {kind} inside at a limit of {peer.limits[kind]}")
    if gauges["tool"].entries != TOOLS * TURNS or gauges["stream"].entries != len(waits) or not waits:
        raise Broken(
            f"{gauges['tool'].entries} tools ran, {gauges['stream'].entries} streams of {len(waits)}"
        )
    notes = {"median wait, ms": rank(waits, 0.5), "95 %, ms": rank(waits, 0.95), "longest, ms": max(waits)}
    return Figures(took / (TOOLS * TURNS), notes=notes, samples=[round(it, 3) for it in sorted(waits)])


def _start(work: list[Callable[[], None]]) -> list[threading.Thread]:
    crew = [threading.Thread(target=it, daemon=True) for it in work]
    for thread in crew:
        thread.start()
    return crew


def _join(crew: list[threading.Thread]) -> None:
    deadline = time.monotonic() + PATIENCE
    for thread in crew:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            raise Broken(f"a thread still waits after {PATIENCE:g} s")
