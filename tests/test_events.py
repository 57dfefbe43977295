"""What a governor tells its listeners: everything once, in the thread concerned, to no harm."""

from __future__ import annotations

import contextvars
import gc
import random
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
from threads import Crew, is_idle, until

import governor
from governor import (
    AcquireTimeout,
    ConcurrencyError,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    DeadlockError,
    GovernedExecutor,
    GovernorEvent,
    SemaphoreClosed,
)

pytestmark = pytest.mark.every_governor


class Diary:
    """A listener that keeps all that it hears, and where it heard it."""

    def __init__(self, gov: ConcurrencyGovernor) -> None:
        self.events: list[GovernorEvent] = []
        self.threads: list[int] = []
        self.stop = gov.subscribe(self._hear)

    def _hear(self, event: GovernorEvent) -> None:
        self.events.append(event)
        self.threads.append(threading.get_ident())

    def told(self) -> list[str]:
        return [f"{it.event} {it.reason}" if it.reason else it.event for it in self.events]


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=2, max_tools=1, max_global=2, max_queued=1, name="api")


@pytest.fixture
def diary(gov: ConcurrencyGovernor) -> Diary:
    return Diary(gov)


def waiting(gov: ConcurrencyGovernor) -> int:
    return gov.stats().streams_waiting + gov.stats().tools_waiting


# --------------------------------------------------------------------------------- what is told


def test_a_permit_is_acquired_and_released(gov: ConcurrencyGovernor, diary: Diary) -> None:
    with gov.acquire_stream():
        assert diary.told() == ["acquired"]
    acquired, released = diary.events
    assert (acquired.governor, acquired.agent, acquired.kind) == ("api", None, "stream")
    assert acquired.seconds is not None
    assert 0 <= acquired.seconds < 1
    assert (released.event, released.kind) == ("released", "stream")
    assert released.seconds is not None
    assert 0 <= released.seconds < 1
    assert diary.threads == [threading.get_ident()] * 2


def test_a_wait_is_told_in_the_thread_that_waits(gov: ConcurrencyGovernor, diary: Diary) -> None:
    waited: list[float] = []

    def wait() -> None:
        with gov.acquire_tool() as permit:
            waited.append(permit.waited)

    with Crew() as crew, gov.acquire_tool():
        waiter = crew.start(wait)
        until(lambda: "queued" in diary.told(), "the waiter to be told of")
        assert waiting(gov) == 1
    of_waiter = [it for it, thread in zip(diary.events, diary.threads, strict=True) if thread == waiter.ident]
    assert [it.event for it in of_waiter] == ["queued", "acquired", "released"]
    assert of_waiter[1].seconds == waited[0] > 0


def refused(error: type[Exception], act: Callable[[], object]) -> None:
    with pytest.raises(error):
        act()


def test_a_refusal_has_its_reason(gov: ConcurrencyGovernor, diary: Diary) -> None:
    with gov.acquire_tool():
        refused(AcquireTimeout, partial(gov.acquire_tool, 0.001))
        refused(AcquireTimeout, partial(gov.acquire_tool, 0))
        assert gov.try_acquire_tool() is None
        line = gov.request_tool()
        refused(ConcurrencyLimitExceeded, gov.acquire_tool)
        refused(ConcurrencyLimitExceeded, gov.request_tool().result)
        line.cancel()
        refused(DeadlockError, gov.acquire_tool)
        line = gov.request_tool()
        gov.close()
        refused(SemaphoreClosed, line.result)
        refused(SemaphoreClosed, gov.acquire_stream)
        assert gov.try_acquire_stream() is None
    assert diary.told() == [
        "acquired",
        *("queued", "rejected timeout", "rejected timeout", "rejected timeout"),
        *("queued", "rejected full", "rejected full", "rejected cancelled"),
        "rejected deadlock",
        *("queued", "rejected closed", "closed", "rejected closed", "rejected closed"),
        "released",
    ]


def test_a_request_is_told_of(gov: ConcurrencyGovernor, diary: Diary) -> None:
    first = gov.request_tool()
    second = gov.request_tool()
    first.result().release()
    second.result().release()
    # Whoever waits is served first: only then there is time to tell.
    assert diary.told() == ["acquired", "queued", "acquired", "released", "released"]
    assert set(diary.threads) == {threading.get_ident()}


def test_a_suspended_permit_is_released_and_acquired_again(gov: ConcurrencyGovernor, diary: Diary) -> None:
    with gov.acquire_tool() as permit:
        with permit.suspended():
            assert diary.told() == ["acquired", "released"]
        assert diary.told() == ["acquired", "released", "acquired"]
        with pytest.raises(AcquireTimeout), governor.suspended(timeout=0.001):
            other = gov.acquire_tool()
    assert diary.told()[3:] == ["released", "acquired", "queued", "rejected timeout"]
    other.release()
    assert diary.told()[7:] == ["released"]


def test_changes_of_the_governor_are_told(gov: ConcurrencyGovernor, diary: Diary) -> None:
    gov.resize(max_tools=3, max_global=5)
    gov.resize()
    gov.close()
    gov.close()
    assert diary.events == [
        GovernorEvent("resized", "api", None, limits={"max_tools": 3, "max_global": 5}),
        GovernorEvent("closed", "api", None),
    ]


def test_the_jobs_of_an_executor_are_its_governors(gov: ConcurrencyGovernor, diary: Diary) -> None:
    with GovernedExecutor(gov, ThreadPoolExecutor(2)) as pool:
        assert pool.submit(int, "7").result() == 7
    assert diary.told() == ["acquired", "released"]
    assert {(it.governor, it.agent, it.kind) for it in diary.events} == {("api", None, "tool")}


# --------------------------------------------------------------------------------- who is told


@pytest.mark.parametrize("name", ["api", None])
def test_agents_are_named_and_their_listeners_hear_of_them_only(name: str | None) -> None:
    gov = ConcurrencyGovernor(2, 2, 2, name=name)
    coder = gov.agent("coder", max_tools=2)
    tester = coder.agent("tester", max_tools=1)
    everything, coders, testers = map(Diary, (gov, coder, tester))
    for source in (gov, coder, tester):
        source.acquire_tool().release()
    assert [it.agent for it in everything.events] == [None, None, "coder", "coder"] + ["coder/tester"] * 2
    assert {it.governor for it in everything.events} == {name}
    assert coders.events == everything.events[2:]
    assert testers.events == everything.events[4:]


def test_who_has_stopped_hears_no_more(gov: ConcurrencyGovernor, diary: Diary) -> None:
    again = Diary(gov)
    permit = gov.acquire_tool()
    diary.stop()
    diary.stop()
    permit.release()
    again.stop()
    gov.acquire_tool().release()
    assert (diary.told(), again.told()) == (["acquired"], ["acquired", "released"])
    tree = gov._global.tree
    assert not tree.observed
    assert tree.calm == tree._is_calm(), "nobody listens, and yet operations take the slow way"


def test_one_listener_may_listen_twice(gov: ConcurrencyGovernor) -> None:
    heard: list[GovernorEvent] = []
    stop = gov.subscribe(heard.append)
    gov.subscribe(heard.append)
    gov.acquire_tool().release()
    stop()
    gov.acquire_stream().release()
    assert [it.kind for it in heard] == ["tool"] * 4 + ["stream"] * 2


def test_nobody_hears_of_what_was_acquired_before_he_listened(gov: ConcurrencyGovernor) -> None:
    permit = gov.acquire_tool()
    diary = Diary(gov)
    permit.release()
    assert diary.events == []


def test_nobody_hears_of_a_request_that_was_granted_before_he_listened(gov: ConcurrencyGovernor) -> None:
    first = gov.acquire_tool()
    requests = [gov.request_stream(), gov.request_tool()]  # at once, and from the line
    first.release()
    diary = Diary(gov)
    for request in requests:
        request.result().release()
    assert diary.events == []


def test_an_agent_lives_as_long_as_somebody_listens_to_it(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=1)
    diary = Diary(agent)
    gone = weakref.ref(agent)
    del agent
    gov.agent("coder", max_tools=1).acquire_tool().release()
    assert diary.told() == ["acquired", "released"]
    diary.stop()
    del diary
    gc.collect()
    assert gone() is None


async def hear_later(event: GovernorEvent) -> None: ...


@pytest.mark.parametrize("listener", [None, "print", 7, hear_later])
def test_what_cannot_be_called_is_refused(gov: ConcurrencyGovernor, listener: object) -> None:
    with pytest.raises(TypeError, match="listener must be a function that is not async, not "):
        gov.subscribe(listener)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- no harm


def test_a_listener_that_raises_is_logged_and_others_hear_all_the_same(
    gov: ConcurrencyGovernor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: GovernorEvent) -> None:
        raise LookupError("no such metric")

    gov.subscribe(fail)
    diary = Diary(gov)
    with gov.acquire_tool():
        pass
    assert diary.told() == ["acquired", "released"]
    assert is_idle(gov)
    assert [record.name for record in caplog.records] == ["governor"] * 2
    assert "no such metric" in caplog.text


def test_a_listener_may_use_the_governor(gov: ConcurrencyGovernor) -> None:
    seen: list[tuple[str, int]] = []

    def listen(event: GovernorEvent) -> None:
        seen.append((event.event, gov.stats().tools_in_use))
        if event.kind == "tool":
            with gov.acquire_stream():
                pass

    gov.subscribe(listen)
    with gov.acquire_tool():
        pass
    assert seen == [
        ("acquired", 1),
        ("acquired", 1),
        ("released", 1),
        ("released", 0),
        ("acquired", 0),
        ("released", 0),
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_dropped_permit_is_told_of_where_no_finalizer_runs(gov: ConcurrencyGovernor) -> None:
    """A listener may take a lock that the code amid which the finalizer runs has."""
    lock = threading.Lock()
    heard: list[tuple[str, int]] = []

    def listen(event: GovernorEvent) -> None:
        with lock:
            heard.append((event.event, threading.get_ident()))

    gov.subscribe(listen)
    permit: ConcurrencyPermit | None = gov.acquire_tool()
    assert permit is not None
    with lock:
        permit = None
        until(lambda: is_idle(gov), "the place to be back")
    until(lambda: len(heard) == 2, "the release to be told")
    (acquired, here), (released, there) = heard
    assert (acquired, released) == ("acquired", "released")
    assert here == threading.get_ident() != there


def test_a_circle_that_closes_while_a_listener_is_told_is_seen() -> None:
    gov = ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)
    streaming, listening, go = threading.Event(), threading.Event(), threading.Event()
    ends: list[str] = []

    def listen(event: GovernorEvent) -> None:
        if (event.event, event.kind) == ("queued", "stream"):
            listening.set()
            go.wait()

    def tool_then_stream() -> None:
        with gov.acquire_tool():
            streaming.wait()
            end(gov.acquire_stream)

    def stream_then_tool() -> None:
        with gov.acquire_stream():
            streaming.set()
            listening.wait()
            end(gov.acquire_tool)

    def end(acquire: Callable[[], ConcurrencyPermit]) -> None:
        try:
            with acquire():
                ends.append("had both")
        except DeadlockError:
            ends.append("told")

    gov.subscribe(listen)
    with Crew() as crew:
        crew.start(tool_then_stream)
        crew.start(stream_then_tool)
        until(lambda: waiting(gov) == 2, "both in line, of whom one listens")
        go.set()
    assert ends == ["told", "had both"]  # whichever was seen to do nothing but wait


def test_an_agent_is_told_when_the_governor_above_it_closes(gov: ConcurrencyGovernor) -> None:
    diary = Diary(gov.agent("coder", max_tools=1))
    gov.close()
    assert diary.events == [GovernorEvent("closed", "api", None)]


def test_of_many_who_close_one_is_told(gov: ConcurrencyGovernor) -> None:
    for _ in range(50):
        gov = ConcurrencyGovernor(1, 1, 1)
        diary, start = Diary(gov), threading.Barrier(3)

        def close(gov: ConcurrencyGovernor = gov, start: threading.Barrier = start) -> None:
            start.wait()
            gov.close()

        with Crew() as crew:
            for _ in range(3):
                crew.start(close)
        assert diary.told() == ["closed"]


def test_what_stops_one_listener_keeps_nothing_from_the_others(gov: ConcurrencyGovernor) -> None:
    def leave(event: GovernorEvent) -> None:
        if event.event == "released":
            raise SystemExit

    gov.subscribe(leave)
    diary = Diary(gov)
    with pytest.raises(SystemExit), gov.acquire_tool():
        pass
    assert diary.told() == ["acquired", "released"]
    assert is_idle(gov)


@pytest.mark.parametrize("way", [lambda gov: gov.acquire_tool(5), lambda gov: gov.request_tool()])
def test_an_operation_that_a_listener_ends_is_told_to_be_over(
    gov: ConcurrencyGovernor, way: Callable[[ConcurrencyGovernor], object]
) -> None:
    def leave(event: GovernorEvent) -> None:
        if event.event == "queued":
            raise SystemExit

    gov.subscribe(leave)
    diary = Diary(gov)
    with gov.acquire_tool(), pytest.raises(SystemExit):
        way(gov)
    assert diary.told() == ["acquired", "queued", "rejected cancelled", "released"]
    assert all(it.seconds is not None for it in diary.events if it.event == "rejected")


def test_a_listener_hears_in_the_context_of_who_asked(gov: ConcurrencyGovernor) -> None:
    turn: contextvars.ContextVar[str] = contextvars.ContextVar("turn", default="nobody's")
    heard: list[tuple[str, str]] = []
    gov.subscribe(lambda event: heard.append((event.event, turn.get())))
    holder = gov.acquire_tool()
    request = contextvars.copy_context().run(lambda: (turn.set("his"), gov.request_tool())[1])
    holder.release()
    request.result().release()
    assert heard == [
        ("acquired", "nobody's"),
        ("queued", "his"),
        ("acquired", "his"),
        ("released", "nobody's"),
        ("released", "nobody's"),
    ]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this platform has no such signals")
def test_a_signal_handler_amid_a_step_is_told_of_without_the_lock(gov: ConcurrencyGovernor) -> None:
    """What a listener does may need another thread, which may need the governor."""
    looked: list[int] = []

    def listen(event: GovernorEvent) -> None:
        with Crew() as crew:
            crew.start(lambda: looked.append(gov.stats().tools_max))

    gov.subscribe(listen)
    before = signal.signal(signal.SIGUSR1, lambda *_: gov.close())
    try:
        tree = gov._global.tree
        tree.atomically(gov._global, lambda: signal.raise_signal(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    until(lambda: looked == [1], "the other thread's look")
    assert gov.closed


def test_a_permit_that_is_released_while_it_waits_to_resume_is_told_of(
    gov: ConcurrencyGovernor, diary: Diary
) -> None:
    def suspend(permit: ConcurrencyPermit) -> None:
        with permit, permit.suspended():
            held.append(gov.acquire_tool())

    held: list[ConcurrencyPermit] = []
    permit = gov.acquire_tool()
    with Crew() as crew:
        crew.start(suspend, permit)
        until(lambda: waiting(gov), "it to wait for its place")
        permit.release()
    held.pop().release()
    assert Counter(diary.told()) == {"acquired": 2, "released": 2, "queued": 1, "rejected cancelled": 1}


# ------------------------------------------------------------------------------------- in a storm


def count(gov: ConcurrencyGovernor, turns: int, seed: int, counted: Counter[str]) -> None:
    """Use a governor in all ways, and count how each operation ended."""
    chance = random.Random(seed)
    for _ in range(turns):
        kind = chance.choice(["stream", "tool"])
        way = chance.randrange(4)
        try:
            if way == 0:
                request = gov.request(kind)  # type: ignore[arg-type]
                if request.cancel():
                    counted["cancelled"] += 1
                    continue
                permit = request.result()
            elif way == 1:
                tried = gov.try_acquire(kind)  # type: ignore[arg-type]
                if tried is None:
                    counted["timeout"] += 1
                    continue
                permit = tried
            else:
                permit = gov.acquire(kind, chance.choice([0, 0.001, 5]))  # type: ignore[arg-type]
        except ConcurrencyError as error:
            counted["full" if isinstance(error, ConcurrencyLimitExceeded) else "timeout"] += 1
            continue
        counted["acquired"] += 1
        permit.release()
        counted["released"] += 1


@pytest.mark.parametrize("switching", [None, 1e-6], indirect=True)
@pytest.mark.usefixtures("switching")
@pytest.mark.timeout(60)
def test_what_is_told_is_what_happened() -> None:
    gov = ConcurrencyGovernor(max_streams=2, max_tools=2, max_global=3, max_queued=3)
    heard: list[GovernorEvent] = []
    gov.subscribe(heard.append)
    counts = [Counter[str]() for _ in range(8)]
    with Crew(patience=40) as crew:
        for seed, counted in enumerate(counts):
            source = gov if seed % 2 else gov.agent(f"agent {seed}", max_tools=1, max_streams=1)
            crew.start(count, source, 1_250, seed, counted)
    told = Counter(it.reason or it.event for it in heard)
    del told["queued"]
    assert told == sum(counts, Counter[str]())
    assert told["acquired"] > 1_000
    assert is_idle(gov)


@pytest.fixture(autouse=True)
def _nothing_is_left(gov: ConcurrencyGovernor) -> Iterator[None]:
    yield
    with suppress(SemaphoreClosed):
        until(lambda: is_idle(gov), "all to be given back")
