"""For users' tests: a governor that fails instead of waiting, and the check that all permits are back."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from threads import Crew, is_idle, until

import governor
from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    GovernedExecutor,
    GovernorEvent,
    SemaphoreClosed,
)
from governor.integrations.asyncio import permit as async_permit
from governor.testing import NonBlockingGovernor, WouldBlock, assert_all_returned


@pytest.fixture
def gov() -> Iterator[NonBlockingGovernor]:
    with assert_all_returned(NonBlockingGovernor(max_streams=1, max_tools=1, max_global=2)) as gov:
        yield gov
    assert is_idle(gov)


def ask_by_executor(gov: ConcurrencyGovernor) -> object:
    with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool:
        return pool.submit(int).result()


def ask_by_a_lazy_map(gov: ConcurrencyGovernor) -> object:
    with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool:
        return list(pool.map(int, "12", buffersize=1))


def ask_on_a_loop(gov: ConcurrencyGovernor) -> object:
    async def submit() -> object:
        with GovernedExecutor(gov, ThreadPoolExecutor(1)) as pool:
            return await asyncio.get_running_loop().run_in_executor(pool, int)

    return asyncio.run(submit())


def ask_in_a_task(gov: ConcurrencyGovernor) -> object:
    async def enter() -> None:
        async with async_permit(gov, "tool", timeout=5):
            pass

    return asyncio.run(enter())


WAYS: list[Callable[[ConcurrencyGovernor], object]] = [
    lambda gov: gov.acquire_tool(),
    lambda gov: gov.acquire("tool", timeout=5),
    lambda gov: gov.request_tool(),
    lambda gov: gov.agent("agent", max_tools=3).acquire_tool(),
    lambda gov: gov.agent("agent", max_tools=3).agent("its", max_tools=3).request_tool(),
    lambda gov: gov.tool(len)(""),
    lambda gov: gov.tool(len, timeout=5)(""),
    ask_by_executor,
    ask_by_a_lazy_map,
    ask_on_a_loop,
    ask_in_a_task,
]


# ------------------------------------------------------------------------- that fails instead of waiting


@pytest.mark.parametrize("ask", WAYS)
def test_whoever_would_wait_is_told_who_holds_what(gov: NonBlockingGovernor, ask: Any) -> None:
    with gov.acquire_tool():
        with pytest.raises(WouldBlock) as caught:
            ask(gov)
        assert "no tool permit without waiting: " in str(caught.value)
        assert "tools 1/1" in str(caught.value)
        assert "; held: tool by thread 'MainThread' for 0.0 s" in str(caught.value)
        assert gov.stats().tools_waiting == 0
        assert gov.stats().global_in_use == 1


@pytest.mark.parametrize("ask", [lambda gov: gov.acquire_stream(), lambda gov: gov.request("stream")])
def test_streams_too(gov: NonBlockingGovernor, ask: Any) -> None:
    stream = gov.stream(iter)("words")  # belongs to no thread
    with pytest.raises(WouldBlock, match=r"no stream permit .* streams 1/1, .*; held: stream for 0.0 s$"):
        ask(gov)
    assert list(stream) == list("words")
    assert list(gov.stream(iter)("words")) == list("words")


def test_only_who_holds_what_is_full_is_named() -> None:
    gov = NonBlockingGovernor(max_streams=2, max_tools=2, max_global=4, name="crew")
    agent = gov.agent("coder", max_tools=1)
    with gov.acquire_stream(), gov.acquire_tool(), agent.acquire_tool():
        with pytest.raises(WouldBlock) as caught:
            agent.acquire_tool()
        error = caught.value
        assert (error.what, error.governor) == ("tool permit", "crew/coder")
        assert [str(it) for it in error.layers] == [
            "tools of 'crew/coder' 1/1",
            "tools 2/2",
            "global 3/4",
        ]
        assert [(it.kind, it.governor, it.thread) for it in error.holders] == [
            ("tool", "crew", "MainThread"),
            ("tool", "crew/coder", "MainThread"),
        ]
        assert str(error).startswith("governor 'crew/coder': no tool permit without waiting: ")


def test_a_limit_of_0_is_held_by_nobody(gov: NonBlockingGovernor) -> None:
    gov.resize(max_tools=0)
    with pytest.raises(WouldBlock, match=r"tools 0/0, global 0/2 in use; held: nobody$"):
        gov.acquire_tool()


def test_a_permit_that_another_thread_holds_is_not_waited_for(gov: NonBlockingGovernor) -> None:
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with gov.acquire_tool():
            taken.set()
            over.wait()

    with Crew() as crew:
        crew.start(hold, name="holder")
        taken.wait()
        try:
            with pytest.raises(WouldBlock, match="held: tool by thread 'holder'"):
                gov.acquire_tool()
        finally:
            over.set()


def test_what_has_room_is_had_as_ever(gov: NonBlockingGovernor) -> None:
    with gov.acquire_tool() as permit, gov.request_stream().result(timeout=0) as stream:
        assert (permit.waited, stream.waited) == (0, pytest.approx(0, abs=1))
        gov.resize(max_tools=2, max_global=3)
        with gov.acquire_tool():
            assert gov.stats().global_in_use == 3
    assert ask_by_executor(gov) == 0
    assert ask_on_a_loop(gov) == 0
    ask_in_a_task(gov)


def test_what_does_not_wait_elsewhere_is_refused_as_elsewhere(gov: NonBlockingGovernor) -> None:
    with gov.acquire_tool():
        with pytest.raises(AcquireTimeout):
            gov.acquire_tool(timeout=0)
        assert gov.try_acquire_tool() is None
        gov.close()
        with pytest.raises(SemaphoreClosed):
            gov.acquire_tool()
        with pytest.raises(SemaphoreClosed):
            gov.request_tool().result(timeout=0)


def test_a_line_of_zero_refuses_as_elsewhere() -> None:
    gov = NonBlockingGovernor(1, 1, 2, max_queued=0)
    with gov.acquire_tool(), pytest.raises(ConcurrencyLimitExceeded):
        gov.acquire_tool()


def test_who_resumes_into_a_place_that_is_free_has_it_again(gov: NonBlockingGovernor) -> None:
    with gov.acquire_tool() as permit:
        with permit.suspended(), gov.acquire_tool():
            pass
        assert permit.held
        with governor.suspended():
            gov.close()
        assert permit.held


@pytest.mark.parametrize("timeout", [None, 5])
def test_who_resumes_into_a_place_that_was_taken_is_told_and_not_held(
    gov: NonBlockingGovernor, timeout: float | None
) -> None:
    with gov.acquire_tool() as permit:
        with pytest.raises(WouldBlock, match="held: tool for"), permit.suspended(timeout):
            other = gov.acquire_tool()
        assert not permit.held
        assert gov.stats().tools_in_use == 1
        assert gov.drain(timeout=0) is False
        other.release()
    assert gov.drain(timeout=0) is True


def test_all_that_a_thread_has_suspended_is_given_up_where_one_has_no_place() -> None:
    gov = NonBlockingGovernor(2, 2, 2)
    with assert_all_returned(gov), gov.acquire_tool() as first, gov.acquire_tool() as second:
        with pytest.raises(WouldBlock), governor.suspended():
            other = gov.acquire_stream()
        assert (first.held, second.held) == (False, False)
        other.release()


def test_a_listener_hears_of_it(gov: NonBlockingGovernor) -> None:
    heard: list[GovernorEvent] = []
    stop = gov.subscribe(heard.append)
    with gov.acquire_tool(), pytest.raises(WouldBlock):
        gov.acquire_tool()
    stop()
    assert [(it.event, it.reason) for it in heard] == [
        ("acquired", None),
        ("rejected", "cancelled"),
        ("released", None),
    ]


def test_of_many_at_once_as_many_get_one_as_there_are_and_none_waits() -> None:
    gov = NonBlockingGovernor(3, 3, 3)
    refused: list[WouldBlock] = []
    together, tried = threading.Barrier(12), threading.Barrier(12)

    def ask(kind: Any) -> None:
        together.wait()
        try:
            permit = gov.acquire(kind)
        except WouldBlock as error:
            refused.append(error.with_traceback(None))
            tried.wait()
        else:
            tried.wait()
            permit.release()

    for _ in range(20):
        with assert_all_returned(gov), Crew() as crew:
            for number in range(12):
                crew.start(ask, "tool" if number % 2 else "stream")
        assert len(refused) == 9
        refused.clear()


def test_other_ways_to_make_one_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREW_MAX_TOOLS", "0")
    made = [NonBlockingGovernor.from_env("CREW_"), NonBlockingGovernor.with_defaults()]
    made[1].resize(max_tools=0)
    for gov in made:
        with pytest.raises(WouldBlock):
            gov.acquire_tool()


def test_no_error_of_the_library_is_this_one_and_it_travels_whole(gov: NonBlockingGovernor) -> None:
    with gov.acquire_tool(), pytest.raises(WouldBlock) as caught:
        gov.acquire_tool()
    twin = pickle.loads(pickle.dumps(caught.value))
    assert not isinstance(twin, governor.ConcurrencyError)
    assert isinstance(twin, AssertionError)
    assert (str(twin), vars(twin)) == (str(caught.value), vars(caught.value))


# ----------------------------------------------------------------------- that all permits are back


@pytest.fixture
def plain() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2, name="crew")


def test_nothing_out_is_no_failure_and_the_governor_stays_open(plain: ConcurrencyGovernor) -> None:
    with assert_all_returned(plain) as same:
        assert same is plain
        with plain.acquire_tool() as permit, permit.suspended():
            pass
    assert not plain.closed


@pytest.mark.parametrize(
    ("take", "saying"),
    [
        (ConcurrencyGovernor.acquire_tool, "held: tool of 'crew' for "),
        (ConcurrencyGovernor.request_stream, "held: stream of 'crew' for "),
        (lambda gov: gov.stream(iter)("words"), "held: stream of 'crew' for "),
        (lambda gov: gov.acquire_tool().__enter__(), "held: tool of 'crew' by thread 'MainThread' for "),
        (lambda gov: gov.agent("coder", max_tools=1).acquire_tool(), "held: tool of 'crew/coder' for "),
    ],
)
def test_what_is_held_is_named(plain: ConcurrencyGovernor, take: Any, saying: str) -> None:
    kept = []
    with (
        pytest.raises(AssertionError, match=f"^not all permits are back: {saying}"),
        assert_all_returned(plain, timeout=0),
    ):
        kept.append(take(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        kept.clear()
    assert is_idle(plain)


def test_what_is_suspended_is_out(plain: ConcurrencyGovernor) -> None:
    permit = plain.acquire_tool().__enter__()
    block = permit.suspended()
    with (
        pytest.raises(AssertionError, match=r"^not all permits are back: suspended: tool$"),
        assert_all_returned(plain, timeout=0),
    ):
        block.__enter__()
    block.__exit__(None, None, None)
    permit.release()


def test_a_queued_job_holds_a_permit(plain: ConcurrencyGovernor) -> None:
    plain.resize(max_tools=2)
    gate = threading.Event()
    with GovernedExecutor(plain, ThreadPoolExecutor(1)) as pool:
        with (
            pytest.raises(AssertionError, match=r"held: tool of 'crew'.*; held: tool of 'crew'"),
            assert_all_returned(plain, timeout=0),
        ):
            jobs = [pool.submit(gate.wait) for _ in range(2)]
        with assert_all_returned(plain):
            gate.set()
            assert [job.result() for job in jobs] == [True, True]


def test_who_stands_in_line_is_counted(plain: ConcurrencyGovernor) -> None:
    plain.resize(max_streams=0, max_tools=0)
    requests: list[Any] = []
    with (
        pytest.raises(AssertionError, match=r"^not .* back: 1 waiting for a stream; 2 waiting for a tool$"),
        assert_all_returned(plain, timeout=0),
    ):
        requests += [plain.request_stream(), plain.request_tool(), plain.request_tool()]
    for request in requests:
        assert request.cancel()


def test_other_threads_get_time_to_give_back(plain: ConcurrencyGovernor) -> None:
    tree = plain._global.tree

    def give_back(permit: ConcurrencyPermit) -> None:
        until(lambda: tree.drains, "the check")
        permit.release()

    with Crew() as crew, assert_all_returned(plain, timeout=20):
        crew.start(give_back, plain.acquire_tool())
    assert is_idle(plain)


def test_a_permit_that_was_dropped_is_back_and_warned_about(plain: ConcurrencyGovernor) -> None:
    with assert_all_returned(plain), pytest.warns(ResourceWarning, match="was dropped unreleased"):
        plain.acquire_tool()


def test_a_block_that_fails_by_itself_says_why(plain: ConcurrencyGovernor) -> None:
    kept: list[ConcurrencyPermit] = []
    with pytest.raises(ZeroDivisionError), assert_all_returned(plain):
        kept.append(plain.acquire_tool())
        raise ZeroDivisionError
    kept.pop().release()


def test_of_an_agent_only_its_own_counts(plain: ConcurrencyGovernor) -> None:
    agent = plain.agent("coder", max_tools=1)
    with plain.acquire_tool():
        with assert_all_returned(agent, timeout=0):
            pass
        with (
            pytest.raises(AssertionError, match=r"back: 1 waiting for a tool$"),
            assert_all_returned(agent, timeout=0),
        ):
            request = agent.request_tool()
        assert request.cancel()


def test_what_is_wrong_is_said_at_the_beginning(plain: ConcurrencyGovernor) -> None:
    with pytest.raises(TypeError, match="must be a ConcurrencyGovernor"), assert_all_returned(42):  # type: ignore[type-var]
        pytest.fail("the block was entered")
    with pytest.raises(ValueError, match="timeout"), assert_all_returned(plain, timeout=-1):
        pytest.fail("the block was entered")


SUITE = """
import pytest
from governor.testing import NonBlockingGovernor, WouldBlock, assert_all_returned

@pytest.fixture
def gov():
    with assert_all_returned(NonBlockingGovernor(4, 8, 16), timeout=0) as gov:
        yield gov

def test_clean(gov):
    with gov.acquire_tool():
        pass

def test_leak(gov):
    global leaked
    leaked = gov.acquire_tool()

def test_too_many(gov):
    with gov.acquire_stream(), gov.acquire_stream(), gov.acquire_stream(), gov.acquire_stream():
        gov.acquire_stream()

def test_dropped(gov):
    gov.acquire_tool()
"""


def test_as_a_fixture_it_fails_the_test_that_leaks(tmp_path: Path) -> None:
    (tmp_path / "test_users_code.py").write_text(SUITE, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-W", "error"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(governor.__file__).parents[1]), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=18,
    )
    summary = done.stdout.partition("short test summary info")[2]
    assert "ERROR test_users_code.py::test_leak - AssertionError: not all permits are back" in summary
    assert "FAILED test_users_code.py::test_too_many - governor.testing.WouldBlock" in summary
    assert "FAILED test_users_code.py::test_dropped - " in summary
    assert "2 failed, 2 passed, 1 error" in summary
