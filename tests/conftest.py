from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
from models import Gates, ModelServer
from threads import no_stray_threads


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
    """Serve a model whose answers and pages wait for the gates."""
    with ModelServer(gates) as server:
        yield server
        gates.open()
