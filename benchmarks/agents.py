"""What a turn and a grant cost by how many agents there are."""

from __future__ import annotations

import itertools
import time
from functools import partial

from benchmarks._measure import (
    PATIENCE,
    Broken,
    Contender,
    Effort,
    Figures,
    Row,
    absent,
    interleaved,
    loop,
    nothing,
)
from benchmarks._peers import PEERS, Peer, left_out
from governor import ConcurrencyGovernor

__all__ = ["agents"]

SIZES = (10, 100, 1_000, 10_000)


def agents(effort: Effort) -> list[Row]:
    """Turns of one agent after the other, and grants to one agent's waiter after the other's."""
    found = []
    sizes = SIZES[: effort.of(4, 2)]
    for size in sizes:
        case = f"a turn, {size:,} agents"
        missing = left_out(layers=3)
        peers: list[Peer] = [
            peer(4, 8, 16, agents=size, each=4) for peer in PEERS if peer.name not in missing
        ]
        contenders = {
            it.name: Contender(
                loop(partial(_turns, it), effort.of(max(size, 3_000), 200) // (40 if it.slow else 1)),
                it.check,
            )
            for it in peers
        }
        found += interleaved("agents", case, contenders, rounds=effort.rounds(4))
        found += absent("agents", case, missing)
        for it in peers:
            it.close()
    waiters = effort.of(10_000, 1_000)
    many = {f"{size:,} agents": Contender(partial(_grants, size, waiters), _no_check) for size in sizes}
    found += interleaved("agents", "a grant, 10,000 waiting requests", many, rounds=effort.rounds(3))
    long = {
        f"{waiters:,} waiting requests": Contender(partial(_grants, 1, waiters), _no_check)
        for waiters in (500, 5_000)
    }
    return found + interleaved("agents", "a grant, one agent", long, rounds=effort.rounds(7))


def _turns(peer: Peer, n: int) -> None:
    run = peer.run
    for agent in itertools.islice(itertools.cycle(peer.agents), n):
        run(agent, 1, nothing)


def _no_check() -> None:
    """The round itself has checked all."""


def _grants(size: int, waiters: int) -> Figures:
    gov = ConcurrencyGovernor(max_streams=1, max_tools=waiters, max_global=1)
    crew = [gov.agent(f"agent {n}", max_tools=waiters) for n in range(size)]
    first = gov.acquire_tool()
    line = [crew[n % size].request_tool() for n in range(waiters)]
    measured = line[:200]
    began = time.perf_counter()
    first.release()
    for request in measured:
        request.result(PATIENCE).release()
    took = time.perf_counter() - began
    if gov.stats().tools_waiting != waiters - len(measured) - 1:
        raise Broken(f"{gov.stats().tools_waiting} of {waiters} wait after {len(measured)} grants")
    gov.close()
    line[len(measured)].result(PATIENCE).release()
    return Figures(took / len(measured))
