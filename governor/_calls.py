"""Governed calls: functions that run under a permit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from governor._permit import ConcurrencyPermit
from governor._stream import GovernedStream, is_stream

__all__ = ["governed_stream", "governed_tool"]

P = ParamSpec("P")
R = TypeVar("R")

_FOR_ASYNC = (
    "it would give its permit back before it has run. In async code take the permit yourself: "
    "'async with governor.integrations.asyncio.permit(gov, {kind!r})'"
)


def governed_tool(fn: Callable[P, R], acquire: Callable[[], ConcurrencyPermit]) -> Callable[P, R]:
    """Wrap a function so that each call runs under a permit."""
    _check(fn, "tool")
    if any(map(inspect.isgeneratorfunction, _bodies(fn))):
        raise TypeError(f"{fn!r} is a generator function, whose body runs after the call: use stream")

    @functools.wraps(fn)
    def governed(*args: P.args, **kwargs: P.kwargs) -> R:
        with acquire():
            return _checked(fn(*args, **kwargs), fn, "tool")

    return governed


def governed_stream(fn: Callable[P, R], acquire: Callable[[], ConcurrencyPermit]) -> Callable[P, R]:
    """Wrap a function so that each call takes a permit, which the stream it returns keeps."""
    _check(fn, "stream")

    @functools.wraps(fn)
    def governed(*args: P.args, **kwargs: P.kwargs) -> R:
        with acquire() as permit:
            result = fn(*args, **kwargs)
            if is_stream(result):
                stream: GovernedStream[Any] = GovernedStream(result, permit)
                return stream  # type: ignore[return-value]  # stands in for what it wraps
        return _checked(result, fn, "stream")

    return governed


def _check(fn: object, kind: str) -> None:
    for outer in (staticmethod, classmethod):
        if isinstance(fn, outer):
            raise TypeError(
                f"{fn!r} is decorated already: put @{outer.__name__} outermost, above the governor's"
            )
    if isinstance(fn, type):
        raise TypeError(f"{fn!r} is a class: govern the function that does the work")
    if not callable(fn):
        raise TypeError(f"{fn!r} is not callable")
    for body in _bodies(fn):
        if inspect.iscoroutinefunction(body) or inspect.isasyncgenfunction(body):
            raise TypeError(f"{fn!r} is async: " + _FOR_ASYNC.format(kind=kind))


def _bodies(fn: object) -> tuple[object, object]:
    """Where the code of a callable may be: in it or, for an object, in its class."""
    return fn, getattr(type(fn), "__call__", None)  # noqa: B004


def _checked(result: R, fn: object, kind: str) -> R:
    if hasattr(type(result), "__await__") or hasattr(type(result), "__aiter__"):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(
            f"{fn!r} returned {type(result).__name__}, which is async: " + _FOR_ASYNC.format(kind=kind)
        )
    return result
