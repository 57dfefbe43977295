from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from threads import no_stray_threads


@pytest.fixture(autouse=True)
def nothing_outlives_its_test() -> Iterator[None]:
    """Hold each test to what it started and to what it left in cycles."""
    with no_stray_threads(patience=5):
        yield
        gc.collect()
