"""Many processes at once, some of them killed: no limit is passed, and everything comes back."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from time import monotonic, sleep

import pytest
from fleet.books import Books
from fleet.history import History, Verdict, check
from fleet.servers import redis
from fleet.workers import Worker
from threads import until

__all__ = ["redis"]  # what skips this file where it cannot be had

# The length of the traffic, not whether there is any: the longer, the rarer what it finds.
SECONDS = float(os.environ.get("GOVERNOR_FLEET_SECONDS", "8"))

pytestmark = pytest.mark.timeout(SECONDS + 80)

LIMITS = {"max_streams": 4, "max_tools": 5, "max_global": 7}
LAYERS = {"": 7, "stream/": 4, "tool/": 5}


@pytest.fixture
def histories(tmp_path: Path) -> Iterator[str]:
    """Names of files for the workers to write to."""
    return (str(tmp_path / f"{number}") for number in count())


def ended(workers: list[Worker]) -> list[list[int]]:
    """End the traffic of all at once. Returns the turns of the threads of each."""
    for worker in workers:
        worker.wind_down()
    return [worker.end() for worker in workers]


def checked(directory: Path, layers: dict[str, int]) -> Verdict:
    verdict = check([path for path in directory.iterdir() if path.is_file()], layers)
    assert verdict.violations == []
    assert verdict.unfinished == []
    return verdict


def test_eight_processes_share_one_budget_fairly(
    hire: Callable[..., Worker], histories: Iterator[str], books: Books, tmp_path: Path
) -> None:
    workers = [hire(**LIMITS) for _ in range(8)]
    for worker in workers:
        worker.ready()
    for worker in workers:
        worker.begin(next(histories), 8)
    end = monotonic() + SECONDS
    while monotonic() < end:
        stats = workers[0].stats()
        assert stats.streams_in_use <= 4
        assert stats.tools_in_use <= 5
        assert stats.global_in_use <= 7
        sleep(0.05)
    turns = ended(workers)
    verdict = checked(tmp_path, LAYERS)
    assert verdict.lost == 0
    assert verdict.grants.total() == sum(map(sum, turns))
    assert verdict.share >= 0.7, verdict.grants
    assert min(map(min, turns)) > 0
    stats = workers[0].stats()
    assert (stats.global_in_use, stats.streams_waiting, stats.tools_waiting) == (0, 0, 0)
    until(books.empty, "nothing in the books")
    assert books.sessions == 8


def test_agents_that_processes_share_hold_their_limits(
    hire: Callable[..., Worker], histories: Iterator[str], books: Books, tmp_path: Path
) -> None:
    workers = [hire(**LIMITS) for _ in range(4)]
    for number, worker in enumerate(workers):
        agent = ("coder", "tester", None)[number % 3]
        if agent:
            worker.agent(agent, max_tools=2, max_streams=1)
        worker.begin(next(histories), 6, agent=agent)
    sleep(SECONDS / 2)
    turns = ended(workers)
    layers = {f"tool/{agent}/": 2 for agent in ("coder", "tester")}
    layers |= {f"stream/{agent}/": 1 for agent in ("coder", "tester")}
    checked(tmp_path, LAYERS | layers)
    assert min(map(min, turns)) > 0
    until(books.empty, "nothing in the books")
    assert not [field for field in books.state() if "coder" in field]  # gone with its last user


def test_one_place_is_handed_from_process_to_process_in_order(
    hire: Callable[..., Worker], histories: Iterator[str], tmp_path: Path
) -> None:
    workers = [hire(max_streams=1, max_tools=1, max_global=1) for _ in range(3)]
    for worker in workers:
        worker.begin(next(histories), 3, hold=0)
    sleep(SECONDS / 4)
    turns = ended(workers)
    verdict = check(tmp_path.iterdir(), {"": 1}, ordered=("",))
    assert verdict.violations == []
    assert verdict.share >= 0.7, verdict.grants
    assert min(map(min, turns)) > 0


def test_killed_processes_take_nothing_with_them(
    hire: Callable[..., Worker], histories: Iterator[str], books: Books, tmp_path: Path
) -> None:
    lease = 2.0
    chance = random.Random(20)
    deaths = History(tmp_path / "deaths")
    killed: dict[str, float] = {}  # by process id, and when

    def start() -> Worker:
        return hire(**LIMITS, lease=lease)

    def work(worker: Worker) -> Worker:
        worker.begin(next(histories), 4, hold=0.01)
        return worker

    observer = start().ready()
    workers = [start() for _ in range(5)]
    for worker in workers:
        work(worker)
    end = monotonic() + SECONDS
    while monotonic() < end:
        heir = start()  # it needs a while, so that it takes part when the other one dies
        sleep(1)
        victim = workers.pop(chance.randrange(len(workers)))
        deaths.killed(victim.pid)
        victim.kill()
        killed[str(victim.pid)] = monotonic()
        workers.append(work(heir))
        overdue = {pid for pid, when in killed.items() if monotonic() - when > lease + 1}
        holding = {holder.process.rpartition(":")[2] for holder in observer.holders()}
        assert not overdue & holding
        stats = observer.stats()
        assert stats.global_in_use <= 7
    assert [worker.at_work() for worker in workers] == [4] * len(workers)
    turns = ended(workers)
    deaths.close()
    verdict = checked(tmp_path, LAYERS)
    assert len(killed) >= SECONDS / 4
    assert verdict.grants.total() > sum(map(sum, turns))
    until(lambda: observer.stats().global_in_use == 0, "all places back", patience=lease + 5)
    until(books.empty, "nothing in the books", patience=lease + 5)
    until(lambda: books.sessions == len(workers), "the sessions of the living")
