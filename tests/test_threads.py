from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pytest
from threads import Crew, no_stray_threads, until


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_the_end_of_the_block_waits_for_everyone() -> None:
    arrived: list[int] = []
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        arrived.append(number)

    with Crew() as crew:
        for number in range(8):
            crew.start(work, number)
    assert sorted(arrived) == list(range(8))


def test_one_error_is_raised_again_as_itself() -> None:
    with pytest.raises(ZeroDivisionError), Crew() as crew:
        crew.start(lambda: 1 / 0)


def test_several_errors_are_raised_again_as_a_group() -> None:
    with pytest.raises(BaseExceptionGroup) as caught, Crew() as crew:
        crew.start(lambda: 1 / 0)
        crew.start(lambda: pytest.fail("a promise broken"))
    assert {type(error) for error in caught.value.exceptions} == {ZeroDivisionError, pytest.fail.Exception}


def test_a_thread_that_never_ends_fails_the_test_by_name(gate: threading.Event) -> None:
    stuck = pytest.raises(pytest.fail.Exception, match=r"still alive after 0\.05 s: sleeper\n")
    with stuck as caught, Crew(patience=0.05) as crew:
        crew.start(gate.wait, name="sleeper")
        crew.start(lambda: None, name="worker")
    assert "--- sleeper" in str(caught.value)


def test_an_error_that_left_others_stuck_is_their_cause(gate: threading.Event) -> None:
    with pytest.raises(pytest.fail.Exception) as caught, Crew(patience=0.05) as crew:
        crew.start(gate.wait)
        crew.start(lambda: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_block_that_fails_waits_for_nobody_and_tells_what_threads_raised(gate: threading.Event) -> None:
    with pytest.raises(LookupError) as caught, Crew() as crew:
        crew.start(gate.wait)
        crew.start(lambda: 1 / 0).join()
        raise LookupError("the block's own")
    assert "ZeroDivisionError" in "".join(caught.value.__notes__)


def test_a_crew_that_was_joined_keeps_nothing_of_what_was_raised() -> None:
    class Kept:
        pass

    def work() -> None:
        kept = Kept()
        alive.append(weakref.ref(kept))
        raise LookupError

    alive: list[weakref.ref[Kept]] = []
    crew = Crew()
    crew.start(work)
    with pytest.raises(LookupError):
        crew.join()
    until(lambda: alive[0]() is None, "the end of the traceback")


def test_until_returns_once_the_condition_holds() -> None:
    answers = iter([False, False, True])
    until(lambda: next(answers), "the third answer")


def test_until_fails_with_what_was_awaited_and_every_stack(gate: threading.Event) -> None:
    with Crew() as crew:
        crew.start(gate.wait, name="waiter")
        with pytest.raises(pytest.fail.Exception, match=r"waited 0\.05 s for Godot") as caught:
            until(lambda: False, "Godot", patience=0.05)
        gate.set()
    assert "--- waiter" in str(caught.value)
    assert "--- MainThread" in str(caught.value)


def test_a_stray_thread_is_a_failure(gate: threading.Event) -> None:
    with pytest.raises(pytest.fail.Exception, match="--- stray"), no_stray_threads(patience=0.05):
        threading.Thread(target=gate.wait, name="stray", daemon=True).start()
