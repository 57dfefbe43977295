from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from model_server import ModelServer
from serving import Gates
from threads import no_stray_threads


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hold every kind of governor to what the marked tests say of one."""
    find = metafunc.definition.get_closest_marker
    if find("every_governor") is not None:
        fleet = [] if find("in_process_only") or find_spec("redis") is None else ["fleet"]
        metafunc.parametrize("kind_of_governor", ["", *fleet], indirect=True)


_fleets = (f"every-{os.getpid()}-{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def kind_of_governor(
    nothing_outlives_its_test: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Put the governor of a fleet in the place of the one of a process, if that is what is asked for."""
    if getattr(request, "param", "") != "fleet":
        yield
        return
    from governor.redis import RedisGovernor, _session

    url: str = request.getfixturevalue("fleet_server").url
    made: list[RedisGovernor] = []
    marked = request.node.get_closest_marker("every_governor").kwargs

    class OneOfAFleet(RedisGovernor):
        """A fleet of one, made as a governor of a process is, and of the same name or none."""

        def __init__(
            self,
            max_streams: int,
            max_tools: int,
            max_global: int,
            *,
            name: str | None = None,
            **options: Any,
        ) -> None:
            limits = {"max_streams": max_streams, "max_tools": max_tools, "max_global": max_global}
            super().__init__(url, next(_fleets), **limits, **marked, **options)
            self._name = name
            made.append(self)

    monkeypatch.setattr(_session, "SETTLING", 0.0)
    monkeypatch.setattr(request.module, "ConcurrencyGovernor", OneOfAFleet)
    yield
    monkeypatch.undo()
    for gov in made:
        gov.close()
    made.clear()


@pytest.fixture(scope="session")
def fleet_server() -> Iterator[Any]:
    """A server for tests of fleets that leave it as it was."""
    from fleet.servers import Server

    with Server() as server:
        yield server


def pytest_collection_finish() -> None:
    """Keep what the tests are made of out of the collections after each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_outlives_its_test() -> Iterator[None]:
    """Hold each test to what it started and to what it left in cycles."""
    with no_stray_threads(patience=5):
        yield
        gc.collect()


@pytest.fixture(params=[None, 1e-6], ids=["", "frantic"])
def switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let threads change places as usual, and then all the time."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(request.param or usual)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def gates() -> Gates:
    return Gates()


@pytest.fixture
def server(gates: Gates) -> Iterator[ModelServer]:
    """Run a model server that answers when the gates are open."""
    with ModelServer(gates) as server:
        yield server
        gates.open()
