"""A process that is stopped for longer than its lease, and wakes up."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet.books import Books
from fleet.history import check
from fleet.servers import redis
from fleet.workers import Worker
from threads import until

from governor import LeaseLost

__all__ = ["redis"]  # what skips this file where it cannot be had

pytestmark = pytest.mark.timeout(60)

LIMITS = {"max_streams": 1, "max_tools": 2, "max_global": 3, "lease": 1.0}


@pytest.fixture
def sleeper(hire: Callable[..., Worker]) -> Worker:
    """A worker that holds both tools."""
    worker = hire(**LIMITS)
    worker.listen()
    worker.block("block")
    worker.acquire()
    return worker


@pytest.fixture
def heir(hire: Callable[..., Worker], sleeper: Worker) -> Worker:
    """A worker that stands in line for both tools."""
    worker = hire()
    for name in ("a", "b"):
        worker.stand(name)
    until(lambda: worker.stats().tools_waiting == 2, "two in line")
    return worker


def test_who_oversleeps_learns_that_its_permits_are_lost(sleeper: Worker, heir: Worker, books: Books) -> None:
    (fence,) = sleeper.call("mine")
    assert sleeper.lost() == []
    sleeper.check(fence)
    sleeper.signal(signal.SIGSTOP)
    later = [heir.outcome("a"), heir.outcome("b")]
    assert min(later) > fence
    assert heir.stats().tools_in_use == 2
    sleeper.signal(signal.SIGCONT)
    until(lambda: sleeper.lost() == [fence], "it learns")
    with pytest.raises(LeaseLost, match="tool permit"):
        sleeper.check(fence)
    until(lambda: sleeper.heard().count("lost") == 2, "both events")

    # What it holds still counts, beyond the limit, until it is given back.
    until(lambda: heir.stats().tools_in_use == 4, "what is overdue in the books")
    assert len(heir.holders()) == 4
    heir.release()
    assert heir.try_acquire() is None
    sleeper.release()  # raises nothing
    assert heir.stats().tools_in_use == 1
    fence = heir.acquire(timeout=5)
    assert heir.try_acquire() is None
    assert sleeper.waiting("block")
    sleeper.leave()
    with pytest.raises(LeaseLost):
        sleeper.outcome("block")
    heir.release(fence)
    assert heir.stats().global_in_use == 0
    until(books.empty, "nothing in the books")
    fence = sleeper.acquire(timeout=5)  # it has a lease again
    assert sleeper.lost() == []
    sleeper.check(fence)
    sleeper.release()
    assert sleeper.heard().count("lost") == 2


def test_an_error_of_the_block_itself_is_not_hidden_by_the_loss(sleeper: Worker, heir: Worker) -> None:
    sleeper.signal(signal.SIGSTOP)
    heir.outcome("a")
    heir.outcome("b")
    sleeper.signal(signal.SIGCONT)
    until(sleeper.lost, "it learns")
    sleeper.leave(error=True)
    with pytest.raises(ZeroDivisionError):
        sleeper.outcome("block")
    sleeper.release()
    heir.release()
    assert heir.stats().global_in_use == 0


def test_a_loss_is_known_at_once_when_the_process_wakes(sleeper: Worker, heir: Worker) -> None:
    sleeper.signal(signal.SIGSTOP)
    heir.outcome("a")
    sleeper.signal(signal.SIGCONT)
    assert len(sleeper.lost()) == 1  # by its own clock, whatever the server says
    sleeper.leave()
    sleeper.release()
    heir.outcome("b")
    heir.release()


def test_a_short_pause_costs_nothing(hire: Callable[..., Worker]) -> None:
    sleeper = hire(**{**LIMITS, "lease": 20})
    fence = sleeper.acquire()
    other = hire().ready()
    sleeper.signal(signal.SIGSTOP)
    assert other.stats().tools_in_use == 1
    sleeper.signal(signal.SIGCONT)
    assert sleeper.lost() == []
    sleeper.check(fence)
    sleeper.release()


def test_who_waits_while_it_is_stopped_loses_its_turn_and_waits_again(
    hire: Callable[..., Worker], books: Books
) -> None:
    holder, sleeper, other = (hire(**{**LIMITS, "max_tools": 1}) for _ in range(3))
    holder.acquire()
    sleeper.stand("sleeper")
    until(lambda: holder.stats().tools_waiting == 1, "one in line")
    sleeper.signal(signal.SIGSTOP)
    until(lambda: holder.stats().tools_waiting == 0, "its end in the books")
    other.stand("other")
    until(lambda: holder.stats().tools_waiting == 1, "one in line")
    holder.release()
    other.outcome("other")
    sleeper.signal(signal.SIGCONT)
    until(lambda: holder.stats().tools_waiting == 1, "its return to the line")
    other.release()
    sleeper.outcome("sleeper")
    assert sleeper.lost() == []
    sleeper.release()
    until(books.empty, "nothing in the books")


def test_traffic_with_pauses_overlaps_only_by_what_was_lost(
    hire: Callable[..., Worker], tmp_path: Path, books: Books
) -> None:
    limits = {"max_streams": 2, "max_tools": 2, "max_global": 3, "lease": 1.0}
    workers = [hire(**limits) for _ in range(4)]
    observer, sleeper = workers[0], workers[1]
    for number, worker in enumerate(workers):
        worker.begin(str(tmp_path / str(number)), 4, hold=0.05)
    for _ in range(3):
        # It is stopped while it holds something, and until that was taken from it.
        until(lambda: str(sleeper.pid) in pids(observer), "a turn")
        sleeper.signal(signal.SIGSTOP)
        until(lambda: books_of(books, sleeper) == [], "its end in the books")
        sleeper.signal(signal.SIGCONT)
        until(lambda: books_of(books, sleeper), "its return")
    for worker in workers:
        worker.wind_down()
    for worker in workers:
        worker.end()
    # Those that were lost are not counted from the moment on that they were last known to be good.
    verdict = check(tmp_path.iterdir(), {"": 3, "tool/": 2, "stream/": 2})
    assert verdict.violations == []
    assert verdict.unfinished == []
    until(books.empty, "nothing in the books")


def pids(worker: Worker) -> set[str]:
    return {holder.process.rpartition(":")[2] for holder in worker.holders()}


def books_of(books: Books, worker: Worker) -> list[str]:
    return [row for row in books.rows("ids") if row.split(":")[1] == str(worker.pid)]
