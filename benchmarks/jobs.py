"""A whole empty job against what one would write by hand: a semaphore around a pool's ``submit``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from benchmarks._measure import Row, interleaved
from governor import ConcurrencyGovernor, GovernedExecutor

WORKERS = 16


class Bounded:
    """The wrapper that one would write by hand."""

    def __init__(self, pool: ThreadPoolExecutor, permits: int) -> None:
        self._pool, self._semaphore = pool, threading.BoundedSemaphore(permits)

    def submit(self, fn: Callable[[], None]) -> Future[None]:
        self._semaphore.acquire()
        try:
            future = self._pool.submit(fn)
        except BaseException:
            self._semaphore.release()
            raise
        future.add_done_callback(lambda _: self._semaphore.release())
        return future


def jobs() -> list[Row]:
    """One thread submits, 16 workers do nothing; the end of the last job is waited for."""
    return [*_jobs(WORKERS), *_jobs(5)]


def _jobs(permits: int) -> list[Row]:
    def bounded(n: int) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            _submit(Bounded(pool, permits), n)

    def bare(n: int) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            _submit(pool, n)

    def governed(n: int) -> None:
        gov = ConcurrencyGovernor(max_streams=1, max_tools=permits, max_global=permits)
        with GovernedExecutor(gov, ThreadPoolExecutor(WORKERS)) as pool:
            _submit(pool, n)

    contenders = {"BoundedSemaphore around submit": bounded, "the bare pool": bare, "governed": governed}
    return interleaved(f"an empty job, {permits} permits, {WORKERS} workers", contenders, operations=3_000)


def _submit(pool: Bounded | ThreadPoolExecutor | GovernedExecutor, n: int) -> None:
    for _ in range(n):
        pool.submit(_nothing)


def _nothing() -> None:
    pass


SCENARIOS: dict[str, Callable[[], list[Row]]] = {"jobs": jobs}
