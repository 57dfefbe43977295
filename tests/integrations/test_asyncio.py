"""Permits from asyncio: the same line as threads stand in, and a loop that is never blocked."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from threads import Crew, until

from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    SemaphoreClosed,
)
from governor.integrations.asyncio import acquire, permit

pytestmark = pytest.mark.every_governor


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)


def books(gov: ConcurrencyGovernor) -> tuple[int, int, int]:
    stats = gov.stats()
    return stats.tools_in_use, stats.streams_in_use, stats.tools_waiting + stats.streams_waiting


async def in_line(gov: ConcurrencyGovernor, count: int) -> None:
    """Let others run until so many are in line; pytest-timeout has the last word."""
    while books(gov)[2] != count:
        await asyncio.sleep(0)


async def use(gov: ConcurrencyGovernor, served: list[Any] | None = None, label: object = None) -> None:
    async with permit(gov, "tool"):
        if served is not None:
            served.append(label)


# ---------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize(("kind", "taken"), [("tool", (1, 0, 0)), ("stream", (0, 1, 0))])
def test_a_block_holds_a_permit_of_its_kind(
    gov: ConcurrencyGovernor, kind: Any, taken: tuple[int, int, int]
) -> None:
    async def main() -> None:
        async with permit(gov, kind) as held:
            assert isinstance(held, ConcurrencyPermit)
            assert held.kind == kind
            assert books(gov) == taken
        assert not held.held

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_a_block_that_fails_gives_its_permit_back_and_lets_the_error_pass(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        async with permit(gov, "tool"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_a_permit_may_be_given_back_within_its_block(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        async with permit(gov, "tool") as first:
            first.release()
            async with permit(gov, "tool"):
                assert books(gov) == (1, 0, 0)

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_one_is_for_one_block_at_a_time(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        limit = permit(gov, "tool")
        for _ in range(2):
            async with limit:
                with pytest.raises(RuntimeError, match="make one for each block"):
                    async with limit:
                        pass
                assert books(gov) == (1, 0, 0)

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


# ----------------------------------------------------------------------------------------- the line


def test_the_loop_runs_while_a_task_waits(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        with gov.acquire_tool():
            task = asyncio.create_task(use(gov))
            await in_line(gov, 1)
            assert not task.done()
        await task

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_tasks_and_threads_are_served_in_the_order_of_their_coming(gov: ConcurrencyGovernor) -> None:
    served: list[str] = []

    def thread(label: str) -> None:
        with gov.acquire_tool():
            served.append(label)

    async def main(crew: Crew) -> None:
        with gov.acquire_tool():
            tasks = []
            for number in range(6):
                if number % 2:
                    tasks.append(asyncio.create_task(use(gov, served, str(number))))
                else:
                    crew.start(thread, str(number))
                await in_line(gov, number + 1)
        await asyncio.gather(*tasks)

    with Crew() as crew:
        asyncio.run(main(crew))
    assert served == list("012345")


def test_fifty_tasks_of_three_loops_never_exceed_the_limit() -> None:
    gov = ConcurrencyGovernor(0, 3, 3)
    inside: list[int] = []

    async def job() -> None:
        async with permit(gov, "tool"):
            await asyncio.sleep(0)
            inside.append(books(gov)[0])

    async def main() -> None:
        await asyncio.gather(*(job() for _ in range(50)))

    with Crew() as crew:
        for _ in range(3):
            crew.start(asyncio.run, main())
    assert len(inside) == 150
    assert max(inside) <= 3
    assert books(gov) == (0, 0, 0)


# ----------------------------------------------------------------------------------------- refusals


def test_a_full_line_refuses_the_task(gov: ConcurrencyGovernor) -> None:
    gov = ConcurrencyGovernor(0, 1, 1, max_queued=0)

    async def main() -> None:
        async with permit(gov, "tool"):
            with pytest.raises(ConcurrencyLimitExceeded):
                await use(gov)

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_a_close_wakes_the_tasks_in_line(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        async with permit(gov, "tool"):
            tasks = [asyncio.create_task(use(gov)) for _ in range(3)]
            await in_line(gov, 3)
            gov.close()
            for task in tasks:
                with pytest.raises(SemaphoreClosed):
                    await task

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_a_kind_that_does_not_exist_is_refused(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="kind must be 'stream' or 'tool'"):
            async with permit(gov, "toll"):  # type: ignore[arg-type]
                pass

    asyncio.run(main())


# ---------------------------------------------------------------------------------------- cancelled


async def by_cancelling(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_a_timeout(task: asyncio.Task[None]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await task


def test_what_is_wrong_is_said_before_the_block_is_entered(gov: ConcurrencyGovernor) -> None:
    with pytest.raises(ValueError, match="kind must be 'stream' or 'tool', not 'tol'"):
        permit(gov, "tol")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="governor must be a ConcurrencyGovernor"):
        permit("gov", "tool")  # type: ignore[arg-type]


def test_a_refusal_keeps_nothing_alive(gov: ConcurrencyGovernor) -> None:
    async def fail(agent: ConcurrencyGovernor) -> None:
        with pytest.raises(AcquireTimeout):
            await acquire(agent, "tool", timeout=0.001)

    async def main() -> None:
        agent = gov.agent("agent", max_tools=0)
        gone = weakref.ref(agent)
        await fail(agent)
        await asyncio.sleep(0)  # the loop lets go of what it has called
        del agent
        assert gone() is None

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_a_wait_may_have_an_end(gov: ConcurrencyGovernor, timeout: float) -> None:
    async def main() -> None:
        block = permit(gov, "tool", timeout)
        async with permit(gov, "tool", timeout):
            line = gov.request_tool()
            with pytest.raises(AcquireTimeout, match="tools 1/1 in use, global 1/2, 1 waiting ahead") as told:
                await block.__aenter__()
            assert told.value.bound == timeout
            assert books(gov) == (1, 0, 1)
            line.cancel()
        async with block:
            assert books(gov) == (1, 0, 0)

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_who_got_a_permit_in_time_is_not_turned_out_of_line_later(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        first = await acquire(gov, "tool")
        waiter = asyncio.create_task(acquire(gov, "tool", timeout=0.05))
        await in_line(gov, 1)
        first.release()
        granted = await waiter
        await asyncio.sleep(0.06)  # past the timeout
        assert granted.held
        granted.release()

    asyncio.run(main())


def test_a_bad_timeout_is_refused_before_anything_is_asked_for(gov: ConcurrencyGovernor) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds >= 0"):
        permit(gov, "tool", timeout=-1)
    with pytest.raises(ValueError, match="timeout must be a number of seconds >= 0"):
        asyncio.run(acquire(gov, "tool", timeout=-1))
    assert books(gov) == (0, 0, 0)


@pytest.mark.parametrize("end", [by_cancelling, by_a_timeout])
def test_a_task_that_is_cancelled_in_line_leaves_it_to_those_behind(
    gov: ConcurrencyGovernor, end: Callable[[asyncio.Task[None]], Awaitable[None]]
) -> None:
    served: list[str] = []

    async def main() -> None:
        with gov.acquire_tool():
            first = asyncio.create_task(use(gov, served, "first"))
            await in_line(gov, 1)
            second = asyncio.create_task(use(gov, served, "second"))
            await in_line(gov, 2)
            await end(first)
            assert books(gov) == (1, 0, 1)
        await second

    asyncio.run(main())
    assert served == ["second"]
    assert books(gov) == (0, 0, 0)


def test_a_task_that_is_cancelled_just_as_it_is_granted_gives_the_permit_back(
    gov: ConcurrencyGovernor,
) -> None:
    async def main() -> None:
        with gov.acquire_tool():
            task = asyncio.create_task(use(gov, served, "cancelled"))
            await in_line(gov, 1)
        assert books(gov) == (1, 0, 0)  # granted, and the task does not know yet
        await by_cancelling(task)
        assert books(gov) == (0, 0, 0)

    served: list[str] = []
    asyncio.run(main())
    assert served == []


def test_a_task_that_is_cancelled_within_its_block_gives_the_permit_back(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        async def hold() -> None:
            async with permit(gov, "tool"):
                inside.set()
                await asyncio.Event().wait()

        inside = asyncio.Event()
        task = asyncio.create_task(hold())
        await inside.wait()
        await by_cancelling(task)
        assert books(gov) == (0, 0, 0)

    asyncio.run(main())


def test_a_loop_that_ends_takes_its_tasks_out_of_the_line(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        tasks.append(asyncio.create_task(use(gov)))
        await in_line(gov, 1)

    tasks: list[asyncio.Task[None]] = []
    with gov.acquire_tool():
        asyncio.run(main())
        assert books(gov) == (1, 0, 0)
    assert tasks[0].cancelled()
    assert books(gov) == (0, 0, 0)


def test_a_request_may_be_awaited_without_the_block(gov: ConcurrencyGovernor) -> None:
    async def main() -> None:
        waiter = asyncio.ensure_future(asyncio.wrap_future(gov.request_tool()))
        await asyncio.sleep(0)
        with await waiter:
            assert books(gov) == (1, 0, 0)

    asyncio.run(main())
    assert books(gov) == (0, 0, 0)


def test_a_grant_from_another_thread_wakes_the_task(gov: ConcurrencyGovernor) -> None:
    taken = threading.Event()

    def hold() -> None:
        with gov.acquire_tool():
            taken.set()
            until(lambda: books(gov)[2] == 1, "the task in line")

    with Crew() as crew:
        crew.start(hold)
        taken.wait()
        asyncio.run(use(gov))
    assert books(gov) == (0, 0, 0)
