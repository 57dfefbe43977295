"""Nothing is lost: permits that are dropped, in cycles, or with the threads that held them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
from threads import Crew, until

import governor
from governor import ConcurrencyGovernor

COUNTED = getattr(sys, "_is_gil_enabled", lambda: True)()  # by reference, at once


def test_a_dropped_permit_is_back_at_once_and_warned_about() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    permit = gov.acquire_tool()
    with pytest.warns(ResourceWarning, match="<ConcurrencyPermit tool held> was dropped unreleased"):
        del permit
    assert gov.stats().tools_in_use == 0


def test_a_released_permit_is_dropped_in_silence() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            gov.acquire_tool().release()
            with gov.acquire_stream():
                pass


def test_a_permit_is_given_back_before_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(
        sys,
        "unraisablehook",
        lambda it: seen.append((it.exc_type.__name__, gov.stats().tools_in_use)),
    )
    permit = gov.acquire_tool()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del permit
    assert seen == [("ResourceWarning", 0)]


def test_the_warning_says_where_the_permit_was_acquired_when_tracemalloc_is_on() -> None:
    make = "import governor\ngov = governor.ConcurrencyGovernor(1, 1, 1)\n"
    program = f"{make}permit = gov.acquire_tool()  # here\ndel permit\n"
    flags = ["-X", "tracemalloc=10", "-W", "always"]
    ran = subprocess.run(
        [sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=15, check=True
    )
    assert "ResourceWarning: <ConcurrencyPermit tool held> was dropped unreleased" in ran.stderr
    assert 'File "<string>", lineno 3' in ran.stderr


def test_a_permit_goes_to_the_waiter_when_its_holder_drops_it() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    permit = gov.acquire_tool()
    with Crew() as crew:
        crew.start(lambda: gov.acquire_tool().release())
        until(lambda: gov.stats().tools_waiting == 1, "one in line")
        with pytest.warns(ResourceWarning):
            del permit


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_permit_dropped_while_another_thread_has_the_lock_is_given_back_by_that_thread() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    tree = gov._global.tree
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        inside.set()
        assert leave.wait(8)

    permit = gov.acquire_tool()
    with Crew() as crew:
        crew.start(lambda: tree.atomically(gov._global, stay))
        assert inside.wait(8)
        del permit  # must not wait for the lock
        leave.set()
    until(lambda: gov.stats().tools_in_use == 0, "the permit to be back")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_thread_that_dies_gives_back_what_it_held() -> None:
    gov = ConcurrencyGovernor(1, 2, 2)

    def die() -> None:
        kept = [gov.acquire_tool(), gov.acquire_tool()]
        del kept[:0]

    with Crew() as crew:
        crew.start(die)
    gc.collect()
    until(lambda: gov.stats().tools_in_use == 0, "both to be back")


def run_alone(*arguments: str | Path) -> tuple[int, str]:
    """Run a program in an interpreter of its own; return its exit status and what it complained of."""
    where = os.environ | {"PYTHONPATH": str(Path(governor.__file__).parents[1])}
    command = [sys.executable, "-X", "faulthandler", *arguments]
    ran = subprocess.run(command, env=where, capture_output=True, text=True, timeout=50, check=False)
    return ran.returncode, ran.stderr


@pytest.mark.timeout(60)  # each permit waits for a full collection
def test_permits_in_cycles_come_back_to_a_full_governor() -> None:
    assert run_alone(Path(__file__).with_name("knots.py")) == (0, "")


def test_what_is_still_held_when_the_interpreter_ends_is_no_error() -> None:
    program = """
import threading
from governor import ConcurrencyGovernor

gov = ConcurrencyGovernor(1, 1, 2)
permit = gov.acquire_tool()
stream = gov.stream(iter)([1])
thread = threading.Thread(target=int)
thread.start()
thread.join()
"""
    assert run_alone("-W", "ignore", "-c", program) == (0, "")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_suspended_permit_that_is_dropped_leaves_nothing_to_wait_for() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    permit = gov.acquire_tool()
    permit.__enter__()
    permit.suspended().__enter__()
    del permit
    gc.collect()
    assert gov.drain(timeout=5)


def test_ten_thousand_agents_come_and_go_and_leave_nothing() -> None:
    gov = ConcurrencyGovernor(4, 8, 16)
    last: list[weakref.ref[ConcurrencyGovernor]] = []
    gc.collect()
    gc.disable()
    try:
        for number in range(10_000):
            agent = gov.agent(f"agent {number}", max_tools=2)
            with agent.acquire_tool():
                pass
            if number % 1_000 == 0:
                last.append(weakref.ref(agent))
        del agent
        if COUNTED:
            assert [it() for it in last] == [None] * 10
    finally:
        gc.enable()
    gc.collect()
    assert [it() for it in last] == [None] * 10
    assert len(gov._agents) == 0
    tree = gov._global.tree
    assert not any((tree.held, tree.line, tree.away))
    assert len(gov._tools.heap) == len(gov._global.heap) == 0


def test_an_agent_lives_as_long_as_its_permit() -> None:
    gov = ConcurrencyGovernor(4, 8, 16)
    permit = gov.agent("coder", max_tools=1).acquire_tool()
    assert gov.agent("coder", max_tools=1).try_acquire_tool() is None
    permit.release()
    del permit
    gc.collect()
    assert len(gov._agents) == 0
