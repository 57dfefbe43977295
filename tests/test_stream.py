"""Governed streams: what a call returned keeps the call's permit until it is used up."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import pytest
from threads import Crew, until

from governor import ConcurrencyGovernor

pytestmark = pytest.mark.every_governor


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)


def open_(gov: ConcurrencyGovernor) -> bool:
    """Whether a stream holds the one permit there is."""
    return gov.stats().streams_in_use == 1


def governed(gov: ConcurrencyGovernor, result: object) -> Any:
    """What a governed call makes of what the call returned."""
    return gov.stream(lambda: result)()


def count(limit: int = 3) -> Generator[int, None, None]:
    yield from range(limit)


class Response:
    """Like an SDK's: iterable, closable, a context manager, with attributes of its own."""

    model = "a model"

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit
        self.closed = 0
        self.entered = 0

    def __iter__(self) -> Iterator[int]:
        return count(self.limit)

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Self:
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def double(self) -> int:
        return 2 * self.limit


class Iterating:
    """An iterator and nothing else."""

    def __init__(self, limit: int = 3) -> None:
        self.inside = count(limit)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        return next(self.inside)


STREAMS: list[Callable[[], Any]] = [count, Response, Iterating]


@pytest.fixture(params=STREAMS)
def make(request: pytest.FixtureRequest, gov: ConcurrencyGovernor) -> Any:
    """A governed function that returns a stream."""
    return gov.stream(lambda *args: request.param(*args))


# ------------------------------------------------------------------------------- how it may end


def test_a_stream_keeps_its_permit_until_it_is_exhausted(gov: ConcurrencyGovernor, make: Any) -> None:
    stream = make()
    found = []
    for item in stream:
        assert open_(gov)
        found.append(item)
    assert found == [0, 1, 2]
    assert not open_(gov)
    assert list(stream) == []


def test_a_stream_that_fails_in_the_middle_gives_its_permit_back(gov: ConcurrencyGovernor) -> None:
    @gov.stream
    def fail() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    stream = fail()
    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert not open_(gov)


def test_a_stream_that_cannot_even_begin_gives_its_permit_back(gov: ConcurrencyGovernor) -> None:
    class Broken(Response):
        def __iter__(self) -> Iterator[int]:
            raise ZeroDivisionError

    stream = governed(gov, Broken())
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert not open_(gov)


def test_a_stream_that_is_closed_in_the_middle_gives_its_permit_back(
    gov: ConcurrencyGovernor, make: Any
) -> None:
    stream = make()
    assert next(stream) == 0
    stream.close()
    assert not open_(gov)


def test_closing_twice_closes_once(gov: ConcurrencyGovernor) -> None:
    response = Response()
    stream = governed(gov, response)
    for _ in range(3):
        stream.close()
    assert response.closed == 1
    assert not open_(gov)


def test_a_close_that_fails_gives_the_permit_back_and_may_be_tried_again(gov: ConcurrencyGovernor) -> None:
    class Stubborn(Response):
        def close(self) -> None:
            super().close()
            if self.closed == 1:
                raise OSError("on purpose")

    stream = governed(gov, Stubborn())
    with pytest.raises(OSError, match="on purpose"):
        stream.close()
    assert not open_(gov)
    stream.close()
    assert stream.closed == 2


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_is_dropped_gives_its_permit_back_without_a_warning(
    gov: ConcurrencyGovernor, make: Any, begun: bool
) -> None:
    stream = make()
    if begun:
        next(stream)
    assert open_(gov)
    del stream
    assert not open_(gov)


def test_a_stream_that_is_dropped_in_a_cycle_gives_its_permit_back_without_a_warning(
    gov: ConcurrencyGovernor, make: Any
) -> None:
    stream = make()
    cycle = [next(stream), stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect()
    assert not open_(gov)


def test_a_stream_that_is_dropped_while_the_books_are_locked_warns_of_nothing(
    gov: ConcurrencyGovernor, make: Any
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def occupy() -> None:
        with gov._global.tree.lock:
            inside.set()
            leave.wait()

    stream = make()
    with Crew() as crew:
        crew.start(occupy)
        inside.wait()
        del stream
        leave.set()
    gov.acquire_tool().release()
    assert not open_(gov)


def test_a_generator_that_is_dropped_ends_before_another_takes_its_place(gov: ConcurrencyGovernor) -> None:
    still_open: list[bool] = []

    @gov.stream
    def connected() -> Iterator[int]:
        try:
            yield 1
        finally:
            still_open.append(open_(gov))

    for _ in connected():
        break
    assert still_open == [True]
    assert not open_(gov)


def test_a_stream_that_was_never_started_can_be_closed(gov: ConcurrencyGovernor) -> None:
    @gov.stream
    def never() -> Iterator[int]:
        yield pytest.fail("it was begun")

    stream = never()
    assert open_(gov)
    stream.close()  # type: ignore[attr-defined]
    assert not open_(gov)


# -------------------------------------------------------------------------- before it has begun


def test_the_permit_is_had_before_the_call(gov: ConcurrencyGovernor) -> None:
    calls: list[bool] = []

    def request() -> Iterator[int]:
        calls.append(open_(gov))
        return count()

    with Crew() as crew, gov.acquire_stream():
        crew.start(lambda: list(gov.stream(request)()))
        until(lambda: gov.stats().streams_waiting == 1, "the call in line")
        assert calls == []
    assert calls == [True]


def test_a_call_that_fails_gives_its_permit_back(gov: ConcurrencyGovernor) -> None:
    with pytest.raises(ZeroDivisionError):
        gov.stream(divmod)(1, 0)
    assert not open_(gov)


class Price:
    """A model with a field that happens to be named `close`."""

    close = 100.0

    def __iter__(self) -> Iterator[tuple[str, float]]:
        yield "close", self.close


@pytest.mark.parametrize("result", ["text", b"", [1], (1,), {"a": 1}, range(3), None, 42, Price(), object()])
def test_what_is_no_stream_is_returned_as_it_is_and_the_permit_given_back(
    gov: ConcurrencyGovernor, result: object
) -> None:
    assert governed(gov, result) is result
    assert not open_(gov)


@pytest.mark.parametrize(
    "result",
    [iter([1]), map(str, [1]), io.StringIO("1"), count(), Response(), Iterating()],
)
def test_what_can_be_iterated_and_used_up_is_a_stream(gov: ConcurrencyGovernor, result: Any) -> None:
    stream = governed(gov, result)
    assert open_(gov)
    stream.close()
    assert not open_(gov)


def test_one_function_may_return_both(gov: ConcurrencyGovernor) -> None:
    create = gov.stream(lambda stream: Response(2) if stream else "all at once")
    assert create(stream=False) == "all at once"
    assert list(create(stream=True)) == [0, 1]
    assert not open_(gov)


# ------------------------------------------------------------------------------ what shines through


def test_attributes_pass_through_in_both_directions(gov: ConcurrencyGovernor) -> None:
    response = Response()
    stream = governed(gov, response)
    assert (stream.model, stream.limit, stream.double()) == ("a model", 3, 6)
    stream.limit = 2
    assert response.limit == 2
    assert list(stream) == [0, 1]
    with pytest.raises(AttributeError, match="'Response' object has no attribute 'nothing'"):
        stream.nothing  # noqa: B018
    assert "Response object" in repr(stream)
    stream.close()


def test_a_generator_can_be_sent_to_and_delegated_to(gov: ConcurrencyGovernor) -> None:
    @gov.stream
    def echo() -> Generator[Any, Any, str]:
        heard = yield
        while heard:
            heard = yield heard
        return "done"

    def delegate() -> Generator[Any, Any, None]:
        ended.append((yield from echo()))

    ended: list[str] = []
    outer = delegate()
    next(outer)
    assert outer.send("hello") == "hello"
    assert open_(gov)
    with pytest.raises(StopIteration):
        outer.send(None)
    assert ended == ["done"]
    assert not open_(gov)


def test_a_block_enters_and_leaves_the_stream_inside(gov: ConcurrencyGovernor) -> None:
    response = Response()
    with governed(gov, response) as stream:
        assert response.entered == 1
        assert next(stream) == 0
        assert open_(gov)
    assert response.closed == 1
    assert not open_(gov)


def test_a_block_closes_a_stream_that_is_no_context_manager(gov: ConcurrencyGovernor) -> None:
    with governed(gov, count()) as stream:
        assert next(stream) == 0
    assert list(stream) == []
    assert not open_(gov)


def test_what_entering_returns_and_what_leaving_swallows_are_the_streams_affair(
    gov: ConcurrencyGovernor,
) -> None:
    class Manager(Response):
        def __enter__(self) -> Any:
            return "something else"

        def __exit__(self, *error: object) -> Any:
            return error[0] is ZeroDivisionError

    with governed(gov, Manager()) as entered:
        assert entered == "something else"
        raise ZeroDivisionError
    assert not open_(gov)
    with pytest.raises(LookupError), governed(gov, Manager()):
        raise LookupError
    assert not open_(gov)


def test_a_block_whose_stream_fails_to_be_left_gives_the_permit_back(gov: ConcurrencyGovernor) -> None:
    class Failing(Response):
        def __exit__(self, *_: object) -> None:
            raise OSError("on purpose")

    with pytest.raises(OSError, match="on purpose"), governed(gov, Failing()):
        assert open_(gov)
    assert not open_(gov)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_permit_is_not_copied_with_its_stream(
    gov: ConcurrencyGovernor, make: Any, duplicate: Callable[[Any], Any]
) -> None:
    stream = make()
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        duplicate(stream)
    assert open_(gov)
    stream.close()


# ------------------------------------------------------------------------------- other threads


def test_a_stream_may_be_consumed_and_ended_by_other_threads(gov: ConcurrencyGovernor, make: Any) -> None:
    stream, found = make(100), []
    for _ in range(10):
        with Crew() as crew:
            crew.start(lambda: found.extend(next(stream) for _ in range(10)))
    assert open_(gov)
    with Crew() as crew:
        crew.start(lambda: found.extend(stream))
    assert found == list(range(100))
    assert not open_(gov)


def test_a_stream_that_another_thread_consumes_belongs_to_no_thread(
    gov: ConcurrencyGovernor, make: Any
) -> None:
    stream, leave = make(), threading.Event()

    def consume() -> None:
        leave.wait()
        list(stream)

    with Crew() as crew:
        crew.start(consume)
        assert not gov.drain(timeout=0)  # and no complaint that this thread would wait for itself
        crew.start(leave.set)
        assert gov.drain(timeout=5)


@pytest.mark.parametrize("meddle", [next, lambda stream: stream.close()])
def test_a_generator_that_runs_in_another_thread_keeps_its_permit_when_meddled_with(
    gov: ConcurrencyGovernor, meddle: Callable[[Any], object]
) -> None:
    inside, leave = threading.Event(), threading.Event()

    @gov.stream
    def slow() -> Iterator[int]:
        inside.set()
        leave.wait()
        yield 1

    stream = slow()
    with Crew() as crew:
        crew.start(lambda: list(stream))
        inside.wait()
        with pytest.raises(ValueError, match="already executing"):
            meddle(stream)
        assert open_(gov)
        leave.set()
    assert not open_(gov)


def test_one_object_may_be_consumed_by_many_threads_at_once(gov: ConcurrencyGovernor) -> None:
    class Shared:
        """Thread-safe, as a queue's is."""

        def __init__(self) -> None:
            self.left = [*range(1_000)]

        def __iter__(self) -> Self:
            return self

        def __next__(self) -> int:
            try:
                return self.left.pop()
            except IndexError:
                raise StopIteration from None

    stream, found, together = governed(gov, Shared()), [], threading.Barrier(4)

    def consume() -> None:
        together.wait()
        found.extend(stream)

    with Crew() as crew:
        for _ in range(4):
            crew.start(consume)
    assert sorted(found) == list(range(1_000))
    assert not open_(gov)


def test_a_tool_that_returns_a_governed_stream_ends_before_it(gov: ConcurrencyGovernor) -> None:
    stream = gov.tool(lambda: governed(gov, count()))()
    assert (gov.stats().tools_in_use, gov.stats().streams_in_use) == (0, 1)
    stream.close()
