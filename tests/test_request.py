"""Requests: futures that stand in the line like any waiter."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, CancelledError, Future, as_completed, wait
from time import monotonic

import pytest
from threads import PATIENCE, Crew, until

from governor import (
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    SemaphoreClosed,
)

pytestmark = pytest.mark.every_governor

Request = Future[ConcurrencyPermit]


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=2, max_tools=1, max_global=2)


def books(gov: ConcurrencyGovernor) -> tuple[int, int, int]:
    stats = gov.stats()
    return stats.streams_in_use, stats.tools_in_use, stats.global_in_use


def waiting(gov: ConcurrencyGovernor) -> int:
    return gov.stats().streams_waiting + gov.stats().tools_waiting


# ------------------------------------------------------------------------------------- in the line


@pytest.mark.parametrize(("kind", "taken"), [("stream", (1, 0, 1)), ("tool", (0, 1, 1))])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_request_resolves_at_once_where_there_is_room(
    gov: ConcurrencyGovernor, by_name: bool, kind: str, taken: tuple[int, int, int]
) -> None:
    request: Request = getattr(gov, f"request_{kind}")() if by_name else gov.request(kind)  # type: ignore[arg-type]
    with request.result(timeout=0) as permit:
        assert permit.kind == kind
        assert books(gov) == taken
    assert books(gov) == (0, 0, 0)


def test_a_request_of_no_kind_is_refused_by_name(gov: ConcurrencyGovernor) -> None:
    with pytest.raises(ValueError, match="kind must be 'stream' or 'tool', not 'toll'"):
        gov.request("toll")  # type: ignore[arg-type]


def test_requests_and_threads_are_served_in_the_order_of_their_coming(gov: ConcurrencyGovernor) -> None:
    served: list[str] = []

    def thread(label: str) -> None:
        with gov.acquire_tool():
            served.append(label)

    def request(label: str) -> None:
        def use(request: Request) -> None:
            with request.result():
                served.append(label)

        gov.request_tool().add_done_callback(use)

    with Crew() as crew, gov.acquire_tool():
        for number in range(6):
            if number % 2:
                request(str(number))
            else:
                crew.start(thread, str(number))
            until(lambda: waiting(gov) == number + 1, f"{number} in line")  # noqa: B023
    until(lambda: len(served) == 6, "the last callback, which in a fleet another thread may run")
    assert served == list("012345")


def test_a_waiting_request_holds_nothing_and_newcomers_do_not_overtake_it(gov: ConcurrencyGovernor) -> None:
    held, other = gov.acquire_tool(), gov.acquire_stream()
    request = gov.request_stream()  # in line for the global layer
    assert books(gov) == (1, 1, 2)
    held.release()
    assert request.result(timeout=0).held
    assert gov.try_acquire_stream() is None
    for permit in (other, request.result()):
        permit.release()


def test_a_request_under_an_agent_meets_the_limits_of_both(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=1)
    held = gov.acquire_tool()
    request = agent.request_tool()
    assert (agent.stats().tools_waiting, gov.stats().tools_waiting) == (1, 1)
    held.release()
    assert (agent.stats().tools_in_use, gov.stats().tools_in_use) == (1, 1)
    request.result().release()


def test_a_full_line_fails_the_request_and_not_the_call() -> None:
    gov = ConcurrencyGovernor(0, 0, 0, max_queued=1)
    first, second, other = gov.request_tool(), gov.request_tool(), gov.request_stream()
    assert isinstance(second.exception(timeout=0), ConcurrencyLimitExceeded)
    with pytest.raises(ConcurrencyLimitExceeded, match="line is full"), gov.acquire_tool():
        pass
    assert waiting(gov) == 2
    assert first.cancel()
    assert other.cancel()


def test_a_permit_knows_how_long_its_request_stood_in_line(gov: ConcurrencyGovernor) -> None:
    held, began = gov.acquire_tool(), monotonic()
    request = gov.request_tool()
    until(lambda: monotonic() > began + 0.02, "the clock to advance")
    held.release()
    with request.result() as permit:
        assert 0.015 < permit.waited <= monotonic() - began


def test_a_result_that_is_not_waited_for_any_longer_leaves_the_request_in_line(
    gov: ConcurrencyGovernor,
) -> None:
    with gov.acquire_tool():
        request = gov.request_tool()
        with pytest.raises(TimeoutError):
            request.result(timeout=0.001)
        assert waiting(gov) == 1
    request.result(timeout=0).release()


def test_a_request_made_where_waiting_is_impossible_fails_at_once(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool(), gov._global.tree.lock:  # as a signal handler would find it
        request = gov.request_tool()
    assert isinstance(request.exception(timeout=0), ConcurrencyLimitExceeded)
    assert books(gov) == (0, 0, 0)


# ---------------------------------------------------------------------------------------- cancelled


def test_cancelling_leaves_the_line_to_those_behind(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool():
        first, second = gov.request_tool(), gov.request_tool()
        assert first.cancel()
        assert first.cancel()
        assert waiting(gov) == 1
    with second.result(timeout=0), pytest.raises(CancelledError):
        first.result()
    assert books(gov) == (0, 0, 0)


def test_cancelling_a_request_in_the_way_lets_the_other_kind_through() -> None:
    gov = ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)
    with gov.acquire_tool():
        blocked, free = gov.request_tool(), gov.request_stream()
        free.result(timeout=0).release()
        assert blocked.cancel()
    assert gov.acquire_tool(timeout=0).release() is None


def test_a_granted_request_can_no_longer_be_cancelled(gov: ConcurrencyGovernor) -> None:
    request = gov.request_tool()
    assert not request.cancel()
    with request.result():
        assert not request.cancel()
        assert books(gov) == (0, 1, 1)


def test_a_grant_that_meets_a_cancelled_request_goes_to_the_next() -> None:
    gov = ConcurrencyGovernor(0, 0, 2)
    first, second, third = (gov.request_tool() for _ in range(3))
    first.add_done_callback(lambda _: second.cancel())  # granted by now, and not delivered
    gov.resize(max_tools=2)
    assert second.cancelled()
    for request in (first, third):
        request.result(timeout=0).release()
    assert books(gov) == (0, 0, 0)


@pytest.mark.parametrize("cancel_first", [True, False])
def test_those_who_wait_for_a_cancelled_request_are_told(
    gov: ConcurrencyGovernor, cancel_first: bool
) -> None:
    told: list[Request] = []

    def look() -> None:
        told.extend(wait([request], PATIENCE, ALL_COMPLETED).done)
        told.extend(as_completed([request], PATIENCE))

    with gov.acquire_tool():
        request = gov.request_tool()
        with Crew() as crew:
            if cancel_first:
                request.cancel()
            crew.start(look)
            until(lambda: cancel_first or request._waiters, "the look at it")
            request.cancel()
    assert told == [request, request]


# ---------------------------------------------------------------------------------------- callbacks


def test_callbacks_run_outside_the_lock(gov: ConcurrencyGovernor) -> None:
    seen: list[object] = []

    def look(_: Request) -> None:
        with Crew() as crew:
            crew.start(lambda: seen.append(gov.stats().tools_in_use))

    with gov.acquire_tool():
        request = gov.request_tool()
        request.add_done_callback(look)
    assert seen == [1]
    request.result().release()


def test_a_callback_that_fails_is_reported_and_the_others_run(
    gov: ConcurrencyGovernor, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[Request] = []
    with gov.acquire_tool():
        request = gov.request_tool()
        request.add_done_callback(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
        request.add_done_callback(ran.append)
    assert ran == [request]
    assert "ZeroDivisionError" in caplog.text
    request.result().release()


def test_a_long_line_of_requests_that_are_done_at_once_does_not_nest(gov: ConcurrencyGovernor) -> None:
    served: list[int] = []

    def use(request: Request) -> None:
        served.append(len(served))
        request.result().release()

    with gov.acquire_tool():
        for _ in range(2_000):
            gov.request_tool().add_done_callback(use)
    assert served == list(range(2_000))


def test_a_callback_may_ask_for_the_next_permit_and_have_it_at_once(gov: ConcurrencyGovernor) -> None:
    streams: list[ConcurrencyPermit] = []
    with gov.acquire_tool():
        request = gov.request_tool()
        request.add_done_callback(lambda _: streams.append(gov.request_stream().result(timeout=0)))
    assert books(gov) == (1, 1, 2)
    for permit in (*streams, request.result()):
        permit.release()


# ------------------------------------------------------------------------------------------ dropped


def test_a_request_that_is_dropped_with_its_permit_gives_it_back(gov: ConcurrencyGovernor) -> None:
    with pytest.warns(ResourceWarning, match="dropped unreleased"):
        gov.request_tool()
    assert books(gov) == (0, 0, 0)


@pytest.mark.in_process_only  # a fleet is told of what was dropped by another thread
def test_a_request_that_is_dropped_in_line_passes_its_turn_on(gov: ConcurrencyGovernor) -> None:
    held = gov.acquire_tool()
    gov.request_tool()
    last = gov.request_tool()
    assert waiting(gov) == 2
    with pytest.warns(ResourceWarning, match="dropped unreleased"):
        held.release()
    last.result(timeout=0).release()


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def granted_at_once(gov: ConcurrencyGovernor) -> Request:
    request = gov.request_tool()
    request.result().release()
    return request


def granted_later(gov: ConcurrencyGovernor) -> Request:
    with gov.acquire_tool():
        request = gov.request_tool()
    request.result().release()
    return request


def cancelled(gov: ConcurrencyGovernor) -> Request:
    with gov.acquire_tool():
        request = gov.request_tool()
        request.cancel()
    return request


def closed(gov: ConcurrencyGovernor) -> Request:
    with gov.acquire_tool():
        request = gov.request_tool()
        gov.close()
    return request


def refused(gov: ConcurrencyGovernor) -> Request:
    gov.close()
    return gov.request_tool()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("end", [granted_at_once, granted_later, cancelled, closed, refused])
def test_a_request_that_is_over_needs_no_collector(
    gov: ConcurrencyGovernor, end: Callable[[ConcurrencyGovernor], Request]
) -> None:
    request = end(gov)
    gone = weakref.ref(request)
    del request
    assert gone() is None


# ------------------------------------------------------------------------------------------- closed


def test_close_fails_every_request_in_line_and_every_later_one(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool() as held:
        early = [gov.request_tool() for _ in range(3)]
        gov.close()
        for request in (*early, gov.request_tool(), gov.request_stream()):
            assert isinstance(request.exception(timeout=0), SemaphoreClosed)
        assert held.held
    assert waiting(gov) == 0


def test_closing_an_agent_fails_its_requests_only(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=2)
    with gov.acquire_tool():
        its, ours = agent.request_tool(), gov.request_tool()
        agent.close()
        assert isinstance(its.exception(timeout=0), SemaphoreClosed)
        assert not ours.done()
    ours.result(timeout=0).release()


def test_a_request_granted_before_the_close_stays_good(gov: ConcurrencyGovernor) -> None:
    request = gov.request_tool()
    gov.close()
    assert request.result(timeout=0).held
    drained = threading.Event()

    def drain() -> None:
        assert gov.drain()
        drained.set()

    with Crew() as crew:
        crew.start(drain)
        assert not drained.is_set()
        request.result().release()
