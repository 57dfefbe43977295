"""One server for all tests of fleets that do it no harm, and workers that end with their test."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # they need redis-py, and without it the modules here are to be skipped one by one
    from fleet.books import Books
    from fleet.servers import Proxy, Server
    from fleet.workers import Worker

    from governor.redis import RedisGovernor

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def signals_are_heeded() -> Iterator[None]:
    """Have the commands heed the signals that these tests send, whatever the tests themselves were told.

    Who runs in the background of a shell ignores Ctrl-C, as do all that it starts.
    """
    former = {}
    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            former[number] = signal.signal(number, usual)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server for tests that leave it as it was. Others start their own."""
    from fleet.servers import Server

    with Server() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A relay to the server, for a test to lose things in."""
    from fleet.servers import Proxy

    with Proxy(server.address) as proxy:
        yield proxy


@pytest.fixture
def fleet_name() -> str:
    """A name that no other test has."""
    return f"fleet-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def books(server: Server, fleet_name: str) -> Books:
    """What the books of this test's fleet say."""
    from fleet.books import Books

    return Books(server.client(), fleet_name)


@pytest.fixture
def join(
    server: Server, fleet_name: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., RedisGovernor]]:
    """Join a fleet from this process; with nothing given, as who did so first.

    Who is the first gives 2 streams, 2 tools, 3 in all. A new fleet grants at once, if not ``settling``.
    """
    from governor.redis import RedisGovernor, _session

    joined: list[RedisGovernor] = []
    of_the_first: dict[str, Any] = {}
    usual = _session.SETTLING

    def join(
        where: Any = None, name: str | None = None, *, settling: bool = False, **options: Any
    ) -> RedisGovernor:
        monkeypatch.setattr(_session, "SETTLING", usual if settling else 0.0)
        options = options or of_the_first or LIMITS
        of_the_first.update(of_the_first or options)
        gov = RedisGovernor(where or server.url, name or fleet_name, **options)
        joined.append(gov)
        return gov

    yield join
    for gov in joined:
        gov.close()


@pytest.fixture
def hire(server: Server, fleet_name: str) -> Iterator[Callable[..., Worker]]:
    """Start a worker process that joins the fleet; else as ``join``."""
    from fleet.workers import Worker

    hired: list[Worker] = []
    of_the_first: dict[str, Any] = {}

    def hire(
        where: str | None = None,
        name: str | None = None,
        *,
        client: dict[str, Any] | None = None,
        settling: bool = False,
        **options: Any,
    ) -> Worker:
        options = options or of_the_first or LIMITS
        of_the_first.update(of_the_first or options)
        worker = Worker(where or server.url, name or fleet_name, client=client, settling=settling, **options)
        hired.append(worker)
        return worker

    yield hire
    for worker in hired:
        worker.fire()


LIMITS = {"max_streams": 2, "max_tools": 2, "max_global": 3}
