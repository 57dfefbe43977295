"""Governed streams: what a call returned, keeping its permit until it is used up."""

from __future__ import annotations

from collections.abc import Iterator
from types import GeneratorType, TracebackType
from typing import Any, Generic, NoReturn, SupportsIndex, TypeVar

from governor._permit import ConcurrencyPermit

__all__ = ["GovernedStream", "is_stream"]

T = TypeVar("T")


def is_stream(result: object) -> bool:
    """Whether a call's result is worth a permit: it has ``__next__``, or ``__iter__`` and ``close``."""
    kind = type(result)
    if hasattr(kind, "__next__"):
        return True
    # A method: the prices of a day have a `close`, too, and a model of them can be iterated over.
    return hasattr(kind, "__iter__") and callable(getattr(result, "close", None))


def _method(stream: object, name: str) -> Any:
    return getattr(type(stream), name, None)


class GovernedStream(Generic[T]):
    """A stream that gives its permit back when exhausted, failed, closed or dropped.

    Iteration, ``close()``, ``with`` and all other attributes are those of the stream inside. Any
    thread may consume it.
    """

    __slots__ = (
        "__weakref__",
        "_governor_closed",
        "_governor_iterator",
        "_governor_permit",
        "_governor_stream",
    )

    _governor_iterator: Any
    _governor_stream: Any

    def __init__(self, stream: Any, permit: ConcurrencyPermit) -> None:
        # Whoever consumes the stream ends the operation: the thread that began it no longer owns it.
        self._governor_permit = permit._pass_on()
        self._governor_stream = stream
        self._governor_iterator = None if _method(stream, "__next__") is None else stream
        self._governor_closed = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            if self._governor_iterator is None:
                self._governor_iterator = iter(self._governor_stream)
            item: T = next(self._governor_iterator)
        except BaseException:  # StopIteration too: whatever ends the stream ends the operation
            self._end()
            raise
        return item

    def close(self) -> None:
        """Close the stream inside, where it can be closed, and give the permit back."""
        try:
            if not self._governor_closed:
                close = getattr(self._governor_stream, "close", None)
                if close is not None:
                    close()
                self._governor_closed = True
            self._governor_permit.release()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        """Give the permit back after an error, unless that was a mere refusal."""
        iterator = self._governor_iterator
        if isinstance(iterator, GeneratorType) and iterator.gi_running:
            return  # another thread is in the middle of it, and goes on
        self._governor_permit.release()

    def __enter__(self) -> Any:
        enter = _method(self._governor_stream, "__enter__")
        if enter is not None:
            entered = enter(self._governor_stream)
            if entered is not self._governor_stream:
                return entered
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        leave = _method(self._governor_stream, "__exit__")
        if leave is None:
            self.close()
            return None
        try:
            swallow = leave(self._governor_stream, exc_type, exc, traceback)
            self._governor_permit.release()
        except BaseException:
            self._end()
            raise
        return bool(swallow)

    def __del__(self) -> None:
        # The stream inside ends first: only then may another take its place.
        self._governor_iterator = self._governor_stream = None
        permit = getattr(self, "_governor_permit", None)  # None: interrupted as it was made
        if permit is not None:
            permit.__del__()  # and once more by itself, should this be interrupted as it begins

    def __getattr__(self, name: str) -> Any:
        if name in type(self).__slots__:
            raise AttributeError(name)
        return getattr(self._governor_stream, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._governor_stream, name, value)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a governed stream cannot be copied or pickled: it keeps a permit")

    def __repr__(self) -> str:
        return f"<governed {self._governor_stream!r}>"
