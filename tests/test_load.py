"""Exactness under load: what is counted inside the protected code never passes a limit, and all comes back.

Every test is bounded by counts, never by time, and runs once with the interpreter's usual switch
interval and once with one so short that threads change places all the time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from random import Random
from time import sleep

import pytest
from threads import Crew, Gauge, until

from governor import AcquireTimeout, ConcurrencyGovernor, ConcurrencyPermit, Layer

pytestmark = [pytest.mark.every_governor, pytest.mark.usefixtures("switching")]

THREADS = 64


class Office:
    """A governor, an agent, an agent of that agent, and a gauge for every limit that they have."""

    def __init__(self, streams: int = 3, tools: int = 4, everything: int = 5) -> None:
        self.gov = ConcurrencyGovernor(streams, tools, everything)
        coder = self.gov.agent("coder", max_tools=3)
        tester = coder.agent("tester", max_tools=2, max_streams=1)
        self.limits = {
            "global": everything,
            "streams": streams,
            "tools": tools,
            "coder's tools": 3,
            "tester's tools": 2,
            "tester's streams": 1,
        }
        self.gauges = {name: Gauge() for name in self.limits}
        # Who asks for what, and which gauges show it.
        self.desks = [
            (self.gov, "stream", ["global", "streams"]),
            (self.gov, "tool", ["global", "tools"]),
            (coder, "stream", ["global", "streams"]),
            (coder, "tool", ["global", "tools", "coder's tools"]),
            (tester, "stream", ["global", "streams", "tester's streams"]),
            (tester, "tool", ["global", "tools", "coder's tools", "tester's tools"]),
        ]

    @contextmanager
    def seen(self, names: list[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self.gauges[name])
            sleep(0)  # lets others in, if anything does
            yield

    def peaks(self) -> dict[str, int]:
        return {name: gauge.peak for name, gauge in self.gauges.items()}

    def assert_no_limit_was_passed(self) -> None:
        passed = {name: peak for name, peak in self.peaks().items() if peak > self.limits[name]}
        assert not passed

    def assert_all_is_back(self) -> None:
        for governor, _, _ in self.desks:
            stats = governor.stats()
            assert (stats.streams_in_use, stats.tools_in_use, stats.global_in_use) == (0, 0, 0)
            assert (stats.streams_waiting, stats.tools_waiting) == (0, 0)
        assert self.gov.drain(timeout=0)


def waiting(gov: ConcurrencyGovernor) -> int:
    stats = gov.stats()
    return stats.streams_waiting + stats.tools_waiting


def test_no_limit_is_ever_passed() -> None:
    office, together = Office(), threading.Barrier(THREADS)

    def work(number: int) -> None:
        governor, kind, names = office.desks[number % len(office.desks)]
        together.wait()
        for _ in range(30):
            with governor.acquire(kind), office.seen(names):
                pass

    with Crew() as crew:
        for number in range(THREADS):
            crew.start(work, number)
    assert office.gauges["global"].entries == THREADS * 30
    office.assert_no_limit_was_passed()
    office.assert_all_is_back()


def test_no_limit_is_ever_passed_by_those_who_only_try() -> None:
    """Without a line the short way in is taken, where a look and a step apart would let in two."""
    office, together = Office(), threading.Barrier(THREADS)

    def work(number: int) -> None:
        together.wait()
        for turn in range(120):
            governor, kind, names = office.desks[(number + turn) % len(office.desks)]
            if permit := governor.try_acquire(kind):
                with permit, office.seen(names):
                    pass

    with Crew() as crew:
        for number in range(THREADS):
            crew.start(work, number)
    assert office.gauges["global"].entries > 0
    office.assert_no_limit_was_passed()
    office.assert_all_is_back()


def test_every_limit_is_made_full_use_of() -> None:
    office, leave = Office(), threading.Event()

    def work(number: int) -> None:
        governor, kind, names = office.desks[number % len(office.desks)]
        with governor.acquire(kind), office.seen(names):
            leave.wait()

    with Crew() as crew:
        for number in range(THREADS):
            crew.start(work, number)
        until(lambda: office.gauges["global"].inside == 5, "five inside")
        until(lambda: waiting(office.gov) == THREADS - 5, "all others in line")
        leave.set()
    assert office.peaks()["global"] == 5
    office.assert_no_limit_was_passed()
    office.assert_all_is_back()


def test_a_layer_alone_keeps_its_limit() -> None:
    layer, gauge = Layer(3), Gauge()

    def work() -> None:
        for _ in range(40):
            with layer, gauge:
                pass

    with Crew() as crew:
        for _ in range(THREADS):
            crew.start(work)
    assert gauge.entries == THREADS * 40
    assert gauge.peak <= 3
    assert (layer.in_use, layer.waiting, layer.available) == (0, 0, 3)


def test_timeouts_at_random_lose_nothing_and_leave_no_ghosts() -> None:
    office, timed_out = Office(), Gauge()

    def work(number: int) -> None:
        random = Random(number)
        governor, kind, names = office.desks[number % len(office.desks)]
        for _ in range(40):
            timeout = random.choice([0, 1e-9, 1e-4, 1e-3, 60])
            try:
                with governor.acquire(kind, timeout), office.seen(names):
                    pass
            except AcquireTimeout:
                with timed_out:
                    pass

    with Crew() as crew, ExitStack() as all_places:
        for kind in ("tool", "tool", "tool", "stream", "stream"):
            all_places.enter_context(office.gov.acquire(kind))
        for number in range(THREADS):
            crew.start(work, number)
        until(lambda: timed_out.entries > THREADS, "many to run out of time")
    assert timed_out.entries + office.gauges["global"].entries == THREADS * 40
    office.assert_no_limit_was_passed()
    office.assert_all_is_back()


def test_a_mix_of_everything_keeps_every_limit() -> None:
    """Tries, waits, suspensions, early and late releases, and releases by another thread."""
    office, given_away = Office(), SimpleQueue[ConcurrencyPermit | None]()

    def give_back_what_others_took() -> None:
        while (permit := given_away.get()) is not None:
            permit.release()

    def work(number: int) -> None:
        random = Random(number)
        for _ in range(40):
            governor, kind, names = random.choice(office.desks)
            permit = governor.try_acquire(kind) if random.random() < 0.3 else governor.acquire(kind)
            if permit is None:
                continue
            match random.randrange(4):
                case 0:
                    with office.seen(names):
                        pass
                    given_away.put(permit)
                case 1:
                    with permit, office.seen(names):
                        pass
                case 2:
                    with permit:
                        with office.seen(names):
                            pass
                        permit.release()
                case 3:
                    with permit:
                        with office.seen(names):
                            pass
                        with permit.suspended(), governor.acquire(kind), office.seen(names):
                            pass
                        with office.seen(names):
                            pass

    with Crew() as givers:
        for _ in range(2):
            givers.start(give_back_what_others_took)
        with Crew() as crew:
            for number in range(THREADS):
                crew.start(work, number)
        for _ in range(2):
            given_away.put(None)
    office.assert_no_limit_was_passed()
    office.assert_all_is_back()


def test_a_storm_of_resizes_ends_with_all_served_and_all_back() -> None:
    office = Office()
    coder = office.desks[3][0]
    office.limits |= {"global": 6, "streams": 4, "tools": 5, "coder's tools": 4}  # the storm's highest
    workers: list[threading.Thread] = []

    def work(number: int) -> None:
        governor, kind, names = office.desks[number % len(office.desks)]
        for _ in range(20):
            with governor.acquire(kind), office.seen(names):
                pass

    def resize(number: int) -> None:
        random = Random(number)
        while any(worker.is_alive() for worker in workers):
            office.gov.resize(max_streams=random.randint(0, 4))
            office.gov.resize(max_tools=random.randint(0, 5), max_global=random.randint(0, 6))
            coder.resize(max_tools=random.randint(0, 4))

    with Crew() as crew:
        workers += [crew.start(work, number) for number in range(THREADS)]
        for number in range(2):
            crew.start(resize, number)
    assert office.gauges["global"].entries == THREADS * 20
    office.assert_no_limit_was_passed()
    office.assert_all_is_back()


def test_a_limit_lowered_under_load_holds_as_soon_as_it_is_reached() -> None:
    gov, gauge, stop = ConcurrencyGovernor(9, 9, 9), Gauge(), threading.Event()

    def work(number: int) -> None:
        while not stop.is_set():
            with gov.acquire("tool" if number % 2 else "stream"), gauge:
                pass

    with Crew() as crew:
        for number in range(THREADS):
            crew.start(work, number)
        for limit in (9, 1, 4, 2, 7, 3, 1, 5):
            gov.resize(max_global=limit)
            until(lambda limit=limit: gov.stats().global_in_use <= limit, f"no more than {limit} inside")
            gauge.new_peak()
            then = gauge.entries
            until(lambda then=then: gauge.entries > then + 100, "a hundred turns")
            assert gauge.peak <= limit
        stop.set()


def test_a_paused_governor_lets_nobody_in() -> None:
    gov, gauge, stop = ConcurrencyGovernor(4, 4, 4), Gauge(), threading.Event()

    def work(number: int) -> None:
        while not stop.is_set():
            with gov.acquire("tool" if number % 2 else "stream"), gauge:
                pass

    with Crew() as crew:
        for number in range(THREADS):
            crew.start(work, number)
        for _ in range(5):
            gov.resize(max_global=0)
            until(lambda: waiting(gov) == THREADS, "all in line")
            assert (gauge.inside, gov.stats().global_in_use) == (0, 0)
            then = gauge.entries
            gov.resize(max_global=4)
            until(lambda then=then: gauge.entries > then + 50, "fifty turns")
        stop.set()


def test_every_snapshot_balances_under_load() -> None:
    """No one is ever seen half in: what is in use above is what is in use below."""
    office, done = Office(), threading.Event()

    def work(number: int) -> None:
        governor, kind, names = office.desks[number % len(office.desks)]
        while not done.is_set():
            with governor.acquire(kind), office.seen(names):
                pass

    def look() -> None:
        busy = 0
        try:
            while busy < 200 and not done.is_set():
                stats = office.gov.stats()
                assert stats.streams_in_use + stats.tools_in_use == stats.global_in_use
                assert stats.global_available == 5 - stats.global_in_use >= 0
                assert stats.streams_available == 3 - stats.streams_in_use >= 0
                assert stats.tools_available == 4 - stats.tools_in_use >= 0
                busy += stats.global_in_use > 0
        finally:
            done.set()

    with Crew() as crew:
        for number in range(THREADS):
            crew.start(work, number)
        for _ in range(2):
            crew.start(look)
    office.assert_all_is_back()


def test_nobody_starves_while_others_come_again_and_again() -> None:
    gov = ConcurrencyGovernor(2, 2, 2)
    turns, enough = [0] * 32, threading.Event()

    def work(number: int) -> None:
        while not enough.is_set():
            with gov.acquire_tool():
                turns[number] += 1
                if turns[number] == 100:
                    enough.set()

    with Crew() as crew, gov.acquire_tool(), gov.acquire_tool():
        for number in range(32):
            crew.start(work, number)
        until(lambda: gov.stats().tools_waiting == 32, "all in line")
    # A busy machine may keep a thread from coming back in line; semaphores give some one turn, or none.
    assert min(turns) >= 10
