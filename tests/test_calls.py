"""Decorated calls: a permit for the length of the call, and nothing else that a caller could notice."""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from time import monotonic
from typing import Any

import pytest
from threads import Crew, until

from governor import AcquireTimeout, ConcurrencyGovernor, SemaphoreClosed

pytestmark = pytest.mark.every_governor


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)


@pytest.fixture(params=["tool", "stream"])
def decorate(request: pytest.FixtureRequest, gov: ConcurrencyGovernor) -> Any:
    """Either decorator: for calls that return no stream they are the same."""
    return getattr(gov, request.param)


def held(gov: ConcurrencyGovernor) -> tuple[int, int]:
    stats = gov.stats()
    return stats.tools_in_use, stats.streams_in_use


# ------------------------------------------------------------------------------- under a permit


@pytest.mark.parametrize(("kind", "taken"), [("tool", (1, 0)), ("stream", (0, 1))])
@pytest.mark.parametrize("options", [None, {}, {"timeout": None}, {"timeout": 5}])
def test_a_call_runs_under_a_permit_of_its_kind(
    gov: ConcurrencyGovernor, kind: str, taken: tuple[int, int], options: dict[str, Any] | None
) -> None:
    decorator = getattr(gov, kind) if options is None else getattr(gov, kind)(**options)

    @decorator
    def look(*args: int, **kwargs: int) -> object:
        return held(gov), args, kwargs

    assert look(1, 2, self=3, fn=4, timeout=5) == (taken, (1, 2), {"self": 3, "fn": 4, "timeout": 5})
    assert held(gov) == (0, 0)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, StopIteration])
def test_a_call_that_fails_gives_its_permit_back(
    gov: ConcurrencyGovernor, decorate: Any, error: type[BaseException]
) -> None:
    @decorate
    def fail() -> None:
        raise error

    with pytest.raises(error):
        fail()
    assert held(gov) == (0, 0)


def test_a_call_waits_for_its_permit(gov: ConcurrencyGovernor) -> None:
    results: list[int] = []
    double = gov.tool(lambda number: results.append(2 * number))
    with Crew() as crew, gov.acquire_tool():
        crew.start(double, 21)
        until(lambda: gov.stats().tools_waiting == 1, "the call in line")
        assert results == []
    assert results == [42]


def test_a_call_gives_up_after_the_timeout_without_having_begun(
    gov: ConcurrencyGovernor, decorate: Any
) -> None:
    began = monotonic()
    with gov.acquire_tool(), gov.acquire_stream(), pytest.raises(AcquireTimeout):
        decorate(timeout=0.02)(pytest.fail)("it was called")
    assert monotonic() - began >= 0.02


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), ("1", TypeError)])
def test_a_bad_timeout_is_found_when_decorating(decorate: Any, timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout must be a number of seconds"):
        decorate(timeout=timeout)


def test_a_call_after_the_close_is_refused(gov: ConcurrencyGovernor, decorate: Any) -> None:
    function = decorate(pytest.fail)
    gov.close()
    with pytest.raises(SemaphoreClosed):
        function("it was called")


def test_recursion_is_a_nested_acquire_like_any_other() -> None:
    gov = ConcurrencyGovernor(0, 3, 3)

    @gov.tool(timeout=0)
    def depth(number: int) -> int:
        return number if number == 0 else 1 + depth(number - 1)

    assert depth(2) == 2
    with pytest.raises(AcquireTimeout):
        depth(3)
    assert held(gov) == (0, 0)


def test_an_agent_decorates_under_its_own_limits(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=1)
    look = agent.tool(lambda: (agent.stats().tools_in_use, gov.stats().tools_in_use))
    assert look() == (1, 1)


# ---------------------------------------------------------------------------- what the caller sees


def test_signature_annotations_name_and_docstring_survive(decorate: Any) -> None:
    def search(query: str, *, limit: int = 10) -> list[str]:
        """Search the web."""
        return []

    search.schema = {"type": "object"}  # type: ignore[attr-defined]
    for governed in (decorate(search), decorate(timeout=1)(search)):
        assert inspect.signature(governed) == inspect.signature(search)
        assert typing.get_type_hints(governed) == {"query": str, "limit": int, "return": list[str]}
        for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "schema"):
            assert getattr(governed, name) == getattr(search, name)
        assert inspect.unwrap(governed) is search
        assert isinstance(governed, types.FunctionType)


def test_methods_of_all_sorts_are_governed(gov: ConcurrencyGovernor, decorate: Any) -> None:
    class Tools:
        @decorate
        def method(self, number: int) -> object:
            return self, number, sum(held(gov))

        @classmethod
        @decorate
        def of_the_class(cls, number: int) -> object:
            return cls, number, sum(held(gov))

        @staticmethod
        @decorate
        def static(number: int) -> object:
            return number, sum(held(gov))

        @property
        @decorate
        def attribute(self) -> object:
            return sum(held(gov))

    tools = Tools()
    assert tools.method(1) == (tools, 1, 1)
    assert tools.of_the_class(2) == Tools.of_the_class(2) == (Tools, 2, 1)
    assert tools.static(3) == Tools.static(3) == (3, 1)
    assert tools.attribute == 1
    assert str(inspect.signature(tools.method)) == "(number: 'int') -> 'object'"


class Callables:
    """Callables of the less usual sorts; each adds two numbers."""

    def method(self, a: int, b: int = 2) -> int:
        return a + b

    @classmethod
    def of_the_class(cls, a: int, b: int = 2) -> int:
        return a + b

    def __call__(self, a: int, b: int = 2) -> int:
        return a + b


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(lambda b, a: a + b, 2),
        functools.partialmethod(Callables.method, b=2).__get__(Callables()),
        functools.lru_cache(Callables().method),
        Callables().method,
        Callables.of_the_class,
        Callables(),
        (2).__add__,
        functools.partial(max, 3),
    ],
    ids=["partial", "partialmethod", "cached", "method", "classmethod", "object", "builtin", "max"],
)
def test_any_callable_can_be_governed(gov: ConcurrencyGovernor, decorate: Any, function: Any) -> None:
    governed = decorate(function)
    assert governed(1) == 3
    try:
        expected: object = inspect.signature(function)
    except ValueError:
        return  # not every builtin has one
    assert inspect.signature(governed) == expected


# ------------------------------------------------------------------------------------------ refused


async def coroutine_function() -> None: ...


async def async_generator_function() -> AsyncIterator[int]:
    yield 1


def generator_function() -> Iterator[int]:
    yield 1


class Async:
    async def method(self) -> None: ...

    async def __call__(self) -> None: ...


class Generating:
    def __call__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    "function",
    [
        coroutine_function,
        async_generator_function,
        functools.partial(coroutine_function),
        Async().method,
        Async(),
    ],
)
def test_what_is_async_is_refused_when_decorated(decorate: Any, function: Any) -> None:
    for decorator in (decorate, decorate(timeout=1)):
        with pytest.raises(TypeError, match=r"is async: .*governor\.integrations\.asyncio\.permit\(gov, "):
            decorator(function)


def test_a_class_is_refused_when_decorated(decorate: Any) -> None:
    with pytest.raises(TypeError, match="is a class: govern the function that does the work"):
        decorate(Async)


@pytest.mark.parametrize("inner", [staticmethod, classmethod])
def test_the_wrong_order_of_decorators_is_refused(decorate: Any, inner: Any) -> None:
    with pytest.raises(TypeError, match=f"put @{inner.__name__} outermost"):
        decorate(inner(generator_function))


@pytest.mark.parametrize("function", [None, "search", 42])
def test_what_cannot_be_called_is_refused(gov: ConcurrencyGovernor, function: Any) -> None:
    with pytest.raises(TypeError, match="is not callable"):
        gov.tool()(function)


@pytest.mark.parametrize(
    "function", [generator_function, functools.partial(generator_function), Generating()]
)
def test_a_tool_cannot_be_a_generator_function(gov: ConcurrencyGovernor, function: Any) -> None:
    with pytest.raises(TypeError, match="body runs after the call: use stream"):
        gov.tool(function)


class Awaitable:
    def __await__(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize("result", [coroutine_function, async_generator_function, Awaitable, asyncio.Future])
@pytest.mark.filterwarnings("error")  # such as: a coroutine was never awaited
def test_what_is_async_is_refused_when_returned(
    gov: ConcurrencyGovernor, decorate: Any, result: Callable[[], Any]
) -> None:
    loop = asyncio.new_event_loop()
    make = functools.partial(result, loop=loop) if result is asyncio.Future else result
    with pytest.raises(TypeError, match=r"returned \w+, which is async: .*asyncio\.permit\(gov, "):
        decorate(lambda: make())()
    assert held(gov) == (0, 0)
    loop.close()
