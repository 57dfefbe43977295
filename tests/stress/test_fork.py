"""Fork: the child gets a working governor with its full limits and nobody in line."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable

import pytest
from threads import Crew, until

from governor import ConcurrencyGovernor, ConcurrencyPermit, Layer

if not hasattr(os, "fork"):
    pytest.skip("this platform does not fork", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # that fork and threads do not mix


def die_when_stuck() -> None:
    """In a child: a hang becomes a failure. (faulthandler's own clock was the parent's thread.)"""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10)


def in_child(check: Callable[[], None]) -> None:
    """Run a check in a forked child: it fails here if it fails or hangs there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_when_stuck()
            warnings.simplefilter("error")
            check()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def works_at_full_limits(gov: ConcurrencyGovernor) -> None:
    stats = gov.stats()
    assert (stats.streams_in_use, stats.tools_in_use, stats.global_in_use) == (0, 0, 0)
    assert (stats.streams_waiting, stats.tools_waiting) == (0, 0)
    permits = [gov.acquire_tool() for _ in range(stats.tools_max)]
    assert gov.try_acquire_tool() is None
    got: list[ConcurrencyPermit] = []
    thread = threading.Thread(target=lambda: got.append(gov.acquire_tool()), daemon=True)
    thread.start()
    until(lambda: gov.stats().tools_waiting == 1, "the child's own waiter")
    permits.pop().release()
    thread.join(8)
    for permit in (*permits, *got):
        permit.release()
    assert gov.stats().global_in_use == 0


def test_a_child_of_a_busy_parent_works_fifty_times() -> None:
    gov = ConcurrencyGovernor(2, 3, 4)
    agent = gov.agent("agent", max_tools=1)
    over = threading.Event()

    def load(of: ConcurrencyGovernor) -> None:
        while not over.is_set():
            with of.acquire_tool(), of.acquire_stream():
                pass

    with Crew(patience=15) as crew:
        for number in range(6):
            crew.start(load, agent if number % 3 == 0 else gov)
        try:
            for _ in range(50):
                in_child(lambda: works_at_full_limits(gov))
        finally:
            over.set()
    assert gov.stats().global_in_use == 0


def test_permits_held_across_a_fork_are_inert_in_the_child() -> None:
    gov = ConcurrencyGovernor(2, 2, 4)

    def inert(permits: list[ConcurrencyPermit]) -> None:
        assert not any(permit.held for permit in permits)
        with pytest.raises(RuntimeError, match="not held"):
            permits[-1].__enter__()
        permits[0].release()
        permits.clear()
        gc.collect()
        works_at_full_limits(gov)

    with gov.acquire_tool() as held:
        spare = gov.acquire_stream()
        permits = [held, spare]
        in_child(lambda: inert(permits))
        assert held.held
        assert spare.held
        spare.release()
    assert gov.stats().global_in_use == 0


def test_the_end_of_an_inherited_block_gives_nothing_back_in_the_child() -> None:
    gov = ConcurrencyGovernor(1, 2, 2)
    reader, writer = os.pipe()
    with gov.acquire_tool() as permit:
        with permit.suspended():
            pid = os.fork()
        if pid == 0:
            die_when_stuck()
    if pid == 0:
        os.write(writer, repr(gov.stats().global_in_use).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 9) == b"0"
    os.close(reader)
    os.close(writer)
    assert gov.stats().global_in_use == 0


def test_nobody_stands_in_the_childs_line() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    permit = gov.acquire_tool()
    with Crew() as crew:
        for _ in range(3):
            crew.start(lambda: gov.acquire_tool().release())
        until(lambda: gov.stats().tools_waiting == 3, "three in line")
        in_child(lambda: works_at_full_limits(gov))
        assert gov.stats().tools_waiting == 3
        permit.release()


def test_a_larger_limit_in_the_child_admits_nobody_of_the_parents_line() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    permit = gov.acquire_tool()

    def grow() -> None:
        gov.resize(max_tools=2, max_global=2)
        works_at_full_limits(gov)

    with Crew() as crew:
        crew.start(lambda: gov.acquire_tool().release())
        until(lambda: gov.stats().tools_waiting == 1, "one in line")
        in_child(grow)
        permit.release()


def test_a_fork_while_another_thread_is_inside_leaves_no_lock_taken() -> None:
    gov = ConcurrencyGovernor(1, 2, 2)
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        inside.set()
        assert leave.wait(15)

    with Crew(patience=15) as crew:
        crew.start(lambda: gov._global.tree.atomically(gov._global, stay))
        assert inside.wait(8)
        try:
            in_child(lambda: works_at_full_limits(gov))
        finally:
            leave.set()


def test_shared_governors_and_layers_work_in_a_child_too() -> None:
    shared = ConcurrencyGovernor.shared("forked", max_streams=1, max_tools=2, max_global=2)
    outer = Layer(2)
    inner = Layer(1, parent=outer)

    def check() -> None:
        assert ConcurrencyGovernor.shared("forked") is shared
        works_at_full_limits(shared)
        assert (inner.in_use, outer.in_use) == (0, 0)
        assert inner.acquire(timeout=5)
        inner.release()

    with inner, shared.acquire_tool():
        in_child(check)
    shared.close()


def test_a_governor_that_was_closed_is_closed_in_the_child() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    gov.close()

    def check() -> None:
        assert gov.closed
        assert gov.try_acquire_tool() is None

    in_child(check)
