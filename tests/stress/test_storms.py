"""Storms: real signals, whenever they come, while other threads are in the way."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from threads import Crew, is_idle, until

from governor import AcquireTimeout, ConcurrencyGovernor

if not hasattr(signal, "setitimer"):
    pytest.skip("this platform has no interval timers", allow_module_level=True)

# What an interrupt leaves held belongs to a permit that then goes out of scope.
pytestmark = [
    pytest.mark.every_governor(lease=3),  # what a fleet was not told of is found at a renewal
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.timeout(60),
]

INTERRUPTS = 4_000


class Interrupted(BaseException):
    """What the handler raises; like KeyboardInterrupt, no Exception."""


@pytest.fixture
def storm() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Interrupt a function that is called again and again: one signal at a time, at random."""
    chance = random.Random(7)
    armed = False

    def interrupt(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupted

    def rage(act: Callable[[], object]) -> None:
        nonlocal armed
        began = time.perf_counter()
        for _ in range(20):
            act()
        usual = max((time.perf_counter() - began) / 20, 2e-5)
        delivered, deadline = 0, time.monotonic() + 8
        while delivered < INTERRUPTS and time.monotonic() < deadline:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(5e-6, 1.5 * usual))
                for _ in range(200):  # a timer that came to nothing is set again
                    if not armed:
                        break
                    act()
            except Interrupted:
                delivered += 1
            finally:
                armed = False
        assert delivered >= 100, "hardly anything was interrupted"

    former = signal.signal(signal.SIGALRM, interrupt)
    yield rage
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


def is_whole(gov: ConcurrencyGovernor) -> None:
    """Nothing lost, nobody asleep, no lock left taken."""
    until(lambda: is_idle(gov), "all to be back")
    with Crew() as crew:  # another thread can take all there is
        crew.start(lambda: [gov.acquire_tool(timeout=5) for _ in range(gov.stats().tools_max)])
    until(lambda: is_idle(gov), "all to be back once more")


@pytest.mark.parametrize("whose", ["governor", "agent", "agent's agent"])
def test_blocks_without_contention(storm: Callable[[Callable[[], object]], None], whose: str) -> None:
    gov = ConcurrencyGovernor(2, 2, 3)
    agent = gov.agent("a", max_tools=2)
    of = {"governor": gov, "agent": agent, "agent's agent": agent.agent("b", max_tools=2)}[whose]

    def act() -> None:
        with of.acquire_tool() as permit:
            assert permit.held

    storm(act)
    is_whole(gov)


def test_suspensions(storm: Callable[[Callable[[], object]], None]) -> None:
    # Room for two: an interrupt at the first instruction of the inner permit's __exit__ leaves it
    # held as long as the exception is on its way, and the outer one resumes during that.
    gov = ConcurrencyGovernor(1, 2, 2)

    def act() -> None:
        with gov.acquire_tool() as permit, permit.suspended(), gov.acquire_tool():
            pass

    storm(act)
    is_whole(gov)


@pytest.mark.parametrize("timeout", [0, 0.0005, None])
def test_waits_among_others_that_wait(
    storm: Callable[[Callable[[], object]], None], timeout: float | None
) -> None:
    gov = ConcurrencyGovernor(1, 2, 2)
    agent = gov.agent("agent", max_tools=1)
    over = threading.Event()

    def others(of: ConcurrencyGovernor) -> None:
        while not over.is_set():
            with of.acquire_tool() as permit, permit.suspended():
                pass

    def act() -> None:
        try:
            with gov.acquire_tool(timeout):
                pass
        except AcquireTimeout:
            pass

    with Crew(patience=15) as crew:
        for number in range(3):
            crew.start(others, agent if number else gov)
        try:
            storm(act)
        finally:
            over.set()
    is_whole(gov)


def test_grants_on_behalf_of_others_and_resizes(storm: Callable[[Callable[[], object]], None]) -> None:
    gov = ConcurrencyGovernor(1, 1, 2)
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            gov.acquire_tool().release()

    def act() -> None:
        gov.resize(max_tools=2)  # first, as the last time may have been cut short at 0
        gov.acquire_tool().release()
        gov.resize(max_tools=0)

    with Crew(patience=15) as crew:
        for _ in range(3):
            crew.start(others)
        try:
            storm(act)
        finally:
            gov.resize(max_tools=2)
            over.set()
    is_whole(gov)
