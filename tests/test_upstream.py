"""What went wrong elsewhere, each as a test: the docstrings name the projects and their issues."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import pytest
from threads import Crew, until

import governor._tree
from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    Layer,
    SemaphoreClosed,
)
from governor._tree import Tree


class Cancelled(BaseException):
    """Stands for whatever ends a wait from outside: KeyboardInterrupt, SystemExit, a timer's exception."""


class Sleep:
    """In the place of the tree's `_opens`, the one place where a waiter sleeps.

    What `instead` maps a thread to is called when it falls asleep, in its place. `run_out` makes
    the time of a sleeper run out.
    """

    def __init__(self, sleep: Callable[[Any, float | None], None]) -> None:
        self.sleep = sleep
        self.instead: dict[int, Callable[[], object]] = {}
        self.gates: dict[int, Any] = {}

    def __call__(self, gate: Any, timeout: float | None) -> None:
        if instead := self.instead.pop(get_ident(), None):
            instead()
            return
        self.gates[get_ident()] = gate
        self.sleep(gate, timeout)
        del self.gates[get_ident()]

    def run_out(self, thread: threading.Thread) -> None:
        ident = thread.ident or 0
        until(lambda: ident in self.gates, "the waiter's falling asleep")
        self.gates[ident].release()


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Sleep:
    sleep = Sleep(governor._tree._opens)
    monkeypatch.setattr(governor._tree, "_opens", sleep)
    return sleep


class Line:
    """Threads that come one after another, each awaited to be in line, and note their turns."""

    def __init__(self, gov: ConcurrencyGovernor) -> None:
        self.gov, self.crew = gov, Crew()
        self.turns: list[str] = []
        self.errors: list[Exception] = []

    def join(
        self, name: str, kind: Any, by: ConcurrencyGovernor | None = None, timeout: float | None = None
    ) -> threading.Thread:
        before = waiting(self.gov)

        def work() -> None:
            try:
                with (by or self.gov).acquire(kind, timeout):
                    self.turns.append(name)
            except (AcquireTimeout, SemaphoreClosed) as error:
                self.errors.append(error.with_traceback(None))

        thread = self.crew.start(work, name=name)
        until(lambda: waiting(self.gov) == before + 1, f"{name} in line")
        return thread

    def __enter__(self) -> Line:
        self.crew.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.crew.__exit__(*error)


def waiting(gov: ConcurrencyGovernor) -> int:
    stats = gov.stats()
    return stats.streams_waiting + stats.tools_waiting


def in_use(gov: ConcurrencyGovernor) -> tuple[int, int, int]:
    stats = gov.stats()
    return stats.streams_in_use, stats.tools_in_use, stats.global_in_use


def assert_all_is_back(gov: ConcurrencyGovernor) -> None:
    assert in_use(gov) == (0, 0, 0)
    assert waiting(gov) == 0
    assert gov.drain(timeout=0)


# ------------------------------------------------------------------- a permit that gets lost


@pytest.fixture(params=["as it wakes", "as it leaves the line"])
def granted_late(
    request: pytest.FixtureRequest, sleep: Sleep, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], object]], None]:
    """Let this thread's next wait time out, and a grant come in just then."""

    def install(grant: Callable[[], object]) -> None:
        if request.param == "as it wakes":
            sleep.instead[get_ident()] = grant
            return
        sleep.instead[get_ident()] = lambda: None
        withdraw = Tree.withdraw

        def granted_first(tree: Tree, ticket: Any) -> Any:
            grant()
            return withdraw(tree, ticket)

        monkeypatch.setattr(Tree, "withdraw", granted_first)

    return install


GRANTS: dict[str, Callable[[ConcurrencyGovernor, ConcurrencyPermit], object]] = {
    "a release": lambda gov, held: held.release(),
    "a larger limit": lambda gov, held: gov.resize(max_tools=2),
    "a suspension": lambda gov, held: held.suspended().__enter__(),
}


@pytest.mark.parametrize("grant", GRANTS.values(), ids=GRANTS)
def test_a_permit_granted_just_as_its_waiter_times_out_is_not_lost(
    granted_late: Callable[[Callable[[], object]], None],
    grant: Callable[[ConcurrencyGovernor, ConcurrencyPermit], object],
) -> None:
    """failsafe #393 and #400: the permit was handed to a waiter that had gone, and nobody gave it back.

    Netflix concurrency-limits #179: a token acquired around the time that the wait timed out.
    """
    gov = ConcurrencyGovernor(1, 1, 2)
    with gov.acquire_tool() as held:
        granted_late(lambda: grant(gov, held))
        with gov.acquire_tool(timeout=60) as permit:
            assert permit.held
            assert waiting(gov) == 0
    assert_all_is_back(gov)


def test_a_place_granted_just_as_a_resuming_operation_times_out_is_not_lost(
    granted_late: Callable[[Callable[[], object]], None],
) -> None:
    """failsafe #400, for an operation on its way back."""
    gov = ConcurrencyGovernor(1, 1, 1)
    with gov.acquire_tool() as permit:
        with permit.suspended(timeout=60):
            other = gov.acquire_tool()
            granted_late(other.release)
        assert permit.held
        assert in_use(gov) == (0, 1, 1)
    assert_all_is_back(gov)


def test_a_layer_granted_just_as_its_waiter_times_out_is_taken(
    granted_late: Callable[[Callable[[], object]], None],
) -> None:
    """failsafe #400, for a bare layer."""
    layer = Layer(1)
    assert layer.acquire()
    granted_late(layer.release)
    assert layer.acquire(timeout=60)
    layer.release()
    assert layer.available == 1


def test_as_many_timeouts_as_there_are_permits_cost_no_permit() -> None:
    """failsafe #393: eight callers that timed out brought a bulkhead of eight down to none, for good."""
    gov = ConcurrencyGovernor(8, 8, 8)
    held = [gov.acquire_tool() for _ in range(8)]
    for _ in range(8):
        with pytest.raises(AcquireTimeout):
            gov.acquire_tool(timeout=1e-4)
    for permit in held:
        permit.release()
    again = [gov.try_acquire_tool() for _ in range(8)]
    assert all(again)
    for permit in again:
        permit.release()
    assert_all_is_back(gov)


def test_a_waiter_cancelled_just_as_it_is_granted_passes_the_permit_on(sleep: Sleep) -> None:
    """anyio #947 and, of its fix for #1170, the other half: who was granted and cancelled gives it on."""
    gov = ConcurrencyGovernor(1, 1, 1)
    held = gov.acquire_tool()
    with Line(gov) as line:

        def be_cancelled() -> None:
            line.join("the next", "tool")
            held.release()
            raise Cancelled

        sleep.instead[get_ident()] = be_cancelled
        with pytest.raises(Cancelled):
            gov.acquire_tool()
    assert line.turns == ["the next"]
    assert_all_is_back(gov)


def test_a_waiter_cancelled_in_the_line_leaves_no_ghost(sleep: Sleep) -> None:
    """failsafe #400: the waiter that had given up stayed in the queue, and got the next permit."""
    gov = ConcurrencyGovernor(1, 1, 1)
    held = gov.acquire_tool()

    def be_cancelled() -> None:
        raise Cancelled

    sleep.instead[get_ident()] = be_cancelled
    with pytest.raises(Cancelled):
        gov.acquire_stream()
    assert waiting(gov) == 0
    held.release()
    with gov.acquire_stream(timeout=0):
        pass
    assert_all_is_back(gov)


def test_an_operation_cancelled_as_it_resumes_leaves_no_ghost_and_is_not_held(sleep: Sleep) -> None:
    """failsafe #400, for an operation on its way back: its outer block has not ended yet."""
    gov = ConcurrencyGovernor(1, 1, 1)

    def be_cancelled() -> None:
        assert waiting(gov) == 1
        raise Cancelled

    with gov.acquire_tool() as permit:
        with pytest.raises(Cancelled), permit.suspended():
            other = gov.acquire_tool()
            sleep.instead[get_ident()] = be_cancelled
        assert waiting(gov) == 0
        assert not permit.held
        other.release()
        assert_all_is_back(gov)


@pytest.mark.parametrize(
    "error", [ValueError, asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit]
)
def test_an_operation_that_is_cancelled_gives_its_place_back(error: type[BaseException]) -> None:
    """resilience4j #332: the reactor operator did not release on cancel. LiteLLM #20256: nor on timeouts."""
    gov = ConcurrencyGovernor(1, 1, 1)
    with pytest.raises(error), gov.acquire_stream():
        raise error
    assert_all_is_back(gov)


@pytest.mark.parametrize("end", ["close", "drop"])
def test_a_stream_cancelled_half_way_gives_its_place_back(end: str) -> None:
    """LiteLLM #27955: the slot came back only where the stream was read to its end."""
    gov = ConcurrencyGovernor(1, 1, 1)

    def tokens() -> Iterator[int]:
        with gov.acquire_stream():
            yield from range(10)

    stream = tokens()
    assert next(stream) == 0
    if end == "close":
        stream.close()
    del stream
    until(lambda: in_use(gov) == (0, 0, 0), "the place back")
    assert_all_is_back(gov)


def test_a_waiter_that_fails_at_the_global_layer_keeps_no_slot_of_its_own(sleep: Sleep) -> None:
    """hyx: a slot of the first of two semaphores was lost when the wait for the second one failed."""
    gov = ConcurrencyGovernor(5, 5, 1)

    def be_cancelled() -> None:
        assert in_use(gov) == (1, 0, 1)
        raise Cancelled

    held = gov.acquire_stream()
    for _ in range(10):
        with pytest.raises(AcquireTimeout):
            gov.acquire_tool(timeout=1e-4)
        sleep.instead[get_ident()] = be_cancelled
        with pytest.raises(Cancelled):
            gov.acquire_tool()
        assert gov.try_acquire_tool() is None
    assert gov.stats().tools_available == 5
    held.release()
    assert_all_is_back(gov)


def test_capacity_does_not_decay(sleep: Sleep) -> None:
    """Netflix concurrency-limits #179, LiteLLM #20256: each failure cost a permit, until none was left."""
    gov = ConcurrencyGovernor(2, 2, 3, max_queued=0)
    agent = gov.agent("coder", max_tools=1)
    for _ in range(200):
        with gov.acquire_tool() as permit, agent.acquire_tool():
            with pytest.raises(AcquireTimeout):
                agent.acquire_tool(timeout=0)
            with pytest.raises(ConcurrencyLimitExceeded):
                gov.acquire_tool()
            assert gov.try_acquire_tool() is None
            with pytest.raises(AcquireTimeout), permit.suspended(timeout=1e-9):
                taken = gov.acquire_tool()
            taken.release()
            taken.release()
        with pytest.raises(Cancelled), agent.acquire_stream():
            raise Cancelled
    capacity = [gov.try_acquire_stream(), gov.try_acquire_stream(), agent.try_acquire_tool()]
    assert all(capacity)
    assert gov.try_acquire_tool() is None
    for permit in capacity:
        permit.release()
    assert_all_is_back(gov)


# ------------------------------------------------------------------------------- one too many


def test_a_try_between_a_release_and_the_waiters_waking_fails(sleep: Sleep, monkeypatch: Any) -> None:
    """anyio #1170: in that window the freed token, meant for the waiter, was given to a second one."""
    gov = ConcurrencyGovernor(1, 1, 1)
    woken, go_on = threading.Event(), threading.Event()
    usual = sleep.sleep

    def wake_late(gate: Any, timeout: float | None) -> None:
        usual(gate, timeout)
        woken.set()
        go_on.wait()

    sleep.sleep = wake_late
    held = gov.acquire_tool()
    with Line(gov) as line:
        line.join("waiter", "tool")
        held.release()
        until(woken.is_set, "the waiter's waking")
        assert gov.try_acquire_tool() is None
        assert in_use(gov) == (0, 1, 1)
        assert line.turns == []
        go_on.set()
    assert_all_is_back(gov)


def test_a_limit_that_shrank_and_grows_a_little_lets_nobody_in_while_it_is_over() -> None:
    """anyio #1223: raising the total by one woke one, though more were inside than the new total."""
    gov = ConcurrencyGovernor(3, 3, 3)
    held = [gov.acquire_tool() for _ in range(3)]
    with Line(gov) as line:
        line.join("first", "tool")
        line.join("second", "tool")
        gov.resize(max_tools=1)
        gov.resize(max_tools=2)
        assert (in_use(gov), waiting(gov)) == ((0, 3, 3), 2)
        held.pop().release()
        assert (in_use(gov), waiting(gov)) == ((0, 2, 2), 2)
        assert gov.stats().tools_available == 0
        held.pop().release()
        until(lambda: line.turns == ["first", "second"], "both turns")
        held.pop().release()
    assert_all_is_back(gov)


@pytest.mark.parametrize("how", ["try", "acquire"])
@pytest.mark.parametrize("last", ["of all", "of its kind", "of its agent"])
def test_of_many_that_want_the_last_permit_at_once_one_gets_it(how: str, last: str) -> None:
    """Netflix concurrency-limits #140: look at the count, then take, and two had taken."""
    top = ConcurrencyGovernor(16, 1 if last == "of its kind" else 16, 16)
    gov = top.agent("coder", max_tools=1 if last == "of its agent" else 16)
    rest = [top.acquire_stream() for _ in range(15 if last == "of all" else 0)]
    rounds, threads = 30, 16
    together = threading.Barrier(threads)
    taken: list[ConcurrencyPermit] = []
    counts: list[int] = []

    def work() -> None:
        for _ in range(rounds):
            together.wait()
            if how == "try":
                if permit := gov.try_acquire_tool():
                    taken.append(permit)
            else:
                try:
                    taken.append(gov.acquire_tool(timeout=0))
                except AcquireTimeout:
                    pass
            if together.wait() == 0:
                counts.append(len(taken))
                while taken:
                    taken.pop().release()

    with Crew() as crew:
        for _ in range(threads):
            crew.start(work)
    assert counts == [1] * rounds
    for permit in rest:
        permit.release()
    assert_all_is_back(top)


def test_a_permit_released_by_many_threads_at_once_comes_back_once() -> None:
    """resilience4j #1569: a release that was run twice made the bulkhead larger than it was set to be."""
    gov = ConcurrencyGovernor(2, 2, 2)
    together = threading.Barrier(16)
    other = gov.acquire_tool()
    with gov.acquire_tool() as permit:

        def release() -> None:
            together.wait()
            permit.release()

        with Crew() as crew:
            for _ in range(16):
                crew.start(release)
        assert in_use(gov) == (0, 1, 1)
    assert in_use(gov) == (0, 1, 1)
    other.release()
    assert_all_is_back(gov)


def test_a_permit_released_by_another_thread_just_as_it_resumes_stays_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """resilience4j #1569: an end that comes twice; here between the look at the permit and the line."""
    gov = ConcurrencyGovernor(1, 1, 1)
    lock = governor._tree.Lock

    def release_first() -> Any:
        monkeypatch.setattr(governor._tree, "Lock", lock)
        with Crew() as crew:
            crew.start(permit.release)
        return lock()

    with gov.acquire_tool() as permit:
        with permit.suspended():
            monkeypatch.setattr(governor._tree, "Lock", release_first)
        assert not permit.held
        assert in_use(gov) == (0, 0, 0)
    assert_all_is_back(gov)


def test_agents_share_one_limit_and_do_not_multiply_it() -> None:
    """LightRAG #3253: four workers with a limit of four each sent sixteen calls. deer-flow #4294."""
    gov = ConcurrencyGovernor(4, 4, 4)
    agents = [gov.agent(f"agent {number}", max_tools=4) for number in range(4)]
    leave, inside = threading.Event(), threading.Semaphore(0)

    def work(agent: ConcurrencyGovernor) -> None:
        with agent.acquire_tool():
            inside.release()
            leave.wait()

    with Crew() as crew:
        for number in range(16):
            crew.start(work, agents[number % 4])
        until(lambda: waiting(gov) == 12, "twelve in line")
        assert in_use(gov) == (0, 4, 4)
        assert sum(agent.stats().tools_in_use for agent in agents) == 4
        assert all(inside.acquire(timeout=8) for _ in range(4))
        assert not inside.acquire(blocking=False)
        leave.set()
    assert_all_is_back(gov)


# ----------------------------------------------------------------------------------- half taken


def test_an_acquire_that_is_refused_is_never_seen_half_taken() -> None:
    """.NET's chained limiter takes one limiter after the other, and rolls back where one refuses."""
    gov = ConcurrencyGovernor(4, 4, 1)
    agent = gov.agent("coder", max_tools=4)
    done = threading.Event()

    def fail(number: int) -> None:
        for _ in range(100):
            assert gov.try_acquire_tool() is None
            assert agent.try_acquire_tool() is None
            with pytest.raises(AcquireTimeout):
                agent.acquire_tool(timeout=1e-6 * number)

    def look() -> None:
        while not done.is_set():
            assert in_use(gov) == (1, 0, 1)
            assert in_use(agent) == (1, 0, 1)

    with gov.acquire_stream(), Crew() as lookers:
        lookers.start(look)
        with Crew() as crew:
            for number in range(16):
                crew.start(fail, number)
        done.set()
    assert_all_is_back(gov)


def test_who_waited_for_one_layer_is_counted_once_in_each() -> None:
    """dotnet/runtime #113314: a request queued by the inner limiter counted twice for the outer one."""
    gov = ConcurrencyGovernor(1, 1, 9)
    agent = gov.agent("coder", max_tools=1)
    held = agent.acquire_tool()
    leave = threading.Event()

    def work() -> None:
        with agent.acquire_tool():
            leave.wait()

    with Crew() as crew:
        crew.start(work)
        until(lambda: waiting(gov) == 1, "one in line")
        assert in_use(gov) == in_use(agent) == (0, 1, 1)
        held.release()
        assert in_use(gov) == in_use(agent) == (0, 1, 1)
        leave.set()
    assert_all_is_back(gov)


# --------------------------------------------------------------------------------- resize, close


def test_a_resize_does_not_wait_for_permits_to_come_back() -> None:
    """resilience4j's `changeConfig` and #981: shrinking took permits from the semaphore, and hung."""
    gov = ConcurrencyGovernor(4, 4, 4)
    with Line(gov) as line, gov.acquire_tool(), gov.acquire_tool(), gov.acquire_tool(), gov.acquire_tool():
        for name in "abc":
            line.join(name, "tool")
        gov.resize(max_streams=0, max_tools=1, max_global=1)  # in the thread that holds all
        assert gov.stats().tools_max == 1
        assert (in_use(gov), waiting(gov)) == ((0, 4, 4), 3)
    assert line.turns == ["a", "b", "c"]
    assert_all_is_back(gov)


def test_a_resize_does_not_reopen_what_was_closed() -> None:
    """tokio #8020: taking permits from a closed semaphore cleared the bit that said so."""
    gov = ConcurrencyGovernor(1, 1, 1)
    agent = gov.agent("coder", max_tools=1)
    agent.close()
    agent.resize(max_tools=0)
    agent.resize(max_tools=5)
    assert agent.closed
    assert agent.try_acquire_tool() is None
    with pytest.raises(SemaphoreClosed):
        agent.acquire_tool()
    with gov.acquire_tool():
        gov.close()
        gov.resize(max_streams=0, max_tools=0, max_global=0)
        gov.resize(max_streams=9, max_tools=9, max_global=9)
        assert gov.closed
        assert gov.try_acquire_stream() is None
        with pytest.raises(SemaphoreClosed):
            gov.acquire_tool()
    assert_all_is_back(gov)


def test_a_resize_does_not_reopen_a_closed_layer() -> None:
    """tokio #8020, for a bare layer and one below it; the one above it stays open."""
    above = Layer(1)
    layer = Layer(1, parent=above)
    below = Layer(1, parent=layer)
    layer.close()
    for each in (above, layer, below):
        each.resize(3)
    assert [each.closed for each in (above, layer, below)] == [False, True, True]
    assert not below.acquire(blocking=False)
    with pytest.raises(SemaphoreClosed):
        below.acquire()
    with above:
        assert above.available == 2


# ---------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("kind", "other"), [("tool", "stream"), ("stream", "tool")])
def test_a_backlog_of_one_kind_takes_neither_the_others_room_nor_the_global_budget(
    kind: Any, other: Any
) -> None:
    """Two nested semaphores, global first: whoever waits for its kind holds a place of all."""
    gov = ConcurrencyGovernor(2, 2, 4)
    with Line(gov) as line, gov.acquire(kind), gov.acquire(kind):
        for number in range(20):
            line.join(f"{number}", kind)
        assert gov.stats().global_in_use == 2
        for _ in range(3):
            with gov.acquire(other, timeout=0), gov.acquire(other, timeout=0):
                assert gov.stats().global_in_use == 4
    assert len(line.turns) == 20
    assert_all_is_back(gov)


def test_a_waiter_for_the_global_layer_never_shows_as_using_its_own() -> None:
    """Two nested semaphores, kind first: whoever waits for the global one holds a place of its kind."""
    gov = ConcurrencyGovernor(4, 4, 2)
    agent = gov.agent("coder", max_tools=4)
    with Line(gov) as line, gov.acquire_tool(), gov.acquire_tool():
        for number in range(3):
            line.join(f"stream {number}", "stream")
        line.join("tool", "tool", by=agent)
        stats = gov.stats()
        assert (stats.streams_in_use, stats.streams_available, stats.streams_waiting) == (0, 4, 3)
        assert (stats.tools_in_use, stats.tools_waiting) == (2, 1)
        assert (agent.stats().tools_available, agent.stats().tools_waiting) == (4, 1)
    assert len(line.turns) == 4
    assert_all_is_back(gov)


def test_the_global_layer_serves_kinds_and_agents_in_the_order_of_their_coming() -> None:
    """Nested semaphores starve: of 32 threads the luckiest got 8,696 turns, the unluckiest one."""
    gov = ConcurrencyGovernor(8, 8, 1)
    coder = gov.agent("coder", max_tools=8, max_streams=8)
    tester = coder.agent("tester", max_tools=8)
    with Line(gov) as line, gov.acquire_tool():
        line.join("a", "tool", by=tester)
        line.join("b", "stream")
        line.join("c", "stream", by=coder)
        line.join("d", "tool")
        line.join("e", "stream", by=tester)
        line.join("f", "tool", by=coder)
    assert line.turns == ["a", "b", "c", "d", "e", "f"]
    assert_all_is_back(gov)


def test_only_those_who_could_not_run_are_passed_over() -> None:
    """Trio's and Go's semaphores stop at the first that cannot run; a kind that is full stops nobody else."""
    gov = ConcurrencyGovernor(2, 1, 2)
    stream, tool = gov.acquire_stream(), gov.acquire_tool()
    with Line(gov) as line:
        line.join("tool", "tool")
        line.join("first stream", "stream")
        line.join("second stream", "stream")
        stream.release()  # room in all but tools
        until(lambda: line.turns == ["first stream", "second stream"], "both streams")
        assert gov.stats().tools_waiting == 1
        tool.release()
    assert line.turns[-1] == "tool"
    assert_all_is_back(gov)


def test_no_newcomer_overtakes_a_waiter_to_whom_the_place_was_handed() -> None:
    """CPython's semaphores throw a freed permit to the crowd, and whoever runs first has it."""
    gov = ConcurrencyGovernor(2, 2, 2)
    agent = gov.agent("coder", max_tools=2)
    held = [gov.acquire_tool(), gov.acquire_tool()]
    leave = threading.Event()

    def work() -> None:
        with gov.acquire_tool():
            leave.wait()

    with Crew() as crew:
        for number in range(2):
            crew.start(work)
            until(lambda number=number: waiting(gov) == number + 1, "one more in line")
        for permit in held:
            permit.release()
            for newcomer in (gov, agent):
                assert newcomer.try_acquire_tool() is None
                assert newcomer.try_acquire_stream() is None
                with pytest.raises(AcquireTimeout):
                    newcomer.acquire_tool(timeout=0)
        leave.set()
    assert_all_is_back(gov)


def test_a_waiter_that_times_out_in_the_middle_of_the_line_leaves_it_and_the_rest_go_on(
    sleep: Sleep,
) -> None:
    """failsafe #400: the abandoned waiter stayed in the queue, in the way of those behind it."""
    gov = ConcurrencyGovernor(2, 2, 1)
    agent = gov.agent("coder", max_tools=1)
    with Line(gov) as line, gov.acquire_tool():
        line.join("first", "tool")
        middle = line.join("middle", "tool", timeout=60)
        of_an_agent = line.join("of an agent", "tool", by=agent, timeout=60)
        line.join("behind it", "tool", by=agent)
        line.join("last", "stream")
        for left, thread in enumerate((middle, of_an_agent)):
            sleep.run_out(thread)
            until(lambda left=left: waiting(gov) == 4 - left, "one less in line")
    assert line.turns == ["first", "behind it", "last"]
    assert [type(error) for error in line.errors] == [AcquireTimeout, AcquireTimeout]
    assert_all_is_back(gov)


def test_the_first_in_line_leaving_lets_the_next_through_at_once(sleep: Sleep) -> None:
    """Where the head of a queue only blocks others, its leaving must wake them; nobody else will."""
    gov = ConcurrencyGovernor(1, 1, 1)
    agent = gov.agent("coder", max_tools=1)
    with Line(gov) as line, gov.acquire_tool():
        head = line.join("head", "tool", by=agent, timeout=60)
        line.join("next", "tool", by=agent)
        sleep.run_out(head)
        until(lambda: waiting(gov) == 1, "the head's leaving")
    assert line.turns == ["next"]
    assert_all_is_back(gov)


def test_a_resumed_operation_goes_before_newcomers() -> None:
    """A tree of agents drains depth first: who was admitted earlier comes back earlier."""
    gov = ConcurrencyGovernor(1, 1, 1)
    turns: list[str] = []
    resume = threading.Event()

    def work() -> None:
        with gov.acquire_tool() as permit:
            with permit.suspended():
                turns.append("suspended")
                resume.wait()
            turns.append("resumed")

    with Line(gov) as line:
        line.turns = turns
        worker = line.crew.start(work)
        until(lambda: turns == ["suspended"], "the suspension")
        with gov.acquire_tool():
            line.join("newcomer", "tool")
            line.join("another", "stream")
            resume.set()
            until(lambda: waiting(gov) == 3, "the resuming one in line")
        worker.join()
    assert turns == ["suspended", "resumed", "newcomer", "another"]
    assert_all_is_back(gov)


def test_a_resumed_operation_takes_no_second_place_along() -> None:
    """Its younger neighbour had been offered the global place; that offer must not outlive the swap."""
    gov = ConcurrencyGovernor(2, 1, 2)
    resume, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gov.acquire_tool() as permit:
            with permit.suspended():
                resume.wait()
            leave.wait()

    with Line(gov) as line:
        line.crew.start(work)
        until(lambda: in_use(gov) == (0, 0, 0) and gov._global.tree.away, "the suspension")
        first, second = gov.acquire_stream(), gov.acquire_stream()
        line.join("younger", "tool")
        resume.set()
        until(lambda: waiting(gov) == 2, "both in line")
        first.release()
        assert (in_use(gov), waiting(gov)) == ((1, 1, 2), 1)
        second.release()
        assert (in_use(gov), waiting(gov)) == ((0, 1, 1), 1)
        leave.set()
    assert line.turns == ["younger"]
    assert_all_is_back(gov)


# --------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("paused", ["max_tools", "max_global"])
def test_a_paused_layer_does_not_grow_with_timeouts(paused: str) -> None:
    """failsafe #393: every waiter that timed out stayed in the list."""
    gov = ConcurrencyGovernor(2, 2, 2)
    agent = gov.agent("coder", max_tools=2)
    gov.resize(**{paused: 0})
    with Line(gov) as line:
        line.join("patient", "tool")
        line.join("patient, of an agent", "tool", by=agent)
        for number in range(5000):
            with pytest.raises(AcquireTimeout):
                (agent if number % 2 else gov).acquire_tool(timeout=1e-9)
        assert waiting(gov) == 2
        for node in (gov._global, gov._tools, agent._tools):
            assert len(node.heap) < 100
        tree = gov._global.tree
        assert len(tree.line) == 2
        assert [*tree.held, *tree.away, *tree.after, *tree.drains] == []
        gov.resize(**{paused: 2})
    assert sorted(line.turns) == ["patient", "patient, of an agent"]
    assert_all_is_back(gov)
