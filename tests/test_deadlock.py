"""A wait that can never end raises at once, and none that may end does."""

from __future__ import annotations

import gc
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from threads import PATIENCE, Crew, is_idle, until

import governor
from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyPermit,
    DeadlockError,
    GovernedExecutor,
)
from governor._deadlock import find_circle

pytestmark = pytest.mark.every_governor


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=4)


def waiting(gov: ConcurrencyGovernor) -> int:
    return gov.stats().streams_waiting + gov.stats().tools_waiting


def assert_no_alarm(gov: ConcurrencyGovernor, wait: Callable[[], object], end: Callable[[], object]) -> None:
    """Let a thread wait, see it stand in line, and let ``end`` end that."""
    with Crew() as crew:
        crew.start(wait)
        until(lambda: waiting(gov) == 1, "the wait to begin")
        end()


# ------------------------------------------------------------------------------------- proven


def test_a_thread_that_waits_for_itself_is_told_at_once(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool():
        with pytest.raises(DeadlockError) as caught:
            gov.acquire_tool()
        assert gov.stats().tools_in_use == 1
    assert is_idle(gov)
    me = threading.current_thread().name
    assert str(caught.value) == (
        "no tool permit can ever come: tools 1/1, global 1/4 in use; "
        f"thread {me!r} holds 1 tool permit and waits for 1 tool permit. "
        "Give the place back while waiting for others: 'with governor.suspended():'"
    )


def test_the_error_has_what_its_message_says_and_crosses_a_process_pool() -> None:
    gov = ConcurrencyGovernor(0, 2, 2, name="api")
    with gov.acquire_tool(), gov.acquire_tool(), pytest.raises(DeadlockError) as caught:
        gov.acquire_tool()
    error = caught.value
    assert (error.what, error.governor) == ("tool permit", "api")
    assert error.layers == (("tools", 2, 2), ("global", 2, 2))
    assert error.circle == ((threading.current_thread().name, ("tool permit",) * 2, "tool permit"),)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.circle) == (str(error), error.circle)


def test_the_global_layer_closes_circles_too() -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    with gov.acquire_tool(), pytest.raises(DeadlockError, match="no stream permit can ever come"):
        gov.acquire_stream()
    assert is_idle(gov)


def test_one_of_two_that_cross_is_told_and_the_other_goes_on(gov: ConcurrencyGovernor) -> None:
    outcomes: list[str] = []
    both = threading.Barrier(2)

    def work(first: Callable[[], ConcurrencyPermit], second: Callable[[], ConcurrencyPermit]) -> None:
        try:
            with first():
                both.wait(PATIENCE)
                with second():
                    outcomes.append("both")
        except DeadlockError as error:
            outcomes.append(f"{len(error.circle)} in a circle")

    with Crew() as crew:
        crew.start(work, gov.acquire_tool, gov.acquire_stream)
        crew.start(work, gov.acquire_stream, gov.acquire_tool)
    assert sorted(outcomes) == ["2 in a circle", "both"]
    assert is_idle(gov)


def test_a_ring_of_five_agents_is_broken_where_it_closes() -> None:
    gov = ConcurrencyGovernor(0, 10, 10)
    ring = [gov.agent(f"agent {n}", max_tools=1) for n in range(5)]
    entered = threading.Barrier(6)
    circles: list[tuple[str, ...]] = []

    def work(number: int) -> None:
        with ring[number].acquire_tool():
            entered.wait(PATIENCE)
            until(lambda: waiting(gov) == number, "its turn to wait")
            try:
                with ring[(number + 1) % 5].acquire_tool():
                    pass
            except DeadlockError as error:
                circles.append(tuple(it.thread for it in error.circle))

    with Crew() as crew:
        for number in range(5):
            crew.start(work, number, name=f"worker {number}")
        entered.wait(PATIENCE)
    assert circles == [tuple(f"worker {n}" for n in (4, 0, 1, 2, 3))]
    assert is_idle(gov)


def test_a_layer_of_many_is_stuck_only_when_all_its_holders_are() -> None:
    gov = ConcurrencyGovernor(0, 3, 10)
    free = gov.acquire_tool()
    inside = threading.Barrier(3)
    errors: list[DeadlockError] = []

    def nest() -> None:
        with gov.acquire_tool():
            inside.wait(PATIENCE)
            try:
                gov.acquire_tool().release()
            except DeadlockError as error:
                errors.append(error)

    with Crew() as crew:
        for _ in range(2):
            crew.start(nest)
        inside.wait(PATIENCE)
        until(lambda: waiting(gov) == 2, "both to wait for the third's")
        assert not errors
        free.release()
    assert not errors
    assert is_idle(gov)


def test_decorated_calls_count(gov: ConcurrencyGovernor) -> None:
    @gov.tool
    def outer() -> str:
        return inner()

    @gov.tool
    def inner() -> str:
        return "never"

    @gov.stream
    def stream() -> Iterator[int]:
        gov.acquire_stream()
        return iter(())

    with pytest.raises(DeadlockError):
        outer()
    with pytest.raises(DeadlockError):
        stream()
    assert is_idle(gov)


def test_jobs_count(gov: ConcurrencyGovernor) -> None:
    def job() -> None:
        gov.acquire_tool()

    with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool:
        with pytest.raises(
            DeadlockError, match=r"thread 'ThreadPoolExecutor-.* holds 1 tool permit and waits"
        ):
            pool.submit(job).result(PATIENCE)
        with pytest.raises(DeadlockError):
            pool.submit(pool.submit, int).result(PATIENCE)
    assert is_idle(gov)


def test_a_resize_that_closes_a_circle_tells_the_youngest() -> None:
    gov = ConcurrencyGovernor(max_streams=3, max_tools=3, max_global=9)
    spare = [gov.acquire_tool(), gov.acquire_tool(), gov.acquire_stream(), gov.acquire_stream()]
    told: list[str] = []
    inside = threading.Barrier(2)

    def work(mine: Callable[[], ConcurrencyPermit], theirs: Callable[[], ConcurrencyPermit]) -> None:
        name = threading.current_thread().name
        with mine():
            inside.wait(PATIENCE)
            until(lambda: waiting(gov) == int(name == "younger"), "its turn")
            try:
                theirs().release()
            except DeadlockError:
                told.append(name)

    with Crew() as crew:
        crew.start(work, gov.acquire_tool, gov.acquire_stream, name="elder")
        crew.start(work, gov.acquire_stream, gov.acquire_tool, name="younger")
        until(lambda: waiting(gov) == 2, "both to wait")
        gov.resize(max_streams=1)
        assert not told  # two tools may yet come back
        gov.resize(max_tools=1)
        until(lambda: told == ["younger"], "the younger to be told")
        for permit in spare:
            permit.release()
    assert told == ["younger"]
    assert is_idle(gov)


def test_a_resume_that_closes_a_circle_is_told_and_not_held(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool() as permit:
        suspension = permit.suspended()
        suspension.__enter__()
        with gov.acquire_tool(), pytest.raises(DeadlockError):
            suspension.__exit__(None, None, None)
        assert not permit.held
    assert is_idle(gov)


# ---------------------------------------------------------------------------------- not proven


def test_a_wait_with_a_timeout_is_no_circle(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool(), pytest.raises(AcquireTimeout):
        gov.acquire_tool(timeout=0.01)


def test_a_wait_for_one_who_waits_with_a_timeout_is_no_circle(gov: ConcurrencyGovernor) -> None:
    entered = threading.Event()

    def hold_a_stream() -> None:
        with gov.acquire_stream():
            entered.set()
            with pytest.raises(AcquireTimeout):
                gov.acquire_tool(timeout=0.3)

    with Crew() as crew, gov.acquire_tool():
        crew.start(hold_a_stream)
        assert entered.wait(PATIENCE)
        until(lambda: gov.stats().tools_waiting == 1, "the other to wait")
        gov.acquire_stream().release()


def test_a_request_is_no_wait(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool():
        request = gov.request_tool()
        assert not request.done()
        assert gov.request_tool().cancel()
    request.result(PATIENCE).release()


def test_a_permit_that_nobody_has_entered_may_come_back(gov: ConcurrencyGovernor) -> None:
    def wait() -> None:
        held.append(gov.acquire_tool())
        gov.acquire_tool().release()

    held: list[ConcurrencyPermit] = []
    assert_no_alarm(gov, wait, lambda: held.pop().release())


def test_a_permit_handed_to_another_thread_may_come_back(gov: ConcurrencyGovernor) -> None:
    gate = threading.Event()

    def use(permit: ConcurrencyPermit) -> None:
        with permit:
            assert gate.wait(PATIENCE)

    def wait() -> None:
        crew.start(use, gov.acquire_tool())
        gov.acquire_tool().release()

    with Crew() as crew:
        assert_no_alarm(gov, wait, gate.set)


def test_a_permit_entered_in_a_generator_that_moved_on_may_come_back(gov: ConcurrencyGovernor) -> None:
    def generate() -> Iterator[None]:
        with gov.acquire_tool():
            yield

    running = generate()

    def wait() -> None:
        next(running)
        gov.acquire_tool().release()

    assert_no_alarm(gov, wait, running.close)


def test_a_permit_entered_by_a_context_manager_or_a_stack_may_come_back(gov: ConcurrencyGovernor) -> None:
    @contextmanager
    def tool() -> Iterator[None]:
        with gov.acquire_tool():
            yield

    for enter in (tool, gov.acquire_tool):
        stack = ExitStack()

        def wait(enter: Callable[[], object] = enter, stack: ExitStack = stack) -> None:
            stack.enter_context(enter())  # type: ignore[arg-type]
            with ExitStack() as other:
                other.enter_context(gov.acquire_tool())

        assert_no_alarm(gov, wait, stack.close)


def test_a_permit_entered_by_a_call_may_come_back(gov: ConcurrencyGovernor) -> None:
    entered: list[ConcurrencyPermit] = []

    def wait() -> None:
        entered.append(gov.acquire_tool())
        entered[0].__enter__()
        gov.acquire_tool().release()

    assert_no_alarm(gov, wait, lambda: entered[0].release())


def test_a_thread_with_the_ident_of_one_that_is_gone_owns_nothing_of_it(gov: ConcurrencyGovernor) -> None:
    def generate() -> Iterator[None]:
        with gov.acquire_tool():
            yield

    running = generate()
    idents: list[int] = []

    def enter() -> None:
        idents.append(threading.get_ident())
        next(running)

    with Crew() as crew:
        crew.start(enter)
    ticket = next(iter(gov._global.tree.held.values()))

    def wait() -> None:
        ticket.owner = threading.get_ident()  # as the system gives idents again, at its own pleasure
        gov.acquire_tool().release()

    assert_no_alarm(gov, wait, running.close)


def test_a_layer_at_0_is_paused_and_not_stuck(gov: ConcurrencyGovernor) -> None:
    def wait() -> None:
        with gov.acquire_tool():
            gov.resize(max_tools=0)
            gov.acquire_tool().release()

    assert_no_alarm(gov, wait, lambda: gov.resize(max_tools=2))


@pytest.mark.in_process_only  # a handler that comes amid a command to a fleet's server cannot acquire
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to a thread on this platform")
def test_a_thread_that_runs_a_signal_handler_amid_its_wait_does_not_only_wait(
    gov: ConcurrencyGovernor,
) -> None:
    entered, leave = threading.Event(), threading.Event()
    me = threading.get_ident()

    def handle(*_: object) -> None:
        with gov.acquire_tool():
            entered.set()
            assert leave.wait(PATIENCE)

    def other() -> None:
        with gov.acquire_stream():
            until(lambda: gov.stats().streams_waiting == 1, "the main thread to wait")
            signal.pthread_kill(me, signal.SIGUSR1)
            assert entered.wait(PATIENCE)
            request = gov.request_tool()
            request.add_done_callback(lambda it: it.result().release())
            crew.start(lambda: (until(lambda: gov.stats().tools_waiting == 2, "both in line"), leave.set()))
            gov.acquire_tool().release()

    former = signal.signal(signal.SIGUSR1, handle)
    try:
        with Crew() as crew:
            crew.start(other)
            until(lambda: gov.stats().streams_in_use == 1, "the stream to be taken")
            gov.acquire_stream().release()
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_who_waits_for_a_circle_of_others_is_not_in_it() -> None:
    waits = {"me": ["a"], "x": ["b"], "y": ["a"]}
    owns = {"me": {"c": 1}, "x": {"a": 1}, "y": {"b": 1}}
    limits = {"a": 1, "b": 1, "c": 1}
    assert find_circle("me", waits, owns, limits) is None
    assert find_circle("x", waits, owns, limits) == ["x", "y"]


# -------------------------------------------------------------------------------- suspended()


def test_without_permits_suspended_does_nothing(gov: ConcurrencyGovernor) -> None:
    with governor.suspended():
        pass
    assert is_idle(gov)


def test_suspended_gives_back_all_that_the_thread_has_entered_and_takes_it_again() -> None:
    first, second = ConcurrencyGovernor(1, 1, 2), ConcurrencyGovernor(1, 1, 2)
    loose = first.acquire_stream()
    with first.acquire_tool() as tool, second.acquire_stream() as stream:
        with governor.suspended():
            assert (first.stats().tools_in_use, first.stats().streams_in_use) == (0, 1)
            assert is_idle(second)
            with governor.suspended(), first.acquire_tool():  # once more: there is nothing left to suspend
                pass
        assert (tool.held, stream.held) == (True, True)
    loose.release()
    assert is_idle(first)
    assert is_idle(second)


def test_suspended_says_what_it_leaves_held(gov: ConcurrencyGovernor) -> None:
    @contextmanager
    def tool() -> Iterator[None]:
        with gov.acquire_tool():
            yield

    with ExitStack() as stack, tool():
        stack.enter_context(gov.acquire_stream())
        said = r"stays held: use permit\.suspended\(\)"
        with pytest.warns(RuntimeWarning, match=said) as caught, governor.suspended():
            assert gov.stats().global_in_use == 2
        assert [it.filename for it in caught] == [__file__]


def test_suspended_keeps_nothing_of_its_callers(gov: ConcurrencyGovernor) -> None:
    class Local:
        pass

    def call() -> weakref.ref[Local]:
        local = Local()
        with gov.acquire_tool():
            with governor.suspended():
                pass
            with pytest.raises(DeadlockError):
                gov.acquire_tool()
        return weakref.ref(local)

    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()


@pytest.mark.in_process_only
def test_the_threshold_of_slow_waits_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOVERNOR_SLOW_WAIT", "0.5")
    assert ConcurrencyGovernor.from_env()._global.tree.slow_wait == 0.5


def test_suspended_leaves_the_permits_of_other_threads_alone(gov: ConcurrencyGovernor) -> None:
    def suspend() -> None:
        with governor.suspended():
            assert gov.stats().tools_in_use == 1

    with Crew() as crew, gov.acquire_tool():
        crew.start(suspend)
        crew.join()


def test_what_does_not_come_again_in_time_is_not_held() -> None:
    gov = ConcurrencyGovernor(1, 2, 3)
    with gov.acquire_tool() as elder, gov.acquire_tool() as younger:
        with pytest.raises(AcquireTimeout), governor.suspended(timeout=0.01):
            taken = gov.acquire_tool()
        assert (elder.held, younger.held) == (True, False)
    taken.release()
    assert is_idle(gov)


def test_a_tree_of_agents_that_suspend_runs_and_one_that_does_not_is_told_the_cure() -> None:
    gov = ConcurrencyGovernor(max_streams=2, max_tools=2, max_global=2)
    runs: list[int] = []

    def run(agent: ConcurrencyGovernor, depth: int, suspends: bool) -> None:
        @agent.tool
        def delegate(number: int) -> None:
            child = agent.agent(f"child {number}", max_tools=2)
            if suspends:
                with governor.suspended():
                    run(child, depth - 1, suspends)
            else:
                run(child, depth - 1, suspends)

        runs.append(depth)
        if depth:
            with Crew() as crew:
                for number in range(3):
                    crew.start(delegate, number)

    run(gov, 4, suspends=True)
    assert len(runs) == 1 + 3 + 9 + 27 + 81
    assert is_idle(gov)

    @gov.tool
    def descend(depth: int) -> None:
        if depth:
            descend(depth - 1)

    with pytest.raises(DeadlockError, match=r"with governor\.suspended\(\)"):
        descend(4)
    assert is_idle(gov)


# ---------------------------------------------------------------------------------- holders()


def test_holders_says_who_holds_what_for_how_long_the_longest_first() -> None:
    gov = ConcurrencyGovernor(2, 2, 4, name="api")
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with gov.agent("coder", max_tools=1).acquire_tool():
            entered.set()
            assert leave.wait(PATIENCE)

    loose = gov.acquire_stream()
    with Crew() as crew:
        crew.start(hold, name="worker")
        assert entered.wait(PATIENCE)
        holders = gov.holders()
        assert [(it.kind, it.governor, it.thread) for it in holders] == [
            ("stream", "api", None),
            ("tool", "api/coder", "worker"),
        ]
        assert holders[0].seconds >= holders[1].seconds >= 0
        assert [it.kind for it in gov.agent("coder", max_tools=1).holders()] == ["tool"]
        leave.set()
    loose.release()
    assert gov.holders() == []


def test_what_is_suspended_or_waits_is_not_held(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool() as permit, permit.suspended():
        assert gov.holders() == []
        request = gov.request_stream()
        assert [it.kind for it in gov.holders()] == ["stream"]
        assert str(gov.holders()[0]).startswith("stream for 0.")
        request.result(PATIENCE).release()


# ------------------------------------------------------------------------------- the slow wait


def test_a_slow_wait_is_logged_once_with_the_holders(caplog: pytest.LogCaptureFixture) -> None:
    gov = ConcurrencyGovernor(1, 1, 2, slow_wait=0.01, name="api")
    waited: Future[float] = Future()

    def wait() -> None:
        with gov.acquire_tool() as permit:
            waited.set_result(permit.waited)

    with Crew() as crew, gov.acquire_tool():
        crew.start(wait)
        until(lambda: caplog.records, "the line in the log")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("governor", "WARNING")
    assert record.getMessage().startswith(
        f"governor 'api': still waiting for a tool permit after 0.01 s; held: tool of 'api' by thread "
        f"{threading.current_thread().name!r} for "
    )
    assert waited.result(0) >= 0.01


def test_a_wait_that_is_not_slow_or_not_asked_about_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    for gov in (ConcurrencyGovernor(1, 1, 2), ConcurrencyGovernor(1, 1, 2, slow_wait=60)):
        with gov.acquire_tool(), pytest.raises(AcquireTimeout):
            gov.acquire_tool(timeout=0.02)
    assert caplog.records == []


@pytest.mark.parametrize("bad", [-1, "soon"])
def test_a_bad_threshold_is_named(bad: object) -> None:
    with pytest.raises((TypeError, ValueError), match="slow_wait"):
        ConcurrencyGovernor(1, 1, 1, slow_wait=bad)  # type: ignore[arg-type]
