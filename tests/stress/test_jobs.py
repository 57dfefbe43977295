"""Jobs, calls, streams and requests: interrupted anywhere, cancelled at random, and by the thousand.

What the stdlib's own pool and futures do when they are interrupted is the stdlib's affair (up to 3.14
`submit` may leave a lock taken that all pools share, gh-148874): here signals arrive in the package's
code only, calls into the stdlib included, from before the call to after it.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from threads import PATIENCE, Crew, Gauge, is_idle, until

import governor
from governor import AcquireTimeout, ConcurrencyGovernor, GovernedExecutor, _tree
from governor.integrations.asyncio import permit as permit_for

pytest.importorskip("ctypes", reason="signals are set just before an instruction by way of ctypes")

from stress.injector import Gate, Injector, Interrupted, every_point

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("finalizers_may_be_interrupted")]

# Permits that an interrupt leaves to their finalizer are a part of the promise.
interrupted = pytest.mark.filterwarnings("ignore::ResourceWarning")

Act = Callable[[], object]


def assert_whole(gov: ConcurrencyGovernor) -> None:
    """Nothing lost, nobody asleep, no ghost in the line, no lock left taken."""

    def take_all() -> None:
        tree = gov._global.tree
        assert tree.lock.acquire(blocking=False), "the lock was left taken"
        tree.lock.release()
        until(lambda: is_idle(gov), "all to be back")
        assert not any((tree.held, tree.line, tree.away, tree.after, tree.dirty))
        for permit in [gov.acquire_tool(timeout=0) for _ in range(gov.stats().tools_max)]:
            permit.release()

    with Crew() as crew:
        crew.start(take_all)


# ----------------------------------------------------------------------------- at each and every point


class Prompt(ThreadPoolExecutor):
    """A pool that is done with a job when it has been submitted.

    No other thread runs the package's code while instructions are counted, or it would be its
    instruction that the signal follows.
    """

    def __init__(self, injector: Injector) -> None:
        super().__init__(1)
        self.injector = injector
        self.counting = False

    def submit(self, *job: Any, **kwargs: Any) -> Future[Any]:
        if not self.counting or threading.get_ident() != self.injector.main:
            return super().submit(*job, **kwargs)
        self.injector.rest()
        future = super().submit(*job, **kwargs)
        wait([future])
        wait([super().submit(int)])  # the end of the one may have brought another
        self.injector.count()
        return future


class Stage:
    """A governor of two tools, an executor on it, and what else a scenario wants done."""

    def __init__(self, bare: Prompt) -> None:
        self.gov = ConcurrencyGovernor(2, 2, 2)
        self.bare = bare
        self.pool = GovernedExecutor(self.gov, bare)
        self.hurried = GovernedExecutor(self.gov, bare, acquire_timeout=0.0001)
        self.held: list[Any] = []
        self.futures: list[Future[Any]] = []  # they must end, however they do
        self.meanwhile: Act | None = None  # happens just before the main thread would wait for a permit

    def fill(self) -> None:
        self.held = [self.gov.acquire_tool() for _ in range(2)]

    def make_room(self) -> None:
        """Give all back, on another thread."""
        with Crew() as crew:
            crew.start(lambda: [permit.release() for permit in self.held])

    def mend(self) -> None:
        """Give back what fell into the one known hole: an interrupt as a finalizer begins."""
        tree = self.gov._global.tree
        tree.after.extend(tree.held.values())
        tree.serve()

    def finish(self) -> None:
        for permit in self.held:
            permit.release()
        for future in self.futures:
            error = future.exception(PATIENCE) if not future.cancelled() else None
            if error is None and not future.cancelled() and isinstance(future, governor._request.Request):
                future.result().release()
        assert_whole(self.gov)


class Loop:
    """What there is of an event loop to a submit."""

    def call_later(self, *_: object) -> None:
        pass


def count(limit: int = 2) -> Generator[int, None, None]:
    yield from range(limit)


def fail() -> Iterator[int]:
    yield 0
    raise ZeroDivisionError


SCENARIOS: list[Any] = []


def scenario(prepare: Callable[[Stage], Act]) -> Callable[[Stage], Act]:
    """Add a scenario: it gets a stage, and returns what is to be interrupted."""
    SCENARIOS.append(pytest.param(prepare, id=prepare.__name__))
    return prepare


@scenario
def a_submit(stage: Stage) -> Act:
    return lambda: stage.futures.append(stage.pool.submit(int))


@scenario
def a_submit_that_waits(stage: Stage) -> Act:
    stage.fill()
    stage.meanwhile = stage.make_room
    return lambda: stage.futures.append(stage.pool.submit(int))


@scenario
def a_submit_that_gives_up(stage: Stage) -> Act:
    stage.fill()

    def act() -> None:
        try:
            stage.hurried.submit(int)
        except AcquireTimeout:
            pass

    return act


@scenario
def a_try(stage: Stage) -> Act:
    return lambda: stage.pool.try_submit(int)


@scenario
def a_try_in_vain(stage: Stage) -> Act:
    stage.fill()
    return lambda: stage.pool.try_submit(int)


@scenario
def a_map(stage: Stage) -> Act:
    return lambda: list(stage.pool.map(abs, [1, 2]))


@scenario
def a_lazy_map(stage: Stage) -> Act:
    return lambda: list(stage.pool.map(abs, [1, 2, 3], buffersize=2))


@scenario
def a_lazy_map_of_chunks_that_is_dropped(stage: Stage) -> Act:
    return lambda: next(stage.pool.map(abs, [1, 2, 3], buffersize=1, chunksize=2))


@scenario
def a_shutdown(stage: Stage) -> Act:
    stage.pool._executor = ThreadPoolExecutor(1)
    return lambda: stage.pool.shutdown()


@scenario
def a_tool(stage: Stage) -> Act:
    tool = stage.gov.tool(abs)
    return lambda: tool(1)


@scenario
def a_stream(stage: Stage) -> Act:
    stream = stage.gov.stream(count)
    return lambda: list(stream())


@scenario
def a_stream_that_fails(stage: Stage) -> Act:
    stream = stage.gov.stream(fail)

    def act() -> None:
        try:
            list(stream())
        except ZeroDivisionError:
            pass

    return act


@scenario
def a_stream_in_a_block(stage: Stage) -> Act:
    stream: Any = stage.gov.stream(count)

    def act() -> None:
        with stream() as items:
            next(items)

    return act


@scenario
def a_stream_that_is_dropped(stage: Stage) -> Act:
    stream: Any = stage.gov.stream(count)
    return lambda: next(stream())


@scenario
def a_call_that_returns_no_stream(stage: Stage) -> Act:
    call = stage.gov.stream(abs)
    return lambda: call(1)


@scenario
def a_request(stage: Stage) -> Act:
    def act() -> None:
        request = stage.gov.request_tool()
        stage.futures.append(request)

    return act


@scenario
def a_request_that_is_cancelled(stage: Stage) -> Act:
    stage.fill()
    request, behind = stage.gov.request_tool(), stage.gov.request_tool()
    stage.futures.append(behind)
    return lambda: request.cancel()


@scenario
def grants_to_two_requests(stage: Stage) -> Act:
    stage.fill()
    called: list[Future[Any]] = []
    for _ in range(2):
        stage.futures.append(stage.gov.request_tool())
        stage.futures[-1].add_done_callback(called.append)

    def act() -> None:
        for permit in stage.held:
            permit.release()

    def finish() -> None:
        usual()
        assert {*map(id, called)} == {*map(id, stage.futures)}, "a request whose callback was never called"

    usual, stage.finish = stage.finish, finish  # type: ignore[method-assign]
    return act


@scenario
def a_close_before_requests(stage: Stage) -> Act:
    stage.fill()
    agent = stage.gov.agent("agent", max_tools=2)
    stage.futures += [agent.request_tool() for _ in range(2)]
    return lambda: agent.close()


@scenario
def a_submit_on_a_loop(stage: Stage) -> Act:
    def act() -> None:
        asyncio._set_running_loop(Loop())  # type: ignore[arg-type]
        try:
            stage.futures.append(stage.pool.submit(int))
        finally:
            asyncio._set_running_loop(None)

    return act


@scenario
def a_grant_to_a_job_from_a_loop(stage: Stage) -> Act:
    stage.fill()
    asyncio._set_running_loop(Loop())  # type: ignore[arg-type]
    stage.futures += [stage.pool.submit(int) for _ in range(2)]
    asyncio._set_running_loop(None)

    def act() -> None:
        for permit in stage.held:
            permit.release()

    return act


@scenario
def a_job_from_a_loop_that_is_cancelled(stage: Stage) -> Act:
    stage.fill()
    asyncio._set_running_loop(Loop())  # type: ignore[arg-type]
    first, second = stage.pool.submit(int), stage.pool.submit(int)
    asyncio._set_running_loop(None)
    stage.futures.append(second)
    return lambda: first.cancel()


def perform(injector: Injector, stage: Stage, act: Any, *plan: int, warming: bool = False) -> None:
    def happens() -> None:
        injector.rest()
        if stage.meanwhile is not None:
            stage.meanwhile()
        if not warming:
            injector.count()

    def lock() -> Any:
        here = threading.get_ident() == injector.main
        return Gate(happens) if here and stage.meanwhile else threading.Lock()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tree, "Lock", lock)
        if warming:
            act()
            return
        patch.setattr(stage.bare, "counting", True)
        injector.run(act, *plan)


@interrupted
@pytest.mark.parametrize("prepare", SCENARIOS)
def test_an_interrupt_anywhere_loses_nothing(injector: Injector, prepare: Callable[[Stage], Act]) -> None:
    def run(*plan: int, warming: bool = False) -> None:
        stage = Stage(bare)
        perform(injector, stage, prepare(stage), *plan, warming=warming)
        if injector.missed:
            stage.mend()
        stage.finish()

    with Prompt(injector) as bare:
        for _ in range(20):
            run(warming=True)  # 3.11 stumbles over a signal in code that it has yet to adapt
        points = list(every_point(injector, run))
    assert len(points) > 5


# ------------------------------------------------------------------------------------------ storms

INTERRUPTS = 200
HOMES = (str(Path(governor.__file__).parent), __file__)

Storm = Callable[[Act], None]


@pytest.fixture
def storm() -> Iterator[Storm]:
    """Interrupt a function that is called again and again: one signal at a time, at random."""
    chance = random.Random(8)
    armed = False

    def interrupt(_: int, frame: Any) -> None:
        nonlocal armed
        code = frame.f_code
        if armed and code.co_filename.startswith(HOMES) and code not in (interrupt.__code__, rage.__code__):
            armed = False
            raise Interrupted
        if armed:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1e-4))

    def rage(act: Act) -> None:
        nonlocal armed
        began = time.perf_counter()
        for _ in range(20):
            act()
        usual = max((time.perf_counter() - began) / 20, 2e-5)
        delivered, deadline = 0, time.monotonic() + 2
        while delivered < INTERRUPTS and time.monotonic() < deadline:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1.5 * usual))
                while armed:
                    act()
            except Interrupted:
                delivered += 1
            finally:
                armed = False
        assert delivered >= 20, "hardly anything was interrupted"

    former = signal.signal(signal.SIGALRM, interrupt)
    yield rage
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


@interrupted
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no interval timers")
@pytest.mark.parametrize("way", ["submit", "try_submit", "map", "lazy map", "chunks"])
def test_a_storm_over_jobs_among_others_that_submit(storm: Storm, way: str) -> None:
    gov = ConcurrencyGovernor(0, 2, 2)
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            pool.submit(int).result(PATIENCE)

    def act() -> object:
        if "submit" in way:
            return getattr(pool, way)(int)
        lazy = {} if way == "map" else {"buffersize": 2}
        return list(pool.map(abs, range(4), chunksize=2 if way == "chunks" else 1, **lazy))

    with GovernedExecutor(gov, ThreadPoolExecutor(3)) as pool:
        with Crew(patience=15) as crew:
            for _ in range(2):
                crew.start(others)
            try:
                storm(act)
            finally:
                over.set()
        assert_whole(gov)


@interrupted
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no interval timers")
@pytest.mark.parametrize("way", ["to the end", "closed", "dropped", "in a block"])
def test_a_storm_over_streams_among_others_that_consume(storm: Storm, way: str) -> None:
    gov = ConcurrencyGovernor(2, 2, 2)
    stream: Any = gov.stream(count)
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            list(stream())

    def act() -> None:
        if way == "to the end":
            list(stream())
        elif way == "in a block":
            with stream() as items:
                next(items)
        else:
            items = stream()
            next(items)
            if way == "closed":
                items.close()

    with Crew(patience=15) as crew:
        for _ in range(2):
            crew.start(others)
        try:
            storm(act)
        finally:
            over.set()
    assert_whole(gov)


@interrupted
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no interval timers")
@pytest.mark.parametrize("of", ["threads", "a loop"])
def test_a_storm_over_grants_to_requests(storm: Storm, of: str) -> None:
    gov = ConcurrencyGovernor(0, 1, 1)
    over = threading.Event()

    def threads() -> None:
        while not over.is_set():
            gov.request_tool().result(PATIENCE).release()

    async def tasks() -> None:
        while not over.is_set():
            async with permit_for(gov, "tool"):
                pass

    async def loop() -> None:
        await asyncio.gather(*(tasks() for _ in range(3)))

    def act() -> None:
        gov.acquire_tool().release()

    with Crew(patience=15) as crew:
        for _ in range(3 if of == "threads" else 1):
            crew.start(threads if of == "threads" else lambda: asyncio.run(loop()))
        try:
            storm(act)
        finally:
            over.set()
    assert_whole(gov)


# ------------------------------------------------------------------------------- by the thousand


def use(gauge: Gauge, *_: object) -> None:
    with gauge:
        time.sleep(0)  # let others in


def test_ten_thousand_jobs_never_exceed_the_permits_nor_fill_the_memory() -> None:
    class Argument:
        pass

    gov, gauge = ConcurrencyGovernor(0, 5, 5), Gauge()
    alive: weakref.WeakSet[Argument] = weakref.WeakSet()
    most_alive = 0
    with GovernedExecutor(gov, ThreadPoolExecutor(16)) as pool:
        for _ in range(10_000):
            argument = Argument()
            alive.add(argument)
            pool.submit(use, gauge, argument)
            most_alive = max(most_alive, len(alive))
    assert gauge.entries == 10_000
    assert gauge.peak <= 5
    assert most_alive < 100
    assert_whole(gov)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("of", ["threads", "a loop"])
def test_a_thousand_jobs_are_cancelled_at_random_while_others_end(of: str) -> None:
    gov, gauge, chance = ConcurrencyGovernor(0, 6, 6), Gauge(), random.Random(1)
    jobs: list[Future[None]] = []
    over = threading.Event()

    def submit() -> None:
        for _ in range(500):
            jobs.append(pool.submit(use, gauge))

    async def submit_from_a_loop() -> None:
        for _ in range(500):
            jobs.append(pool.submit(use, gauge))
            await asyncio.sleep(0)

    def cancel() -> None:
        while not over.is_set():
            if jobs:
                chance.choice(jobs[-20:]).cancel()

    with GovernedExecutor(gov, ThreadPoolExecutor(3)) as pool:
        with Crew(patience=30) as cancelling:
            cancelling.start(cancel)
            with Crew(patience=30) as crew:
                for _ in range(2):
                    crew.start(submit if of == "threads" else lambda: asyncio.run(submit_from_a_loop()))
            over.set()
        assert wait(jobs, PATIENCE).not_done == set()
    cancelled = sum(job.cancelled() for job in jobs)
    assert len(jobs) == 1_000
    assert gauge.entries == 1_000 - cancelled
    assert gauge.peak <= 3
    assert_whole(gov)


@pytest.mark.usefixtures("switching")
def test_a_thousand_requests_are_cancelled_at_random_as_they_are_granted() -> None:
    gov, chance = ConcurrencyGovernor(0, 3, 3), random.Random(2)
    requests: list[Future[Any]] = []
    peak = 0

    def use(request: Future[Any]) -> None:
        nonlocal peak
        if not request.cancelled():
            peak = max(peak, gov.stats().tools_in_use)
            request.result().release()

    def ask() -> None:
        for _ in range(250):
            request = gov.request_tool()
            requests.append(request)
            request.add_done_callback(use)

    def cancel() -> None:
        while len(requests) < 1_000:
            if requests:
                chance.choice(requests[-20:]).cancel()

    with Crew(patience=30) as crew:
        for _ in range(4):
            crew.start(ask)
        for _ in range(2):
            crew.start(cancel)
    assert wait(requests, PATIENCE).not_done == set()
    assert len(requests) == 1_000
    assert peak <= 3
    assert_whole(gov)


@pytest.mark.usefixtures("switching")
def test_a_thousand_tasks_are_cancelled_at_random_as_they_are_granted() -> None:
    gov, chance = ConcurrencyGovernor(0, 3, 3), random.Random(3)
    inside = peak = served = 0

    async def use() -> None:
        nonlocal inside, peak, served
        async with permit_for(gov, "tool"):
            inside += 1
            peak = max(peak, inside)
            try:
                await asyncio.sleep(0)
            finally:
                inside -= 1
                served += 1

    async def main() -> None:
        tasks = []
        for _ in range(1_000):
            tasks.append(asyncio.create_task(use()))
            if chance.random() < 0.3:
                chance.choice(tasks[-20:]).cancel()
            await asyncio.sleep(0)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {type(None), asyncio.CancelledError}

    def others() -> None:
        while not over.is_set():
            with gov.acquire_tool():
                pass

    over = threading.Event()
    with Crew(patience=30) as crew:
        crew.start(others)
        try:
            asyncio.run(main())
        finally:
            over.set()
    assert served > 0
    assert peak <= 3
    assert_whole(gov)
