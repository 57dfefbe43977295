"""The executor: a job enters the pool with a permit, which comes back however the job ends."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pickle import PicklingError
from time import monotonic
from typing import Any

import pytest
from threads import PATIENCE, Crew, until

import governor
from governor import AcquireTimeout, ConcurrencyGovernor, GovernedExecutor, SemaphoreClosed

pytestmark = pytest.mark.every_governor

SHUT = "cannot schedule new futures after shutdown"

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=2, max_global=3)


@pytest.fixture
def pool(gov: ConcurrencyGovernor) -> Iterator[GovernedExecutor]:
    """Two permits, four workers."""
    with GovernedExecutor(gov, ThreadPoolExecutor(4)) as pool:
        yield pool


class Gate(threading.Event):
    """What jobs wait for; open at the latest when its block, or the test, ends."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    with gate:
        yield gate


def books(gov: ConcurrencyGovernor) -> tuple[int, int, int, int]:
    stats = gov.stats()
    return stats.tools_in_use, stats.streams_in_use, stats.global_in_use, stats.tools_waiting


def all_back(gov: ConcurrencyGovernor) -> bool:
    return books(gov) == (0, 0, 0, 0)


def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def on_a_loop(call: Callable[[], Future[Any]]) -> Future[Any]:
    """Call it on a thread with a running event loop, and return what it returns."""

    async def main() -> Future[Any]:
        return call()

    return asyncio.run(main())


def let_go(*gone: weakref.ref[Any]) -> Callable[[], bool]:
    """Whether all is gone without the collector, as soon as the workers have let go of it, too."""

    def look() -> bool:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            gc.collect()  # or a worker, asleep, would have to run to give up what it had made
        return all(it() is None for it in gone)

    return look


class Inline(Executor):
    """Runs each job within `submit`; `refusal` is raised instead, before or after that."""

    def __init__(self, refusal: BaseException | None = None, *, late: bool = False) -> None:
        self.refusal, self.late = refusal, late

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.late or self.refusal is None:
            future.set_result(fn(*args, **kwargs))
        if self.refusal is not None:
            raise self.refusal
        return future


class RefusingThreads(ThreadPoolExecutor):
    """A thread pool whose `submit` fails, before or after it has taken the job."""

    def __init__(self, refusal: BaseException, *, late: bool = False) -> None:
        super().__init__(1)
        self.refusal, self.late = refusal, late

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.late:
            super().submit(fn, *args, **kwargs).exception(PATIENCE)
        raise self.refusal


# ------------------------------------------------------------------------------------------- submit


@pytest.mark.parametrize("kind", ["tool", "stream"])
def test_a_job_holds_a_permit_of_its_kind_while_it_runs(gov: ConcurrencyGovernor, kind: Any) -> None:
    with GovernedExecutor(gov, ThreadPoolExecutor(1), kind=kind) as pool:
        in_use = pool.submit(lambda: books(gov)).result()
    assert in_use == ((1, 0, 1, 0) if kind == "tool" else (0, 1, 1, 0))
    assert all_back(gov)


def test_the_submitter_waits_until_a_permit_is_held(
    gov: ConcurrencyGovernor, pool: GovernedExecutor, gate: Gate
) -> None:
    submitted: list[int] = []

    def submit(number: int) -> None:
        pool.submit(gate.wait)
        submitted.append(number)

    with Crew() as crew:
        for number in range(4):
            crew.start(submit, number)
            until(lambda: len(submitted) + books(gov)[3] == number + 1, "the next one's turn")  # noqa: B023
        assert books(gov) == (2, 0, 2, 2)
        assert submitted == [0, 1]
        gate.set()


@pytest.mark.parametrize("way", ["submit", "try_submit", "on a loop"])
def test_every_keyword_argument_belongs_to_the_callable(pool: GovernedExecutor, way: str) -> None:
    theirs = {"self": 2, "fn": 3, "kind": 4, "acquire_timeout": 5, "executor": 6, "timeout": 7, "loop": 8}
    submit = pool.try_submit if way == "try_submit" else pool.submit
    call = partial(submit, capture, 1, **theirs)
    future: Any = on_a_loop(call) if way == "on a loop" else call()
    assert future.result(PATIENCE) == ((1,), theirs)
    with pytest.raises(TypeError):
        submit(fn=capture)  # type: ignore[call-arg]


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_a_submitter_gives_up_after_the_timeout(gov: ConcurrencyGovernor, timeout: float) -> None:
    with GovernedExecutor(gov, ThreadPoolExecutor(1), kind="stream", acquire_timeout=timeout) as pool:
        assert pool.submit(pow, 2, 3).result() == 8
        with gov.acquire_stream():
            began = monotonic()
            with pytest.raises(AcquireTimeout, match=r"no stream permit .*: streams 1/1 in use, global 1/3"):
                pool.submit(pow, 2, 3)
            assert monotonic() - began >= timeout
    assert all_back(gov)


def test_try_submit_never_waits(gov: ConcurrencyGovernor, pool: GovernedExecutor, gate: Gate) -> None:
    running = [pool.try_submit(gate.wait) for _ in range(2)]
    assert pool.try_submit(gate.wait) is None
    gate.set()
    assert [future and future.result(PATIENCE) for future in running] == [True, True]
    assert pool.try_submit(gate.wait) is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"executor": None}, TypeError, "executor must be a concurrent.futures.Executor, not None"),
        ({"kind": "toll"}, ValueError, "kind must be 'stream' or 'tool', not 'toll'"),
        ({"acquire_timeout": -1}, ValueError, "acquire_timeout must be a number of seconds"),
        ({"acquire_timeout": "1"}, TypeError, "acquire_timeout must be a number of seconds"),
    ],
)
def test_a_bad_argument_is_named(
    gov: ConcurrencyGovernor, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GovernedExecutor(gov, **({"executor": Inline()} | arguments))


def test_executors_share_the_governor_and_never_get_in_the_way_of_its_agents(
    gov: ConcurrencyGovernor,
) -> None:
    one, other = (GovernedExecutor(gov, ThreadPoolExecutor(1)) for _ in range(2))
    assert {one._governor.name, other._governor.name} & {None, one._governor._name} == {one._governor.name}
    gone = weakref.ref(one._governor)
    with other:
        one.shutdown()
        assert other.submit(pow, 2, 3).result() == 8
        assert gov.agent("coder", max_tools=1).acquire_tool().release() is None
    del one
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------------------- how a job may end


def fail(error: type[BaseException]) -> None:
    raise error("on purpose")


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_the_permit_of_a_job_that_fails_is_back_before_the_error_is_seen(
    gov: ConcurrencyGovernor, pool: GovernedExecutor, error: type[BaseException]
) -> None:
    assert isinstance(pool.submit(fail, error).exception(PATIENCE), error)
    assert all_back(gov)
    assert pool.submit(pow, 2, 3).result(PATIENCE) == 8


def test_the_permit_of_a_job_that_is_cancelled_in_the_queue_is_back_at_once(
    gov: ConcurrencyGovernor, gate: Gate
) -> None:
    with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool, gate:
        running, queued = pool.submit(gate.wait), pool.submit(gate.wait)
        until(running.running, "the first to run")
        assert books(gov)[0] == 2
        assert queued.cancel()
        assert not running.cancel()
        assert books(gov)[0] == 1
        gate.set()
    assert all_back(gov)


@pytest.mark.parametrize("pool_of", [RefusingThreads, Inline])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("refusal", [RuntimeError("no"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("way", ["submit", "try_submit"])
def test_a_pool_that_refuses_the_job_costs_no_permit(
    gov: ConcurrencyGovernor, pool_of: Any, late: bool, refusal: BaseException, way: str
) -> None:
    with GovernedExecutor(gov, pool_of(refusal, late=late)) as pool:
        with pytest.raises(type(refusal)):
            getattr(pool, way)(pow, 2, 3)
        assert all_back(gov)


def test_an_interrupted_submit_does_not_take_the_permit_from_a_job_that_runs(
    gov: ConcurrencyGovernor, gate: Gate
) -> None:
    class Interrupted(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            until(super().submit(fn, *args, **kwargs).running, "the job to run")
            until(entered.is_set, "the job to be entered")
            raise KeyboardInterrupt

    def job() -> None:
        entered.set()
        gate.wait()

    entered = threading.Event()
    with GovernedExecutor(gov, Interrupted(1)) as pool, gate:
        with pytest.raises(KeyboardInterrupt):
            pool.submit(job)
        assert books(gov)[0] == 1
        gate.set()
        until(lambda: all_back(gov), "the end of the job")


def test_a_pool_that_was_shut_behind_its_back_refuses_as_ever(gov: ConcurrencyGovernor) -> None:
    bare = ThreadPoolExecutor(1)
    pool = GovernedExecutor(gov, bare)
    bare.shutdown()
    for call in (pool.submit, pool.try_submit, lambda *job: on_a_loop(lambda: pool.submit(*job))):
        with pytest.raises(RuntimeError, match=SHUT):
            call(pow, 2, 3)
    assert all_back(gov)


def test_a_pool_whose_workers_cannot_start_costs_no_permit(
    gov: ConcurrencyGovernor, caplog: pytest.LogCaptureFixture
) -> None:
    with GovernedExecutor(gov, ThreadPoolExecutor(1, initializer=fail, initargs=(LookupError,))) as pool:
        broken = futures.thread.BrokenThreadPool
        with pytest.raises(broken):
            pool.submit(pow, 2, 3).result(PATIENCE)
        with pytest.raises(broken):
            pool.submit(pow, 2, 3)
    assert all_back(gov)


def test_a_job_counts_its_permit_as_its_own_threads(gov: ConcurrencyGovernor, pool: GovernedExecutor) -> None:
    # A thread that waited for its own permit to come back would wait for ever: so it is told.
    with pytest.raises(RuntimeError, match="inside a permit"):
        pool.submit(gov.drain).result(PATIENCE)
    assert gov.drain(PATIENCE)


def test_a_job_in_the_queue_holds_a_permit_that_no_thread_owns(gov: ConcurrencyGovernor, gate: Gate) -> None:
    with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool, gate:
        pool.submit(gate.wait)
        pool.submit(gate.wait)
        assert not gov.drain(timeout=0)
        gate.set()


def test_what_waits_for_futures_waits_for_these(pool: GovernedExecutor) -> None:
    jobs = {pool.submit(pow, 2, exponent) for exponent in range(5)}
    assert futures.wait(jobs, PATIENCE).done == jobs
    assert {job.result() for job in futures.as_completed(jobs)} == {1, 2, 4, 8, 16}


def test_a_job_that_is_over_leaves_nothing_behind(pool: GovernedExecutor) -> None:
    class Argument:
        pass

    argument = Argument()
    gone = weakref.ref(argument)
    future = pool.submit(capture, argument)
    future.result(PATIENCE)
    del argument, future
    until(let_go(gone), "the argument's end")


# --------------------------------------------------------------------------------------- other pools


@pytest.fixture
def processes(gov: ConcurrencyGovernor) -> Iterator[GovernedExecutor]:
    with GovernedExecutor(gov, ProcessPoolExecutor(1)) as processes:
        yield processes


def test_a_process_pool_runs_the_function_as_it_is(
    gov: ConcurrencyGovernor, processes: GovernedExecutor
) -> None:
    assert processes.submit(pow, 2, exp=3).result(PATIENCE) == 8
    assert isinstance(processes.submit(divmod, 1, 0).exception(PATIENCE), ZeroDivisionError)
    with pytest.raises((AttributeError, TypeError, PicklingError), match="<lambda>"):
        processes.submit(lambda: None).result(PATIENCE)
    assert list(processes.map(pow, range(5), range(5), chunksize=2)) == [1, 1, 4, 27, 256]
    until(lambda: all_back(gov), "the last permit")


def test_the_permits_of_a_worker_that_was_killed_come_back(
    gov: ConcurrencyGovernor, processes: GovernedExecutor
) -> None:
    killed, queued = processes.submit(os._exit, 1), processes.submit(pow, 2, 3)
    for future in (killed, queued):
        assert isinstance(future.exception(PATIENCE), futures.process.BrokenProcessPool)
    until(lambda: all_back(gov), "both permits")
    with pytest.raises(futures.process.BrokenProcessPool):
        processes.submit(pow, 2, 3)
    assert all_back(gov)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="interpreter pools came with 3.14")
def test_an_interpreter_pool_runs_the_function_as_it_is(gov: ConcurrencyGovernor) -> None:
    with GovernedExecutor(gov, futures.InterpreterPoolExecutor(1)) as pool:  # type: ignore[attr-defined]
        assert pool.submit(pow, 2, exp=3).result(PATIENCE) == 8
        assert isinstance(pool.submit(divmod, 1, 0).exception(PATIENCE), Exception)
    until(lambda: all_back(gov), "the last permit")


def test_any_other_executor_works(gov: ConcurrencyGovernor) -> None:
    with GovernedExecutor(gov, Inline()) as pool:
        assert pool.submit(lambda: books(gov)[0]).result() == 1
        assert list(pool.map(pow, range(3), range(3), buffersize=1)) == [1, 1, 4]
    assert all_back(gov)


def test_a_governed_executor_may_govern_another(gov: ConcurrencyGovernor) -> None:
    streams = GovernedExecutor(gov, ThreadPoolExecutor(1), kind="stream")
    variable.set("mine")
    with GovernedExecutor(gov, streams) as both:
        assert both.submit(lambda: (books(gov), variable.get())).result() == ((1, 1, 2, 0), "mine")
    assert all_back(gov)


# ------------------------------------------------------------------------------------------- context


@pytest.mark.parametrize("way", ["submit", "try_submit", "map", "lazy map", "on a loop"])
def test_a_job_runs_in_a_copy_of_its_submitters_context(pool: GovernedExecutor, way: str) -> None:
    def job(_: object = None) -> str:
        found = variable.get()
        variable.set("the job's")
        return found

    variable.set("the submitter's")
    for _ in range(3):  # the next one must not find what the one before has set
        if way == "on a loop":
            found: Any = on_a_loop(lambda: pool.submit(job)).result(PATIENCE)
        elif "map" in way:
            (found,) = pool.map(job, [None], buffersize=1 if way == "lazy map" else None)
        else:
            found = getattr(pool, way)(job).result(PATIENCE)
        assert found == "the submitter's"
    assert variable.get() == "the submitter's"


# ----------------------------------------------------------------------------------------------- map


def test_without_a_buffersize_all_is_submitted_each_waiting_for_its_permit(
    gov: ConcurrencyGovernor, pool: GovernedExecutor
) -> None:
    inside: list[int] = []
    pool.map(lambda _: inside.append(books(gov)[0]), range(10))  # nobody asks for the results
    until(lambda: len(inside) == 10, "all jobs to run")
    assert max(inside) <= 2


def test_with_a_buffersize_at_most_so_many_are_submitted_and_not_yet_yielded(pool: GovernedExecutor) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            yield item

    results = pool.map(pow, items(), itertools.repeat(2), buffersize=3)
    for number in range(10):
        assert len(taken) <= number + 3
        assert next(results) == number**2
    assert len(taken) <= 10 + 3


@pytest.mark.parametrize("chunksize", [1, 3, 100])
@pytest.mark.parametrize("buffersize", [None, 1, 2, 100])
def test_results_come_in_order(pool: GovernedExecutor, chunksize: int, buffersize: int | None) -> None:
    results = pool.map(divmod, range(20), [3] * 25, chunksize=chunksize, buffersize=buffersize)
    assert list(results) == [divmod(number, 3) for number in range(20)]
    assert list(pool.map(divmod, [], [], chunksize=chunksize, buffersize=buffersize)) == []


def test_one_chunk_is_one_permit(gov: ConcurrencyGovernor, gate: Gate) -> None:
    ran: list[int] = []

    def job(number: int) -> None:
        gate.wait()
        ran.append(number)

    with GovernedExecutor(gov, ThreadPoolExecutor(4), acquire_timeout=0) as pool, gate:
        results = pool.map(job, range(10), chunksize=5)
        assert books(gov)[0] == 2
        gate.set()
        assert list(results) == [None] * 10
        gate.clear()
        with pytest.raises(AcquireTimeout):
            pool.map(job, range(15), chunksize=5)
        gate.set()
    assert all_back(gov)


@pytest.mark.parametrize("chunksize", [1, 2])
@pytest.mark.parametrize("buffersize", [None, 2])
def test_results_that_were_yielded_are_let_go(
    pool: GovernedExecutor, chunksize: int, buffersize: int | None
) -> None:
    class Result:
        pass

    for result in pool.map(lambda _: Result(), range(6), chunksize=chunksize, buffersize=buffersize):
        gone = weakref.ref(result)
        del result
        until(let_go(gone), "the result's end")


def drop(results: Any) -> None:
    next(results)


def drop_at_once(results: Any) -> None:
    pass


def close(results: Any) -> None:
    next(results)
    results.close()


def fail_in_the_middle(results: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        list(results)


@pytest.mark.parametrize("chunksize", [1, 2])
@pytest.mark.parametrize(
    ("stop", "buffersize"),
    [
        *itertools.product([drop, close, fail_in_the_middle], [None, 4]),
        (drop_at_once, 4),  # a map whose results nobody ever asks for runs to its end, as the stdlib's
    ],
)
def test_the_rest_is_cancelled_when_the_consumer_stops_or_a_call_fails(
    gate: Gate, stop: Callable[[Any], None], chunksize: int, buffersize: int | None
) -> None:
    gov = ConcurrencyGovernor(0, 8, 8)
    ran: list[int] = []

    def job(number: int) -> None:
        if number == 2 and stop is fail_in_the_middle:
            raise ZeroDivisionError
        if number >= 2:
            gate.wait()
        ran.append(number)

    with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool, gate:
        results = pool.map(job, range(8), chunksize=chunksize, buffersize=buffersize)
        stop(results)
        del results
        until(lambda: books(gov)[0] <= 1, "all to be back but the one that runs")
        gate.set()
    assert len(ran) <= 4
    assert all_back(gov)


def test_a_lazy_map_raises_rather_than_dropping_jobs_when_the_executor_is_shut_down(
    pool: GovernedExecutor,
) -> None:
    results = pool.map(str, itertools.count(), buffersize=2)
    assert next(results) == "0"
    pool.shutdown()
    with pytest.raises(RuntimeError, match=SHUT):
        list(results)


def test_a_map_that_cannot_submit_cancels_what_it_had_submitted(gov: ConcurrencyGovernor, gate: Gate) -> None:
    ran: list[int] = []
    with GovernedExecutor(gov, ThreadPoolExecutor(1), acquire_timeout=0.01) as pool, gate:
        pool.submit(gate.wait)
        with pytest.raises(AcquireTimeout):
            pool.map(ran.append, range(5))
        assert books(gov)[0] == 1
        gate.set()
    assert ran == []


def test_a_result_that_is_late_ends_the_map(pool: GovernedExecutor, gate: Gate) -> None:
    results = pool.map(gate.wait, [0, PATIENCE], timeout=0.05)
    assert next(results) is False
    with pytest.raises(TimeoutError):
        next(results)


@pytest.mark.parametrize("argument", ["chunksize", "buffersize"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError)])
def test_a_bad_count_is_named_when_map_is_called(
    pool: GovernedExecutor, argument: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"{argument} must be an integer >= 1"):
        pool.map(str, [1], **{argument: value})


# ------------------------------------------------------------------------------------------ shutdown


@pytest.mark.parametrize("cancel_futures", [False, True])
def test_shutdown_wakes_submitters_at_once_and_then_shuts_the_pool(
    gov: ConcurrencyGovernor, gate: Gate, cancel_futures: bool
) -> None:
    bare = ThreadPoolExecutor(1)
    pool = GovernedExecutor(gov, bare)
    refused: list[str] = []

    def submit() -> None:
        with pytest.raises(RuntimeError, match=SHUT):
            pool.submit(gate.wait)
        refused.append("in line")

    running, queued = pool.submit(gate.wait), pool.submit(gate.wait)
    until(running.running, "the first to run")
    with Crew() as crew:
        for _ in range(3):
            crew.start(submit)
        until(lambda: books(gov)[3] == 3, "three in line")
        crew.start(partial(pool.shutdown, cancel_futures=cancel_futures), name="shutdown")
        until(lambda: len(refused) == 3, "all submitters, while the jobs still run")
        for late in (pool.submit, pool.try_submit, lambda *job: on_a_loop(lambda: pool.submit(*job))):
            with pytest.raises(RuntimeError, match=SHUT):
                late(pow, 2, 3)
        until(lambda: bare._shutdown, "the pool's own shutdown")
        gate.set()
    assert queued.cancelled() is cancel_futures
    assert all_back(gov)
    gov.acquire_tool(timeout=0).release()  # the governor itself is open


def test_shutdown_without_waiting_lets_the_jobs_end_by_themselves(
    gov: ConcurrencyGovernor, gate: Gate
) -> None:
    pool = GovernedExecutor(gov, ThreadPoolExecutor(1))
    jobs = [pool.submit(gate.wait) for _ in range(2)]
    pool.shutdown(wait=False)
    pool.shutdown(wait=False)
    assert books(gov)[0] == 2
    gate.set()
    assert [job.result(PATIENCE) for job in jobs] == [True, True]
    until(lambda: all_back(gov), "both permits")


def test_the_end_of_the_block_is_a_shutdown(gov: ConcurrencyGovernor) -> None:
    bare = ThreadPoolExecutor(1)
    with GovernedExecutor(gov, bare) as pool:
        job = pool.submit(pow, 2, 3)
    assert job.done()
    with pytest.raises(RuntimeError, match=SHUT):
        bare.submit(pow, 2, 3)


def test_a_closed_governor_refuses_as_it_does_elsewhere(
    gov: ConcurrencyGovernor, pool: GovernedExecutor
) -> None:
    def refused() -> None:
        with pytest.raises(SemaphoreClosed):
            pool.submit(pow, 2, 3)

    with gov.acquire_tool(), gov.acquire_tool(), Crew() as crew:
        crew.start(refused)
        until(lambda: books(gov)[3] == 1, "one in line")
        deferred = on_a_loop(lambda: pool.submit(pow, 2, 3))
        gov.close()
    refused()
    assert isinstance(deferred.exception(PATIENCE), SemaphoreClosed)
    assert pool.try_submit(pow, 2, 3) is None


def run_and_exit(program: str) -> str:
    """Run a program whose governor has two tools, in an interpreter of its own, to its end."""
    begin = (
        "import atexit, threading\n"
        "from concurrent.futures import ThreadPoolExecutor, thread\n"
        "from governor import *\n"
        "def say(what): print(f'{what}\\n', end='', flush=True)  # in one piece\n"
        "gov = ConcurrencyGovernor(2, 2, 2)\n"
        "pool = GovernedExecutor(gov, ThreadPoolExecutor(2))\n"
    )
    home = str(Path(governor.__file__).parents[1])
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", begin + program]
    ended = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": home},
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert ended.stderr == ""
    assert ended.returncode == 0
    return ended.stdout


def test_an_interpreter_that_exits_runs_what_was_submitted_and_takes_no_more() -> None:
    told = run_and_exit(
        "def late():\n"
        "    try: pool.submit(say, 'too late')\n"
        "    except RuntimeError: say(f'refused {gov.stats().tools_in_use}')\n"
        "atexit.register(late)\n"
        "gate = threading.Event()\n"
        "def job(n):\n"
        "    gate.wait(); say('done')\n"
        "pool.submit(job, 1); pool.submit(job, 2)\n"
        "gate.set()\n"
    )
    assert told.splitlines() == ["done", "done", "refused 0"]


def test_an_interpreter_that_exits_does_not_hang_on_submitters_in_line() -> None:
    told = run_and_exit(
        "def submit():\n"
        "    try: pool.submit(say, 'too late')\n"
        "    except RuntimeError as error: say(error)\n"
        "def job():\n"
        "    while not thread._shutdown: pass\n"
        "    say('done')\n"
        "pool.submit(job); pool.submit(job)\n"
        "threading.Thread(target=submit).start()\n"
        "while not gov.stats().tools_waiting: pass\n"
    )
    refused, *done = sorted(told.splitlines())
    assert refused.startswith("cannot schedule new futures after")
    assert done == ["done", "done"]


# ---------------------------------------------------------------------------- from an event loop


def test_twenty_jobs_on_two_permits_leave_the_loop_running(
    gov: ConcurrencyGovernor, pool: GovernedExecutor
) -> None:
    alive, inside = threading.Event(), []

    def job(number: int) -> int:
        inside.append(books(gov)[0])
        assert alive.wait(PATIENCE), "the loop did not run"
        return number

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(pool, job, number) for number in range(20)]
        assert books(gov) == (2, 0, 2, 18)
        loop.call_soon(alive.set)
        return await asyncio.gather(*jobs)

    assert asyncio.run(main()) == list(range(20))
    assert max(inside) <= 2
    assert all_back(gov)


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_a_job_that_waited_in_line_fails_as_any_other(
    gov: ConcurrencyGovernor, pool: GovernedExecutor, error: type[BaseException]
) -> None:
    with gov.acquire_tool(), gov.acquire_tool():
        job = on_a_loop(lambda: pool.submit(fail, error))
        assert not job.done()
    assert isinstance(job.exception(PATIENCE), error)
    assert all_back(gov)


def test_a_job_from_a_loop_can_be_cancelled_until_it_runs(gov: ConcurrencyGovernor, gate: Gate) -> None:
    def job() -> threading.Event:
        gate.wait()
        return gate

    with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool, gate:
        running, queued, in_line = (on_a_loop(lambda: pool.submit(job)) for _ in range(3))
        until(running.running, "the first to run")
        assert books(gov) == (2, 0, 2, 1)
        assert in_line.cancel()
        assert books(gov) == (2, 0, 2, 0)
        assert queued.cancel()
        assert books(gov) == (1, 0, 1, 0)
        assert not running.cancel()
        gate.set()
        assert running.result(PATIENCE) is gate
        assert not running.running()
        assert not running.cancel()
        for cancelled in (in_line, queued):
            assert cancelled.cancel()
            assert futures.wait([cancelled], PATIENCE).done == {cancelled}
    assert all_back(gov)


def test_cancelling_the_task_cancels_the_job(gov: ConcurrencyGovernor, pool: GovernedExecutor) -> None:
    async def main() -> None:
        with gov.acquire_tool(), gov.acquire_tool():
            job = asyncio.get_running_loop().run_in_executor(pool, fail, AssertionError)
            job.cancel()
            await asyncio.sleep(0)
            assert books(gov) == (2, 0, 2, 0)

    asyncio.run(main())
    assert all_back(gov)


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_a_job_in_line_gives_up_after_the_timeout_without_blocking_the_loop(
    gov: ConcurrencyGovernor, timeout: float
) -> None:
    async def main() -> None:
        with GovernedExecutor(gov, ThreadPoolExecutor(1), acquire_timeout=timeout) as pool:
            with gov.acquire_tool(), gov.acquire_tool():
                began = monotonic()
                with pytest.raises(AcquireTimeout, match=r"no tool permit .*: tools 2/2 in use, global 2/3"):
                    await asyncio.wrap_future(pool.submit(pow, 2, 3))
                assert monotonic() - began >= timeout * 0.9
                assert books(gov) == (2, 0, 2, 0)
            assert await asyncio.wrap_future(pool.submit(pow, 2, 3)) == 8
            await asyncio.sleep(2 * timeout)  # the second one's timer does no harm

    asyncio.run(main())


def test_shutdown_fails_the_jobs_that_still_stand_in_line(
    gov: ConcurrencyGovernor, pool: GovernedExecutor
) -> None:
    with gov.acquire_tool(), gov.acquire_tool():
        job = on_a_loop(lambda: pool.submit(pow, 2, 3))
        pool.shutdown()
        with pytest.raises(RuntimeError, match=SHUT):
            job.result(PATIENCE)
    assert all_back(gov)


@pytest.mark.parametrize("end", ["result", "error", "cancelled", "timeout"])
def test_a_job_from_a_loop_that_is_over_keeps_neither_itself_nor_its_result(
    gov: ConcurrencyGovernor, end: str
) -> None:
    class Argument:
        pass

    def job(argument: Argument) -> None:
        if end == "error":
            raise LookupError

    async def main(argument: Argument) -> Future[None]:
        future = pool.submit(job, argument)
        if end == "cancelled":
            future.cancel()
        return future

    timeout = 0 if end == "timeout" else 1000
    with GovernedExecutor(gov, ThreadPoolExecutor(1), acquire_timeout=timeout) as pool:
        held = [] if end in ("result", "error") else [gov.acquire_tool(), gov.acquire_tool()]
        argument, loop = Argument(), asyncio.new_event_loop()
        gone = weakref.ref(argument)
        future = loop.run_until_complete(main(argument))
        if end == "timeout":
            loop.run_until_complete(asyncio.sleep(0.01))
        futures.wait([future], PATIENCE)
        weak = weakref.ref(future)
        gc.disable()
        try:
            del argument, future
            until(let_go(gone, weak), "their end")
        finally:
            gc.enable()
        for permit in held:
            permit.release()
        loop.close()


def test_a_permit_that_comes_back_within_the_pools_own_submit_does_not_hang_it(
    gov: ConcurrencyGovernor,
) -> None:
    """A finalizer may run anywhere: here, under the lock that the job in line will need."""

    class Collecting(ThreadPoolExecutor):
        trash: Any = None

        def _adjust_thread_count(self) -> None:
            self.trash = None
            super()._adjust_thread_count()  # type: ignore[misc]

    def work() -> None:
        bare.trash = gov.stream(iter)([1])
        jobs.append(on_a_loop(lambda: pool.submit(pow, 2, 3)))
        bare.submit(int)

    jobs: list[Future[int]] = []
    bare = Collecting(2)
    with GovernedExecutor(gov, bare, kind="stream") as pool:
        with Crew() as crew:
            crew.start(work)
        assert jobs[0].result(PATIENCE) == 8
    assert all_back(gov)
