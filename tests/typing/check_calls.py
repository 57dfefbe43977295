"""Checked by type checkers, never run: what users' code infers of calls, streams, jobs and requests.

A `type: ignore` states that its line is an error: where it is not, the comment is reported.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import assert_type

from governor import ConcurrencyGovernor, ConcurrencyPermit, GovernedExecutor
from governor.integrations.asyncio import permit

gov = ConcurrencyGovernor.with_defaults()


def search(query: str, *, limit: int = 10) -> list[str]:
    return [query] * limit


def count(limit: int) -> Iterator[int]:
    yield from range(limit)


def decorated_calls() -> None:
    for governed in (gov.tool(search), gov.tool(timeout=5)(search), gov.stream(search), gov.stream()(search)):
        assert_type(governed("cats", limit=3), list[str])
        governed("cats", 3)  # type: ignore
        governed(42)  # type: ignore
        governed()  # type: ignore
    gov.tool(42)  # type: ignore
    gov.tool(search, timeout="5")  # type: ignore


class Tools:
    @gov.tool
    def method(self, number: int) -> str:
        return str(number)

    @gov.tool(timeout=1)
    def with_a_timeout(self, number: int) -> str:
        return str(number)

    @classmethod
    @gov.tool
    def of_the_class(cls, number: int) -> str:
        return str(number)

    @staticmethod
    @gov.tool
    def static(number: int) -> str:
        return str(number)


def decorated_methods(tools: Tools) -> None:
    assert_type(tools.method(1), str)
    assert_type(tools.with_a_timeout(1), str)
    assert_type(tools.of_the_class(1), str)
    assert_type(tools.static(1), str)
    tools.method("1")  # type: ignore


def streams() -> None:
    assert_type(gov.stream(count)(3), Iterator[int])
    for item in gov.stream(timeout=5)(count)(3):
        assert_type(item, int)
    agent = gov.agent("coder", max_tools=1)
    assert_type(agent.stream(count)(3), Iterator[int])


def an_executor() -> None:
    pool = GovernedExecutor(gov, ThreadPoolExecutor(4), kind="stream", acquire_timeout=5)
    anywhere: Executor = pool
    assert_type(anywhere.submit(pow, 2, 3).done(), bool)
    with pool as entered:
        assert_type(entered, GovernedExecutor)
    GovernedExecutor(gov, ProcessPoolExecutor(), kind="toll")  # type: ignore
    GovernedExecutor(gov, None)  # type: ignore
    GovernedExecutor(gov, pool, None)  # type: ignore


def jobs(pool: GovernedExecutor) -> None:
    assert_type(pool.submit(search, "cats", limit=3), Future[list[str]])
    assert_type(pool.submit(search, "cats").result(), list[str])
    assert_type(pool.try_submit(search, "cats"), Future[list[str]] | None)
    assert_type(pool.map(len, ["a", "b"], chunksize=2), Iterator[int])
    assert_type(pool.map(search, ["a"], buffersize=1, timeout=2.5), Iterator[list[str]])
    pool.submit(search, "cats", limit="3")  # type: ignore
    pool.submit(search)  # type: ignore
    pool.try_submit(search, 42)  # type: ignore
    pool.shutdown(False, cancel_futures=True)


def requests() -> None:
    assert_type(gov.request_tool(), Future[ConcurrencyPermit])
    assert_type(gov.request_stream().result(timeout=1), ConcurrencyPermit)
    assert_type(gov.request("tool"), Future[ConcurrencyPermit])
    gov.request("toll")  # type: ignore


async def from_asyncio(job: Callable[[], int], pool: GovernedExecutor) -> None:
    async with permit(gov, "tool") as held:
        assert_type(held, ConcurrencyPermit)
    assert_type(await asyncio.wrap_future(gov.request_tool()), ConcurrencyPermit)
    assert_type(await asyncio.get_running_loop().run_in_executor(pool, job), int)
    permit(gov, "toll")  # type: ignore


async def a_block_that_may_not_swallow_errors() -> int:
    async with permit(gov, "tool"):
        return 1
