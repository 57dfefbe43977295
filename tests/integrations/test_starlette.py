"""A generator that a web framework resumes on many threads: what it has entered belongs to none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from governor import ConcurrencyGovernor

starlette = pytest.importorskip("starlette.concurrency")


def test_a_generator_that_moves_from_thread_to_thread_raises_no_alarm() -> None:
    gov = ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=1)
    threads: set[int] = set()

    def tokens() -> Iterator[int]:
        with gov.acquire_stream():
            for number in range(5):
                threads.add(threading.get_ident())
                yield number

    async def consume() -> list[int]:
        return [token async for token in starlette.iterate_in_threadpool(tokens())]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(consume() for _ in range(12)))

    assert asyncio.run(main()) == [list(range(5))] * 12
    assert len(threads) > 1
    assert gov.stats().global_in_use == 0
