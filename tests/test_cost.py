"""Cheap: counted in steps, which are the same each time, and not in seconds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from threads import Crew, until

from governor import ConcurrencyGovernor, _tree


def steps(act: Callable[[], object]) -> list[str]:
    """Return the names of the functions that a call calls, C functions too."""
    names: list[str] = []

    def note(frame: Any, event: str, what: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)
        elif event == "c_call":
            names.append(what.__name__)

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("whose", ["governor", "agent"])
def test_an_uncontended_block_takes_the_short_way_in_and_out(whose: str) -> None:
    gov = ConcurrencyGovernor(1, 1, 2)
    of = gov.agent("agent", max_tools=1) if whose == "agent" else gov

    def block() -> None:
        with of.acquire_tool():
            pass

    taken = steps(block)
    assert {"acquire_tool", "__init__", "__enter__", "_end"} <= {*taken}
    assert "_locked" not in taken
    assert (taken.count("acquire"), taken.count("release")) == (2, 2)


def steps_of_a_hand_over(agents: int) -> int:
    gov = ConcurrencyGovernor(1, 1, 1)
    held = gov.acquire_tool()
    crew = [gov.agent(str(number), max_tools=1) for number in range(agents)]
    line = [agent.request_tool() for _ in range(2) for agent in crew]
    taken = steps(held.release)
    for request in line:
        request.result(timeout=0).release()
    return len(taken)


def test_a_hand_over_takes_as_many_steps_among_a_thousand_agents_as_among_ten() -> None:
    assert steps_of_a_hand_over(1000) == steps_of_a_hand_over(10)


def test_who_waits_sleeps_until_it_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []

    class Gate:
        def __init__(self) -> None:
            self._lock = threading.Lock()
            self.release = self._lock.release

        def acquire(self, *how: Any) -> bool:
            looks.append(how)
            return self._lock.acquire(*how)

    gov = ConcurrencyGovernor(1, 1, 1)
    monkeypatch.setattr(_tree, "Lock", Gate)
    with Crew() as crew, gov.acquire_tool():
        crew.start(lambda: gov.acquire_tool().release())
        until(lambda: len(looks) == 2, "the waiter asleep")
    # Once to shut the gate, once to sleep before it for as long as it takes.
    assert looks == [(), ()]
