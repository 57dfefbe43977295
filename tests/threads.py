"""The one set of thread helpers: a crew that cannot be forgotten, and a wait that cannot hang."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import pytest

from governor import ConcurrencyGovernor

__all__ = ["Crew", "Gauge", "is_idle", "no_stray_threads", "until"]

# A ceiling, never a measurement. Low enough that a test that spends all of it, and its teardown a
# part, is still reported before pytest-timeout ends the whole run.
PATIENCE = 8.0


class Crew:
    """Daemon threads with one end: all of them are found dead within one deadline, or the test fails.

    What the threads raised is raised again at the end of the block, two or more as a group::

        with Crew() as crew:
            for number in range(64):
                crew.start(work, number)
            gate.set()

    A block that fails by itself waits for nobody; what the threads had raised by then is noted on
    its error, since it may be the cause.
    """

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, work: Callable[..., object], *args: object, name: str | None = None) -> threading.Thread:
        """Start a thread that calls ``work(*args)``."""
        name = name or f"{getattr(work, '__name__', 'work')}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, args=(work, args), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def _run(self, work: Callable[..., object], args: tuple[object, ...]) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._errors.append(error)

    def join(self) -> None:
        """Wait for all; fail naming those that never end, else raise again what they raised."""
        __tracebackhide__ = True
        deadline = monotonic() + self._patience
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))
        alive = [thread.name for thread in self._threads if thread.is_alive()]
        # A traceback keeps its frames alive, and so their permits: it must not stay here.
        errors, self._errors = self._errors, []
        if alive:
            stuck = f"still alive after {self._patience} s: {', '.join(alive)}\n{stacks()}"
            raise pytest.fail.Exception(stuck) from (errors[0] if errors else None)
        if len(errors) > 1:
            raise BaseExceptionGroup(f"{len(errors)} threads raised", errors)
        if errors:
            raise errors.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        if error is None:
            self.join()
        else:
            for cause in self._errors:
                error.add_note("A thread had raised:\n" + "".join(traceback.format_exception(cause)))


def until(condition: Callable[[], object], what: str, *, patience: float = PATIENCE) -> None:
    """Poll until ``condition()`` is true; past the deadline, fail with every thread's stack.

    Args:
        condition: Asks the product, so that a state counts only once it is truly reached.
        what: What is awaited, for the failure's message: ``"three tools in line"``.
        patience: Seconds to the deadline.
    """
    __tracebackhide__ = True
    deadline = monotonic() + patience
    while not condition():
        if monotonic() > deadline:
            pytest.fail(f"waited {patience} s for {what}\n{stacks()}")
        sleep(0.001)


def is_idle(gov: ConcurrencyGovernor) -> bool:
    """Whether nobody holds anything of a governor, or waits for it."""
    stats = gov.stats()
    return (stats.global_in_use, stats.streams_waiting, stats.tools_waiting) == (0, 0, 0)


class Gauge:
    """Counts who is inside, knowing nothing of the governor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.inside = self.peak = self.entries = 0

    def __enter__(self) -> None:
        with self._lock:
            self.inside += 1
            self.entries += 1
            self.peak = max(self.peak, self.inside)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1

    def new_peak(self) -> None:
        with self._lock:
            self.peak = self.inside


@contextmanager
def no_stray_threads(*, patience: float = PATIENCE) -> Iterator[None]:
    """Fail where a thread that was started within the block does not end soon after it."""
    before = set(threading.enumerate())

    def stray() -> set[threading.Thread]:
        return {*threading.enumerate()} - before

    yield
    try:
        until(lambda: not stray(), "the last stray thread's end", patience=patience)
    except pytest.fail.Exception:
        pytest.fail(f"still there: {stray()}\n{stacks()}")


def stacks() -> str:
    """Return the innermost frames of every thread, under its name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"--- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame, limit=12))}"
        for ident, frame in sys._current_frames().items()
    )
