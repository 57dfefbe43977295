"""CPython's own tests of thread pools pass on a governed one, where permits are plentiful.

They are those of the interpreter that runs this, where it came with them.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import unittest
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from governor import ConcurrencyGovernor, GovernedExecutor

stdlib: Any = pytest.importorskip(
    "test.test_concurrent_futures", reason="the tests of the stdlib are not installed"
)

OWN_PROGRAM = "starts an interpreter with a program of its own, and so with a bare pool"
OWN_WORDS = "asks for the stdlib's words: what we say, and when, is tested beside `map`"
EXCLUDED = {
    "test_interpreter_shutdown": OWN_PROGRAM,
    "test_submit_after_interpreter_shutdown": OWN_PROGRAM,
    "test_hang_gh83386": OWN_PROGRAM,
    "test_cancel_futures_wait_false": OWN_PROGRAM,
    "test_map_buffersize_type_validation": OWN_WORDS,
    "test_map_buffersize_value_validation": OWN_WORDS,
    "test_map_timeout": "sleeps for six seconds",
    "test_hang_global_shutdown_lock": "forks fifty pools of processes, and uses no governed pool",
    "test_process_fork_from_a_threadpool": "uses no governed pool",
}


class Governed(GovernedExecutor):
    """A thread pool to those who make it, and to those who look inside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(ConcurrencyGovernor(0, 1_000, 1_000), ThreadPoolExecutor(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def modules() -> Iterator[Any]:
    """The one module that the tests are in up to 3.11, or those of a package."""
    yield stdlib
    for module in pkgutil.iter_modules(getattr(stdlib, "__path__", [])):
        if module.name not in ("test_process_pool", "test_interpreter_pool", "test_deadlock"):
            yield importlib.import_module(f"{stdlib.__name__}.{module.name}")


def cases() -> Iterator[Any]:
    found = {value for module in modules() for value in vars(module).values() if isinstance(value, type)}
    for case in sorted(found, key=lambda case: case.__qualname__):
        if issubclass(case, unittest.TestCase) and case.__name__.startswith("ThreadPool"):
            for name in unittest.defaultTestLoader.getTestCaseNames(case):
                if name not in EXCLUDED:
                    yield pytest.param(case, name, id=f"{case.__name__}-{name}")


CASES = list(cases())


@pytest.mark.parametrize(("case", "name"), CASES)
def test_a_governed_thread_pool_passes(
    case: type[unittest.TestCase], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(futures, "ThreadPoolExecutor", Governed)
    # A case of a failing initializer makes the logger silent, for good.
    monkeypatch.setattr(logging.getLogger("concurrent.futures"), "propagate", True)
    result = unittest.TestResult()
    type(case.__name__, (case,), {"executor_type": Governed})(name).run(result)
    assert [trace for _, trace in result.failures + result.errors] == []
    assert result.testsRun == 1
    for _, reason in result.skipped:
        pytest.skip(reason)


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 26
