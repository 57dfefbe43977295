"""Random nesting of permits on many threads: no circle stands, and no alarm is false.

Each alarm is held against another search: one that lets whoever can go on do so and give back what
it has, by the tests' own account of who is inside what, while the books are locked.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from threads import Crew

import governor
from governor import AcquireTimeout, ConcurrencyGovernor, DeadlockError, GovernedExecutor, _tree
from governor._tree import Node, Ticket, path

pytestmark = pytest.mark.every_governor

THREADS, TURNS = 8, 150


class Account:
    """Who is inside what, as told by the threads themselves."""

    def __init__(self) -> None:
        self.inside: dict[int, list[Ticket]] = defaultdict(list)
        self.alarms = 0
        self.false: list[str] = []

    @contextmanager
    def of(self, *tickets: Ticket) -> Iterator[None]:
        mine = self.inside[threading.get_ident()]
        mine.extend(tickets)
        try:
            yield
        finally:
            del mine[-len(tickets) :]

    def check(self, asking: int, leaf: Node) -> None:
        """Note it if the thread that asks could go on after all."""
        self.alarms += 1
        tree = leaf.tree
        wants = {it.waiter: it.leaf for it in tree.line.values() if it.waiter is not None}
        wants[asking] = leaf
        held = {id(it): it for it in tree.held.values()}
        kept = {thread: [it for it in self.inside[thread] if id(it) in held] for thread in wants}
        going = True
        while going:  # who can have all it wants ends, and its permits are anyone's
            used: dict[Any, int] = defaultdict(int)
            for tickets in kept.values():
                for ticket in tickets:
                    for node in path(ticket.leaf):
                        used[node] += 1
            going = False
            for thread in list(kept):
                if all(used[node] < node.limit for node in path(wants[thread])):
                    del kept[thread]
                    going = True
        if asking not in kept:
            self.false.append(f"{asking} could go on: {tree.line} {tree.held}")


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Account:
    account, find, look = Account(), _tree._find_circle, threading.local()

    def find_and_check(me: int, waits: dict[int, Node], owned: list[Ticket]) -> list[int] | None:
        found = find(me, waits, owned)
        if getattr(look, "second", False) and found:  # the first look only suspects
            account.check(me, waits[me])
        look.second = bool(found) and not getattr(look, "second", False)
        return found

    monkeypatch.setattr(_tree, "_find_circle", find_and_check)
    return account


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(4))
def test_nobody_hangs_and_no_alarm_is_false(account: Account, seed: int) -> None:
    gov = ConcurrencyGovernor(max_streams=2, max_tools=3, max_global=4)
    agents = [gov.agent(name, max_tools=2, max_streams=1) for name in ("coder", "critic")]
    crowd = [gov, *agents, agents[0].agent("helper", max_tools=1)]
    ended = [0] * THREADS

    def nest(chance: random.Random, depth: int) -> None:
        kind = chance.choice(("stream", "tool"))
        timeout = chance.choice((None, None, None, 0.001))
        with chance.choice(crowd).acquire(kind, timeout) as permit, account.of(permit._ticket):
            way = chance.random()
            if not depth:
                return
            if way < 0.5:
                nest(chance, depth - 1)
            elif way < 0.7:
                with permit.suspended():
                    nest(chance, depth - 1)
            elif way < 0.85:
                with governor.suspended():
                    nest(chance, depth - 1)
            else:
                with governor.suspended():
                    pool.submit(job, chance.random(), depth - 1).result(20)

    def job(seed: float, depth: int) -> None:
        me = threading.get_ident()
        mine = [it for it in list(gov._global.tree.held.values()) if it.owner == me]
        with account.of(*mine):
            nest(random.Random(seed), depth)

    def work(number: int) -> None:
        chance = random.Random(seed * 1_000 + number)
        for _ in range(TURNS):
            try:
                nest(chance, 3)
            except (DeadlockError, AcquireTimeout):
                pass
            ended[number] += 1

    # As many workers as can ever be asked for: a job in the queue would hide who waits for whom.
    with GovernedExecutor(gov, ThreadPoolExecutor(64)) as pool:
        with Crew(patience=45) as crew:
            for number in range(THREADS):
                crew.start(work, number)
        assert ended == [TURNS] * THREADS
    assert account.alarms > 10
    assert not account.false, account.false[0]
    stats = gov.stats()
    assert (stats.global_in_use, stats.streams_waiting, stats.tools_waiting) == (0, 0, 0)
