"""What the tests share whose interrupts are injected at chosen instructions."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # it needs ctypes, and most tests here do not
    from stress.injector import Injector


@pytest.fixture(scope="module")
def injector() -> Iterator[Injector]:
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("without the global lock other threads move on between two instructions: see the storms")
    from stress import injector as machine

    try:
        backend = machine.Monitoring() if hasattr(sys, "monitoring") else machine.Tracing()
        with backend:
            yield backend
    except AttributeError as error:
        pytest.skip(f"this build does not let signals be injected: {error}")


@pytest.fixture
def finalizers_may_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let interrupts pass that hit a finalizer, which can raise nothing. Nothing else may."""
    from stress.injector import Interrupted

    other: list[str] = []

    def note(unraisable: Any) -> None:
        if unraisable.exc_type is not Interrupted:
            other.append("".join(traceback.format_exception(unraisable.exc_value)))

    monkeypatch.setattr(sys, "unraisablehook", note)
    yield
    assert not other, other[0]
