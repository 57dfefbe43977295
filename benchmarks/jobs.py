"""Thousands of jobs through an executor that bounds how many are in it at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from benchmarks._measure import PATIENCE, Broken, Contender, Effort, Figures, Gauge, Row, absent, interleaved
from benchmarks._peers import installed
from governor import ConcurrencyGovernor, GovernedExecutor

__all__ = ["jobs"]

WORKERS = 16
Job = Callable[[], object]
Jobs = Callable[[int, int, Job], object]  # permits, how many, what


def jobs(effort: Effort) -> list[Row]:
    """One thread submits, 16 workers do next to nothing; the end of the last job is waited for."""
    found = []
    for permits, n in ((WORKERS, 10_000), (5, 3_000)):
        case = f"{n:,} jobs, {permits} permits, {WORKERS} workers"
        missing = {
            name: "not installed" for name, package in PACKAGES.items() if installed(package) is None
        } | CANNOT
        contenders = {
            name: Contender(
                partial(_round, run, permits, effort.of(n, 100)),
                partial(_check, run, permits, bounds=name != BARE),
                REMARKS.get(name, ""),
            )
            for name, run in CONTENDERS.items()
            if name not in missing
        }
        found += interleaved(
            "jobs", case, contenders, rounds=effort.rounds(2 if n > 5_000 else 3), floor=BARE, warms=False
        )
        found += absent("jobs", case, missing)
    return found


def _round(run: Jobs, permits: int, n: int) -> Figures:
    done: list[None] = []
    began = time.perf_counter()
    run(permits, n, partial(done.append, None))
    took = time.perf_counter() - began
    if len(done) != n:
        raise Broken(f"{len(done)} of {n} jobs were done")
    return Figures(took / n)


def _check(run: Jobs, permits: int, *, bounds: bool) -> None:
    gauge = Gauge()

    def job() -> None:
        with gauge:
            time.sleep(0.002)

    run(permits, 4 * WORKERS, job)
    if gauge.entries != 4 * WORKERS or (bounds and gauge.peak != permits):
        raise Broken(f"{gauge.entries} of {4 * WORKERS} jobs, {gauge.peak} at once at a limit of {permits}")


def by_hand(permits: int, n: int, job: Job) -> None:
    semaphore = threading.BoundedSemaphore(permits)

    def submit(pool: ThreadPoolExecutor) -> None:
        semaphore.acquire()
        try:
            future = pool.submit(job)
        except BaseException:
            semaphore.release()
            raise
        future.add_done_callback(give_back)

    def give_back(_: Future[object]) -> None:
        semaphore.release()

    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(n):
            submit(pool)


def governed(permits: int, n: int, job: Job) -> None:
    gov = ConcurrencyGovernor(max_streams=1, max_tools=permits, max_global=permits)
    with GovernedExecutor(gov, ThreadPoolExecutor(WORKERS)) as pool:
        for _ in range(n):
            pool.submit(job)


def bounded_pool_executor(permits: int, n: int, job: Job) -> None:
    from bounded_pool_executor import BoundedThreadPoolExecutor

    with BoundedThreadPoolExecutor(permits) as pool:
        for _ in range(n):
            pool.submit(job)


def more_executors(permits: int, n: int, job: Job) -> None:
    from more_executors import Executors

    # With block=True, submit often sleeps until an unrelated event.
    with Executors.thread_pool(max_workers=WORKERS).with_throttle(permits) as pool:
        futures = [pool.submit(job) for _ in range(n)]
        for future in futures:
            future.result(PATIENCE)  # the end of the block drops what is still queued


def bulkman(permits: int, n: int, job: Job) -> None:
    from bulkman import BulkheadConfig, BulkheadThreading

    bulkhead = BulkheadThreading(BulkheadConfig("jobs", max_concurrent_calls=permits, max_queue_size=n))
    futures = [bulkhead.execute(job) for _ in range(n)]
    for future in futures:
        if not (result := future.result(PATIENCE)).success:
            raise Broken(str(result.error))
    bulkhead.shutdown()


def pyresilience(permits: int, n: int, job: Job) -> None:
    from pyresilience import BulkheadConfig, resilient

    guarded = resilient(bulkhead=BulkheadConfig(max_concurrent=permits, max_wait=PATIENCE))(lambda: job())
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(n):
            pool.submit(guarded)


def resource_semaphore(permits: int, n: int, job: Job) -> None:
    from resource_semaphore import ResourceSemaphore

    semaphore = ResourceSemaphore({"tool": permits, "global": permits})

    def submit(pool: ThreadPoolExecutor) -> None:
        ticket = semaphore.acquire({"tool": 1, "global": 1})
        try:
            future = pool.submit(job)
        except BaseException:
            semaphore.release(ticket)
            raise
        future.add_done_callback(lambda _: semaphore.release(ticket))

    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(n):
            submit(pool)


def capacity_limiter(permits: int, n: int, job: Job) -> None:
    import anyio
    import anyio.to_thread

    async def main() -> None:
        limiter = anyio.CapacityLimiter(permits)
        async with anyio.create_task_group() as group:
            for _ in range(n):
                group.start_soon(partial(anyio.to_thread.run_sync, job, limiter=limiter))

    anyio.run(main)


def bare(permits: int, n: int, job: Job) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in range(n):
            pool.submit(job)


BARE = "the floor: the bare pool"
CONTENDERS: dict[str, Jobs] = {
    "a BoundedSemaphore around submit": by_hand,
    "governor": governed,
    "resource-semaphore around submit": resource_semaphore,
    "bounded-pool-executor": bounded_pool_executor,
    "more-executors, throttled": more_executors,
    "bulkman": bulkman,
    "pyresilience, bulkhead in the job": pyresilience,
    "anyio.CapacityLimiter, to_thread": capacity_limiter,
    BARE: bare,
}
PACKAGES = {
    "resource-semaphore around submit": "resource-semaphore",
    "bounded-pool-executor": "bounded-pool-executor",
    "more-executors, throttled": "more-executors",
    "bulkman": "bulkman",
    "pyresilience, bulkhead in the job": "pyresilience",
    "anyio.CapacityLimiter, to_thread": "anyio",
}
UNBOUNDED = "does not hold the submitter back"
REMARKS = {
    "bounded-pool-executor": "only 1 layer, as many workers as permits",
    "a BoundedSemaphore around submit": "only 1 layer",
    "more-executors, throttled": f"only 1 layer, {UNBOUNDED}",
    "bulkman": f"only 1 layer, as many workers as permits, {UNBOUNDED}",
    "pyresilience, bulkhead in the job": f"only 1 layer, {UNBOUNDED}",
    "anyio.CapacityLimiter, to_thread": f"only 1 layer, {UNBOUNDED}",
}
CANNOT = {"pyrate-limiter": "cannot: counts calls in a span of time, not what runs"}
