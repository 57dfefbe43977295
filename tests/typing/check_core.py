"""Checked by type checkers, never run: what users' code infers of the core.

A `type: ignore` states that its line is an error: where it is not, the comment is reported.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from threading import BoundedSemaphore
from typing import Literal, assert_type

from governor import (
    AcquireTimeout,
    ConcurrencyError,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    GovernorStats,
    Layer,
    SemaphoreClosed,
)


def ways_to_a_governor() -> None:
    assert_type(ConcurrencyGovernor(4, 8, 16, max_queued=None, name="crew"), ConcurrencyGovernor)
    assert_type(ConcurrencyGovernor.with_defaults(), ConcurrencyGovernor)
    assert_type(ConcurrencyGovernor.from_env("CREW_"), ConcurrencyGovernor)
    assert_type(ConcurrencyGovernor.shared(), ConcurrencyGovernor)
    assert_type(
        ConcurrencyGovernor.shared("crew", max_streams=1, max_tools=3, max_global=None), ConcurrencyGovernor
    )
    with ConcurrencyGovernor.with_defaults() as gov:
        assert_type(gov, ConcurrencyGovernor)


def ways_to_a_permit(gov: ConcurrencyGovernor) -> None:
    assert_type(gov.acquire_stream(), ConcurrencyPermit)
    assert_type(gov.acquire_tool(timeout=1.5), ConcurrencyPermit)
    assert_type(gov.acquire("tool", timeout=5), ConcurrencyPermit)
    assert_type(gov.try_acquire_stream(), ConcurrencyPermit | None)
    assert_type(gov.try_acquire_tool(), ConcurrencyPermit | None)
    assert_type(gov.try_acquire("stream"), ConcurrencyPermit | None)
    assert_type(gov.try_acquire("tool"), ConcurrencyPermit | None)
    agent = gov.agent("coder", max_tools=2)
    assert_type(agent.agent("helper", max_tools=1, max_streams=1), ConcurrencyGovernor)
    gov.acquire("toll")  # type: ignore
    gov.try_acquire("toll")  # type: ignore
    gov.acquire_tool("5")  # type: ignore
    gov.agent("coder")  # type: ignore
    ConcurrencyGovernor(4, 8)  # type: ignore


def a_permit(permit: ConcurrencyPermit) -> None:
    with permit as entered, entered.suspended(timeout=1):
        assert_type(entered, ConcurrencyPermit)
    with permit.suspended() as nothing:
        assert_type(nothing, None)
    assert_type(permit.held, bool)
    assert_type(permit.kind, Literal["stream", "tool"])
    assert_type(permit.waited, float)
    permit.release()
    permit.held = True  # type: ignore


def a_block_that_may_not_swallow_errors(gov: ConcurrencyGovernor) -> int:
    with gov.acquire_tool():
        return 1  # an __exit__ that returned bool would make a checker ask for another return


def the_books(gov: ConcurrencyGovernor) -> None:
    stats = gov.stats()
    assert_type(stats, GovernorStats)
    assert_type((stats.streams_available, stats.streams_max), tuple[int, int])
    assert_type((stats.tools_available, stats.tools_max), tuple[int, int])
    assert_type((stats.global_available, stats.global_max), tuple[int, int])
    assert_type((stats.streams_waiting, stats.tools_waiting), tuple[int, int])
    assert_type((stats.streams_in_use, stats.tools_in_use, stats.global_in_use), tuple[int, int, int])
    stats.tools_max = 9  # type: ignore
    stats.tools_in_use = 9  # type: ignore


def steering(gov: ConcurrencyGovernor) -> None:
    gov.resize(max_streams=1, max_tools=None, max_global=3)
    gov.resize(3)  # type: ignore
    gov.close()
    assert_type(gov.closed, bool)
    assert_type(gov.name, str | None)
    assert_type(gov.drain(), bool)
    assert_type(gov.drain(timeout=3), bool)
    gov.closed = False  # type: ignore


def a_layer(any_semaphore: BoundedSemaphore) -> None:
    semaphore: BoundedSemaphore = Layer()
    assert_type(semaphore.acquire(timeout=1), bool)
    layer = Layer(3, parent=Layer(8), name="gpu")
    assert_type(layer.acquire(blocking=False), bool)
    layer.release(2)
    with layer as taken:
        assert_type(taken, bool)
    assert_type((layer.limit, layer.in_use, layer.available, layer.waiting), tuple[int, int, int, int])
    layer.resize(4)
    layer.close()
    assert_type(layer.closed, bool)
    layer.limit = 5  # type: ignore
    Layer(3, parent=any_semaphore)  # type: ignore


def errors_that_one_name_catches() -> list[type[ConcurrencyError]]:
    return [AcquireTimeout, ConcurrencyLimitExceeded, SemaphoreClosed]


def a_timeout(error: AcquireTimeout) -> TimeoutError:
    assert_type((error.what, error.waiting, error.governor), tuple[str, int, str | None])
    assert_type(error.bound, float | None)
    for layer in error.layers:
        assert_type((layer.name, layer.in_use, layer.limit), tuple[str, int, int])
    return error
