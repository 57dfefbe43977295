"""The permit: given back exactly once, whoever does it, and suspended only by its owner."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from collections.abc import Callable
from time import monotonic

import pytest
from threads import Crew, until

from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    SemaphoreClosed,
)

pytestmark = pytest.mark.every_governor


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=2, max_tools=2, max_global=3)


@pytest.fixture
def narrow() -> ConcurrencyGovernor:
    """One operation at a time."""
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=1)


def books(gov: ConcurrencyGovernor) -> tuple[int, int, int]:
    stats = gov.stats()
    return stats.streams_in_use, stats.tools_in_use, stats.global_in_use


def waiting(gov: ConcurrencyGovernor) -> int:
    return gov.stats().streams_waiting + gov.stats().tools_waiting


def elsewhere(call: Callable[[], object]) -> None:
    """Call it on another thread, and raise here what it raises there."""
    with Crew() as crew:
        crew.start(call)


def line_up(crew: Crew, gov: ConcurrencyGovernor, served: list[str], label: str) -> None:
    """Put one more in line for a tool. Once served, it notes its label and is done."""

    def work() -> None:
        with gov.acquire_tool():
            served.append(label)

    before = waiting(gov)
    crew.start(work, name=label)
    until(lambda: waiting(gov) == before + 1, f"{label} in line")


# ---------------------------------------------------------------------------------- from hand to hand


@pytest.mark.parametrize(("kind", "taken"), [("stream", (1, 0, 1)), ("tool", (0, 1, 1))])
@pytest.mark.parametrize("way", ["acquire", "try_acquire"])
def test_a_permit_holds_one_of_its_kind_until_its_block_ends(
    gov: ConcurrencyGovernor, way: str, kind: str, taken: tuple[int, int, int]
) -> None:
    with getattr(gov, f"{way}_{kind}")() as permit:
        assert permit.held
        assert permit.kind == kind
        assert books(gov) == taken
    assert not permit.held
    assert permit.kind == kind
    assert books(gov) == (0, 0, 0)


def test_a_block_that_fails_gives_its_permit_back_and_lets_the_error_pass(gov: ConcurrencyGovernor) -> None:
    with pytest.raises(ZeroDivisionError), gov.acquire_tool():
        raise ZeroDivisionError
    assert books(gov) == (0, 0, 0)


def test_a_permit_is_given_back_once_however_many_threads_release_it(gov: ConcurrencyGovernor) -> None:
    other, permit, together = gov.acquire_tool(), gov.acquire_tool(), threading.Barrier(8)
    with Crew() as crew:
        for _ in range(8):
            crew.start(lambda: (together.wait(), permit.release()))
    permit.release()
    assert (permit.held, other.held) == (False, True)
    assert books(gov) == (0, 1, 1)
    other.release()


def test_a_permit_of_a_thread_that_died_is_good_on_any_other(gov: ConcurrencyGovernor) -> None:
    permits: list[ConcurrencyPermit] = []
    elsewhere(lambda: permits.append(gov.acquire_tool()))
    with permits.pop() as permit:
        assert permit.held
        with permit.suspended():
            assert not permit.held
        assert permit.held
    assert books(gov) == (0, 0, 0)


def test_a_permit_released_elsewhere_serves_the_next_in_line(narrow: ConcurrencyGovernor) -> None:
    served: list[str] = []
    with Crew() as crew, narrow.acquire_tool() as permit:
        line_up(crew, narrow, served, "next")
        crew.start(permit.release)
    assert served == ["next"]


def test_a_permit_released_within_its_block_is_not_given_back_again_at_its_end(
    narrow: ConcurrencyGovernor,
) -> None:
    with narrow.acquire_tool() as permit:
        permit.release()
        assert not permit.held
        other = narrow.acquire_tool()
    assert books(narrow) == (0, 1, 1)
    other.release()


def test_a_permit_outlives_the_close_of_its_governor(gov: ConcurrencyGovernor) -> None:
    permit = gov.acquire_tool()
    gov.close()
    with permit:
        assert permit.held
        assert books(gov) == (0, 1, 1)
    permit.release()
    assert books(gov) == (0, 0, 0)


def test_waited_is_the_time_spent_in_line(narrow: ConcurrencyGovernor) -> None:
    permits: list[ConcurrencyPermit] = []
    with Crew() as crew, narrow.acquire_tool() as first:
        assert first.waited == 0
        began = monotonic()
        crew.start(lambda: permits.append(narrow.acquire_tool()))
        until(lambda: waiting(narrow) == 1, "one in line")
        in_line = monotonic()
        until(lambda: monotonic() > in_line + 0.02, "the clock")
        least = monotonic() - in_line
        first.release()
        until(lambda: permits, "the grant")
        most = monotonic() - began
    assert least <= permits[0].waited <= most
    with permits[0] as permit:
        with permit.suspended():
            pass
        assert permit.waited >= least, "the wait to resume hides the wait to be admitted"


def test_a_permit_that_is_tried_for_has_not_waited(gov: ConcurrencyGovernor) -> None:
    permit = gov.try_acquire_tool()
    assert permit is not None
    assert permit.waited == 0
    permit.release()


def test_a_permit_that_is_dropped_comes_back_with_a_warning(gov: ConcurrencyGovernor) -> None:
    with pytest.warns(ResourceWarning, match="<ConcurrencyPermit tool held> was dropped unreleased"):
        gov.acquire_tool()
    assert books(gov) == (0, 0, 0)


# ---------------------------------------------------------------------------------- what is refused


def entered_elsewhere(permit: ConcurrencyPermit) -> None:
    elsewhere(permit.__enter__)


def entered_here(permit: ConcurrencyPermit) -> None:
    permit.__enter__()


def suspended_here(permit: ConcurrencyPermit) -> None:
    permit.__enter__()
    permit.suspended().__enter__()


@pytest.mark.parametrize(
    ("before", "saying"),
    [
        (entered_here, "cannot enter a permit twice"),
        (entered_elsewhere, "cannot enter a permit that another thread has entered"),
        (suspended_here, "cannot enter a permit that is suspended"),
        (ConcurrencyPermit.release, "cannot enter a permit that is not held: acquire another"),
        (lambda permit: permit.__exit__(None, None, None), "cannot enter a permit that is not held"),
    ],
)
def test_a_permit_is_entered_once_and_only_while_held(
    gov: ConcurrencyGovernor, before: Callable[[ConcurrencyPermit], None], saying: str
) -> None:
    permit = gov.acquire_tool()
    before(permit)
    held = permit.held
    with pytest.raises(RuntimeError, match=saying):
        permit.__enter__()
    assert permit.held is held
    assert books(gov) == (0, held, held)
    permit.release()


@pytest.mark.parametrize(
    ("before", "saying"),
    [
        (lambda permit: None, "cannot suspend a permit that no thread has entered: use it in a with block"),
        (entered_elsewhere, "cannot suspend a permit that another thread has entered"),
        (suspended_here, "cannot suspend a permit that is suspended"),
        (ConcurrencyPermit.release, "cannot suspend a permit that is not held"),
        (lambda permit: permit.__enter__().release(), "cannot suspend a permit that is not held"),
    ],
)
def test_a_permit_is_suspended_by_its_owner_only_and_only_while_held(
    gov: ConcurrencyGovernor, before: Callable[[ConcurrencyPermit], None], saying: str
) -> None:
    permit = gov.acquire_tool()
    before(permit)
    held = permit.held
    with pytest.raises(RuntimeError, match=saying):
        permit.suspended().__enter__()
    assert permit.held is held
    assert books(gov) == (0, held, held)
    permit.release()


def test_a_permit_whose_making_was_cut_short_is_collected_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with pytest.raises(TypeError):
        ConcurrencyPermit()  # type: ignore[call-arg]
    ConcurrencyPermit.__new__(ConcurrencyPermit)
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_permit_has_no_twin(gov: ConcurrencyGovernor, twin: Callable[[object], object]) -> None:
    with gov.acquire_tool() as permit:
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            twin(permit)
        assert books(gov) == (0, 1, 1)


def test_nobody_else_can_say_that_a_permit_is_held(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool() as permit:
        for name in ("held", "kind", "waited", "colour"):
            with pytest.raises(AttributeError):
                setattr(permit, name, False)


def test_its_repr_tells_its_kind_and_where_it_is(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_stream() as permit:
        assert repr(permit) == f"<{type(permit).__name__} stream held>"
        with permit.suspended():
            assert repr(permit) == f"<{type(permit).__name__} stream suspended>"
    assert repr(permit) == f"<{type(permit).__name__} stream released>"


# --------------------------------------------------------------------------------------- suspension


def test_a_suspended_permit_gives_its_place_to_others_and_takes_one_again(
    narrow: ConcurrencyGovernor,
) -> None:
    with narrow.acquire_tool() as permit:
        for _ in range(2):
            with permit.suspended():
                assert not permit.held
                with narrow.acquire_stream():
                    assert books(narrow) == (1, 0, 1)
            assert permit.held
            assert books(narrow) == (0, 1, 1)
    assert books(narrow) == (0, 0, 0)


def test_suspending_gives_way_in_every_layer_of_an_agents_agent(narrow: ConcurrencyGovernor) -> None:
    agent = narrow.agent("lead", max_tools=1).agent("helper", max_tools=1)
    with agent.acquire_tool() as permit:
        with permit.suspended(), agent.acquire_tool():
            pass
        assert permit.held
        assert books(agent) == books(narrow) == (0, 1, 1)
    assert books(agent) == books(narrow) == (0, 0, 0)


def test_a_suspended_place_goes_to_who_waits_for_it(narrow: ConcurrencyGovernor) -> None:
    served: list[str] = []
    with Crew() as crew, narrow.acquire_tool() as permit:
        line_up(crew, narrow, served, "sub-agent")
        with permit.suspended():
            until(lambda: served, "the sub-agent's turn")
        assert permit.held


def test_who_resumes_goes_before_newcomers_and_the_oldest_first(narrow: ConcurrencyGovernor) -> None:
    suspended: list[str] = []
    served: list[str] = []
    gates = {"older": threading.Event(), "younger": threading.Event()}

    def work(label: str) -> None:
        with narrow.acquire_tool() as permit:
            with permit.suspended():
                suspended.append(label)
                gates[label].wait()
            served.append(label)

    with Crew() as crew:
        for label in ("older", "younger"):
            crew.start(work, label)
            until(lambda it=label: it in suspended, f"the {label} suspended")
        holder = narrow.acquire_stream()
        for label in ("newcomer", "another"):
            line_up(crew, narrow, served, label)
        for number, label in enumerate(["younger", "older"], start=3):
            gates[label].set()
            until(lambda n=number: waiting(narrow) == n, f"the {label} in line")
        holder.release()
    assert served == ["older", "younger", "newcomer", "another"]


@pytest.mark.parametrize("timeout", [0, 1e-9, 0.02])
def test_a_resume_that_times_out_leaves_the_permit_not_held_and_the_outer_exit_quiet(
    narrow: ConcurrencyGovernor, timeout: float
) -> None:
    with narrow.acquire_tool() as permit:
        saying = r"^no tool permit .*: tools 0/1 in use, global 1/1, 0 waiting ahead$"
        with pytest.raises(AcquireTimeout, match=saying), permit.suspended(timeout=timeout):
            other = narrow.acquire_stream()
            began = monotonic()
        assert monotonic() - began >= timeout
        assert not permit.held
        assert repr(permit).endswith("Permit tool released>")
        with pytest.raises(RuntimeError, match="cannot suspend a permit that is not held"):
            permit.suspended().__enter__()
        other.release()
        assert narrow.drain(timeout=0), "it is still in the books"
    assert books(narrow) == (0, 0, 0)
    assert waiting(narrow) == 0


def test_an_error_under_way_stays_the_context_of_a_resume_that_times_out(narrow: ConcurrencyGovernor) -> None:
    caught = pytest.raises(AcquireTimeout)
    with caught as error, narrow.acquire_tool() as permit, permit.suspended(timeout=0.001):
        other = narrow.acquire_tool()
        raise LookupError("the sub-agent's own")
    assert isinstance(error.value.__context__, LookupError)
    other.release()


def test_an_error_passes_a_resume_that_succeeds(narrow: ConcurrencyGovernor) -> None:
    with narrow.acquire_tool() as permit:
        with pytest.raises(LookupError), permit.suspended():
            raise LookupError
        assert permit.held


@pytest.mark.parametrize("timeout", [None, float("inf"), threading.TIMEOUT_MAX * 2, 60])
def test_a_resume_waits_for_its_turn(narrow: ConcurrencyGovernor, timeout: float | None) -> None:
    def work() -> None:
        with narrow.acquire_tool() as permit:
            with permit.suspended(timeout):
                others.append(narrow.acquire_tool())
            assert permit.held

    others: list[ConcurrencyPermit] = []
    with Crew() as crew:
        crew.start(work)
        until(lambda: waiting(narrow) == 1, "the owner in line")
        others.pop().release()
    assert books(narrow) == (0, 0, 0)


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), (True, TypeError), ("1", TypeError)]
)
def test_a_bad_timeout_is_refused_before_anything_is_given_back(
    gov: ConcurrencyGovernor, timeout: float, error: type[Exception]
) -> None:
    with gov.acquire_tool() as permit:
        with pytest.raises(error, match="timeout must be a number of seconds >= 0 or None"):
            permit.suspended(timeout)
        assert permit.held


def test_who_resumes_is_not_refused_by_a_full_line() -> None:
    gov, served = ConcurrencyGovernor(1, 1, 1, max_queued=1), []
    with Crew() as crew:

        def work() -> None:
            with gov.acquire_tool() as permit:
                with permit.suspended():
                    others.append(gov.acquire_tool())
                    line_up(crew, gov, served, "newcomer")
                served.append("resumed")

        others: list[ConcurrencyPermit] = []
        crew.start(work)
        until(lambda: waiting(gov) == 2, "the owner in a line that was full")
        others.pop().release()
    assert served == ["resumed", "newcomer"]


def test_who_resumes_is_not_refused_by_a_closed_governor(narrow: ConcurrencyGovernor) -> None:
    def work() -> None:
        with narrow.acquire_tool() as permit:
            with permit.suspended():
                others.append(narrow.acquire_tool())
                gate.wait()
            assert permit.held
            with permit.suspended():
                assert not permit.held
            assert permit.held

    others: list[ConcurrencyPermit] = []
    gate = threading.Event()
    with Crew() as crew:
        crew.start(work)
        until(lambda: others, "the owner suspended")
        narrow.close()
        gate.set()
        until(lambda: waiting(narrow) == 1, "the owner in line")
        others.pop().release()
    assert books(narrow) == (0, 0, 0)


def test_who_waits_to_resume_stays_in_line_when_the_governor_closes(narrow: ConcurrencyGovernor) -> None:
    def work() -> None:
        with narrow.acquire_tool() as permit:
            with permit.suspended():
                others.append(narrow.acquire_tool())
            assert permit.held

    def refused() -> None:
        with pytest.raises(SemaphoreClosed):
            narrow.acquire_tool()

    others: list[ConcurrencyPermit] = []
    with Crew() as crew:
        crew.start(work)
        until(lambda: waiting(narrow) == 1, "the owner in line")
        crew.start(refused)
        until(lambda: waiting(narrow) == 2, "a newcomer in line")
        narrow.close()
        until(lambda: waiting(narrow) == 1, "the newcomer turned out")
        others.pop().release()
    assert books(narrow) == (0, 0, 0)


@pytest.mark.in_process_only  # a fleet cannot be asked in there
def test_who_resumes_inside_the_governor_itself_passes_by_a_close_and_never_waits(
    narrow: ConcurrencyGovernor,
) -> None:
    lock = narrow._global.tree.lock  # held as a signal handler would find it
    with narrow.acquire_tool() as permit, lock:
        with permit.suspended():
            narrow.close()
        assert permit.held
    other = ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=1)
    with other.acquire_tool() as permit:
        lock = other._global.tree.lock
        with pytest.raises(ConcurrencyLimitExceeded, match="must not wait"), lock, permit.suspended():
            taken = other.acquire_tool()
        assert not permit.held
    taken.release()
    assert books(other) == (0, 0, 0)


def test_a_permit_released_while_suspended_is_not_taken_again(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool() as permit:
        with permit.suspended():
            permit.release()
        assert not permit.held
        assert books(gov) == (0, 0, 0)


def test_a_permit_released_while_it_waits_to_resume_ends_the_wait_not_held(
    narrow: ConcurrencyGovernor,
) -> None:
    def work() -> None:
        with narrow.acquire_tool() as permit:
            permits.append(permit)
            with permit.suspended():
                others.append(narrow.acquire_tool())
            assert not permit.held

    permits: list[ConcurrencyPermit] = []
    others: list[ConcurrencyPermit] = []
    with Crew() as crew:
        crew.start(work)
        until(lambda: waiting(narrow) == 1, "the owner in line")
        permits.pop().release()
    assert waiting(narrow) == 0
    assert books(narrow) == (0, 1, 1)
    others.pop().release()


def test_suspending_one_permit_leaves_another_of_the_thread_alone(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_stream() as stream, gov.acquire_tool() as tool:
        with tool.suspended():
            assert (stream.held, tool.held) == (True, False)
            assert books(gov) == (1, 0, 1)
        assert books(gov) == (1, 1, 2)
