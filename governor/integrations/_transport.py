"""Governed transports, for httpx and for httpx2, which differ in their names alone."""

from __future__ import annotations

import asyncio
from _thread import start_new_thread
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

from governor._errors import AcquireTimeout
from governor._permit import ConcurrencyPermit
from governor.integrations._http import Gate

__all__ = ["AsyncStream", "AsyncTransport", "Stream", "Transport"]


class _Response(Protocol):
    stream: Any

    @property
    def is_closed(self) -> bool: ...


Q = TypeVar("Q")
R = TypeVar("R", bound=_Response)

# Tasks that close what was dropped. A loop has only weak references to its tasks.
_closing: set[asyncio.Task[None]] = set()


class Stream:
    """The body of a response. Keeps the permit until it is read to the end, closed or dropped."""

    def __init__(self, stream: Any, permit: ConcurrencyPermit) -> None:
        self._stream = stream
        self._permit = permit
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        finally:  # httpx does not close what has failed
            self.close()

    def close(self) -> None:
        """Close the stream inside, then give the permit back."""
        try:
            if not self._closed:
                self._closed = True
                self._stream.close()
            self._permit.release()
        except BaseException:
            self._permit.release()
            raise

    def give_back(self) -> None:
        """Give the permit back, whatever becomes of the stream."""
        self._permit.release()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):  # where it was not even made
            # Closing takes the lock of the connection pool, and a finalizer may run in the very
            # thread that has it.
            try:
                start_new_thread(self.close, ())
            except RuntimeError:
                pass  # the interpreter ends: the permit is dropped, too


class AsyncStream:
    """As Stream, for asyncio."""

    def __init__(self, stream: Any, permit: ConcurrencyPermit) -> None:
        self._stream = stream
        self._permit = permit
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = self._stream.__aiter__()
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            try:
                if isinstance(chunks, AsyncGenerator):
                    await chunks.aclose()
            finally:
                await self.aclose()

    async def aclose(self) -> None:
        """Close the stream inside, then give the permit back."""
        try:
            if not self._closed:
                self._closed = True
                await self._stream.aclose()
            self._permit.release()
        except BaseException:
            self._permit.release()
            raise

    def give_back(self) -> None:
        """Give the permit back, whatever becomes of the stream."""
        self._permit.release()

    def __del__(self) -> None:
        # The permit is dropped, too. It does not wait for the stream to be closed, since nobody knows
        # whether the loop will come to that.
        if not getattr(self, "_closed", True) and self._loop.is_running():
            try:
                self._loop.call_soon_threadsafe(_close_soon, self._loop, self._stream)
            except RuntimeError:
                pass  # the loop was closed meanwhile


def _close_soon(loop: asyncio.AbstractEventLoop, stream: Any) -> None:
    task = loop.create_task(stream.aclose())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


class _Governed(Generic[Q, R]):
    """What both kinds of transports have."""

    _stream: ClassVar[type[Any]]
    _pool_timeout: ClassVar[type[Exception]]

    def __init__(self, gate: Gate[Q], transport: Any) -> None:
        self._gate = gate
        self._transport = transport
        self._open: WeakValueDictionary[int, Stream | AsyncStream] = WeakValueDictionary()

    def _timed_out(self, error: AcquireTimeout, request: Q) -> Exception:
        make: Any = self._pool_timeout
        timed_out: Exception = make(str(error), request=request)
        return timed_out

    def _let_keep(self, response: R, permit: ConcurrencyPermit) -> R:
        """Let the response keep the permit, unless it is over already, as those of mocks are."""
        if response.is_closed:
            permit.release()
        else:
            stream = response.stream = self._stream(response.stream, permit)
            self._open[id(stream)] = stream
        return response

    def _give_back(self) -> None:
        """Give back the permits of all streams, whose connections are closed."""
        for reference in self._open.valuerefs():
            stream = reference()
            if stream is not None:
                stream.give_back()


class Transport(_Governed[Q, R]):
    """A transport that sends a request once its permit is held."""

    def handle_request(self, request: Q) -> R:
        """Wait for a permit, then send the request. The response keeps the permit until it is closed.

        Raises:
            PoolTimeout: no permit came within ``acquire_timeout``; its ``__cause__`` is the
                ``AcquireTimeout``.
            SemaphoreClosed: the governor is closed, or was while waiting.
            ConcurrencyLimitExceeded: too many wait already.
            DeadlockError: it could never come, as this thread is part of a circle of waits.
        """
        response: R
        if not self._gate.governs(request):
            response = self._transport.handle_request(request)
            return response
        try:
            permit = self._gate.acquire()
        except AcquireTimeout as error:
            raise self._timed_out(error, request) from error
        try:
            response = self._transport.handle_request(request)
            return self._let_keep(response, permit)
        except BaseException:
            permit.release()
            raise

    def close(self) -> None:
        """Close the transport inside, and with it all connections; their permits come back."""
        try:
            self._transport.close()
        finally:
            self._give_back()

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        try:
            self._transport.__exit__(exc_type, exc_value, traceback)
        finally:
            self._give_back()


class AsyncTransport(_Governed[Q, R]):
    """As Transport, for asyncio."""

    async def handle_async_request(self, request: Q) -> R:
        """Wait for a permit, the loop running on, then send the request.

        A task that is cancelled while it waits leaves the line, and a permit that was on its way to
        it is given back. The response keeps the permit until it is closed.

        Raises:
            PoolTimeout: no permit came within ``acquire_timeout``; its ``__cause__`` is the
                ``AcquireTimeout``.
            SemaphoreClosed: the governor is closed, or was while waiting.
            ConcurrencyLimitExceeded: too many wait already.
        """
        response: R
        if not self._gate.governs(request):
            response = await self._transport.handle_async_request(request)
            return response
        try:
            permit = await self._gate.acquire_async()
        except AcquireTimeout as error:
            raise self._timed_out(error, request) from error
        try:
            response = await self._transport.handle_async_request(request)
            return self._let_keep(response, permit)
        except BaseException:
            permit.release()
            raise

    async def aclose(self) -> None:
        """Close the transport inside, and with it all connections; their permits come back."""
        try:
            await self._transport.aclose()
        finally:
            self._give_back()

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        try:
            await self._transport.__aexit__(exc_type, exc_value, traceback)
        finally:
            self._give_back()
