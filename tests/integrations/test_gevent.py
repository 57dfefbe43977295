"""Under gevent's patching greenlets wait as threads do: what the docs say of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from threads import Crew, until

from governor import ConcurrencyGovernor, ConcurrencyPermit

pytest.importorskip("gevent")

START = """
from gevent import monkey; monkey.patch_all()
import warnings; warnings.simplefilter("error")
import threading
import gevent
from governor import AcquireTimeout, ConcurrencyGovernor, SemaphoreClosed

def until(condition):
    with gevent.Timeout(8):
        while not condition():
            gevent.sleep(0)
"""

PROGRAMS = {
    "greenlets wait in turn and never pass the limit": """
gov, inside, peak, order = ConcurrencyGovernor(2, 2, 3), 0, 0, []
def job(number):
    global inside, peak
    with gov.acquire_tool():
        inside += 1
        peak = max(peak, inside)
        order.append(number)
        gevent.sleep(0.001)
        inside -= 1
gevent.joinall([gevent.spawn(job, number) for number in range(10)], timeout=8, raise_error=True)
assert (peak, order, gov.stats().global_in_use) == (2, list(range(10)), 0)
""",
    "a wait times out, is killed, and is woken by close, as in a thread": """
gov, ended = ConcurrencyGovernor(1, 1, 1), []
permit = gov.acquire_tool()
try:
    gov.acquire_tool(timeout=0.01)
except AcquireTimeout:
    ended.append("timeout")
def wait():
    try:
        gov.acquire_tool()
    except SemaphoreClosed:
        ended.append("closed")
waiting = [gevent.spawn(wait) for _ in range(3)]
until(lambda: gov.stats().tools_waiting == 3)
waiting[1].kill()
assert gov.stats().tools_waiting == 2
drained = gevent.spawn(gov.drain, 8)
until(lambda: len(ended) == 3)
permit.release()
assert drained.get(timeout=8) is True
""",
    "a permit is owned by the greenlet that entered it": """
gov = ConcurrencyGovernor(1, 1, 1)
with gov.acquire_tool() as permit:
    def steal():
        try:
            permit.suspended().__enter__()
        except RuntimeError as error:
            return str(error)
    assert "another thread" in gevent.spawn(steal).get(timeout=8)
    with permit.suspended():
        gevent.spawn(lambda: gov.acquire_tool().release()).get(timeout=8)
    assert permit.held
""",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_under_gevent(program: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", START + program], capture_output=True, text=True, timeout=18, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_greenlet_that_moved_on_owns_nothing_of_its_thread() -> None:
    from greenlet import getcurrent, greenlet

    gov = ConcurrencyGovernor(1, 1, 2)
    entered: list[ConcurrencyPermit] = []

    def enter() -> None:
        with gov.acquire_tool() as permit:
            entered.append(permit)
            getcurrent().parent.switch()

    def wait() -> None:
        other = greenlet(enter)
        other.switch()
        gov.acquire_tool().release()
        other.switch()

    with Crew() as crew:
        crew.start(wait)
        until(lambda: gov.stats().tools_waiting == 1, "the thread to wait")
        entered[0].release()
