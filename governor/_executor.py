"""The executor: a pool that a job enters only with a permit."""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import Context, copy_context
from functools import partial
from threading import Thread
from typing import Any, ParamSpec, TypeVar

from governor._errors import SemaphoreClosed
from governor._governor import Governor
from governor._permit import ConcurrencyPermit, Kind, check_kind
from governor._request import OwnedFuture, Request
from governor._tree import UNLIMITED
from governor._validate import check_count, check_timeout

__all__ = ["GovernedExecutor"]

P = ParamSpec("P")
T = TypeVar("T")

_serial = itertools.count(1)

_SHUT = "cannot schedule new futures after shutdown"  # the stdlib's words


class GovernedExecutor(Executor):
    """An executor that submits a job to another one only once a permit is held.

    A bare pool takes any number of jobs and queues them; here the submitter waits its turn
    instead, so that memory does not grow with the jobs and all pools together keep the governor's
    limits::

        with GovernedExecutor(gov, ThreadPoolExecutor(32)) as pool:
            pool.submit(run_tool, argument)

    The permit comes back when the job is over, however it ends. In a thread pool the job runs in a
    copy of the submitter's context variables, and its thread owns the permit meanwhile. Other pools
    get the function as it is.

    It owns the pool that it was given: shutting it down shuts the pool down.
    """

    def __init__(
        self,
        governor: Governor,
        executor: Executor,
        *,
        kind: Kind = "tool",
        acquire_timeout: float | None = None,
    ) -> None:
        """Govern ``executor``.

        Args:
            governor: Whose permits the jobs take.
            executor: The pool that runs them.
            kind: The kind of permit, ``"tool"`` or ``"stream"``.
            acquire_timeout: Seconds that a submitter waits for a permit; None: for ever.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the kind is another one, or the timeout is negative.
        """
        if not isinstance(executor, Executor):
            raise TypeError(f"executor must be a concurrent.futures.Executor, not {executor!r}")
        check_kind(kind)
        self._timeout = check_timeout(acquire_timeout, "acquire_timeout")
        self._kind: Kind = kind
        self._executor = executor
        self._shut = False
        # A branch of its own, so that shutdown can turn out those who wait for this executor.
        self._governor = own = governor.agent(f"{type(self).__name__}-{next(_serial)}", max_tools=UNLIMITED)
        own._name = governor.name  # for messages: nobody has asked for that branch
        self._acquire = own.acquire_tool if kind == "tool" else own.acquire_stream
        self._in_threads = _runs_in_threads(executor)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Wait for a permit, then submit the job. All keyword arguments are the function's.

        On a thread with a running event loop it does not wait: the future that it returns stands in
        line instead, and the job is submitted when its permit comes.

        Returns:
            The job's future.

        Raises:
            AcquireTimeout: no permit came within ``acquire_timeout``.
            RuntimeError: the executor was shut down, before or while waiting.
            SemaphoreClosed: the governor was closed, before or while waiting.
            ConcurrencyLimitExceeded: too many wait already.
        """
        loop = _running_loop()
        try:
            if loop is None:
                permit = self._acquire(self._timeout)
            else:
                request: Any = self._governor.request(self._kind)
                if not request.done():
                    return _Deferred(self, request, loop, partial(fn, *args, **kwargs))
                permit = request.result()
        except SemaphoreClosed:
            self._refuse_when_shut()
            raise
        return self._start(permit, fn, args, kwargs)

    def try_submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T] | None:
        """Submit the job if a permit is free at once; otherwise return None.

        Raises:
            RuntimeError: the executor was shut down.
        """
        permit = self._governor.try_acquire(self._kind)
        if permit is None:
            self._refuse_when_shut()
            return None
        return self._start(permit, fn, args, kwargs)

    def _start(
        self, permit: ConcurrencyPermit, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[T]:
        """Submit. The permit comes back when the future is done or, in a thread pool, just before."""
        future: Future[T] | None = None
        try:
            if self._in_threads:
                future = self._executor.submit(_run, permit, copy_context(), fn, args, kwargs)
            else:
                future = self._executor.submit(fn, *args, **kwargs)
            future.add_done_callback(permit._release_after)
        except BaseException:
            if future is not None:
                future.cancel()
                future.add_done_callback(permit._release_after)
            elif _may_enter(permit):
                permit.release()
            raise
        return future

    def _refuse_when_shut(self) -> None:
        if self._shut:
            raise RuntimeError(_SHUT)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Map a function over iterables; results come in order.

        Args:
            fn: What to call with an item of each iterable.
            iterables: Read to the end at once or, with ``buffersize``, only as results are taken.
            timeout: Seconds from now within which a result must be there when asked for.
            chunksize: How many calls make one job, and so take one permit.
            buffersize: How many jobs may be submitted and not yet yielded; None: all at once. With
                it, infinite iterables are welcome.

        Returns:
            An iterator. When a call fails, or the iterator is closed or dropped half-way, what has not
            begun is cancelled.

        Raises:
            TimeoutError: from the iterator, when ``timeout`` has passed.
            TypeError: a count is not an integer.
            ValueError: a count is less than one.
        """
        check_count("chunksize", chunksize, least=1)
        if buffersize is not None:
            check_count("buffersize", buffersize, least=1)
        deadline = None if timeout is None else time.monotonic() + timeout
        calls = zip(*iterables, strict=False)
        if chunksize == 1:
            return self._results((partial(fn, *call) for call in calls), buffersize, deadline)
        chunks = iter(lambda: list(itertools.islice(calls, chunksize)), [])
        jobs = (partial(_call_each, fn, chunk) for chunk in chunks)
        return _one_by_one(self._results(jobs, buffersize, deadline))

    def _results(
        self, jobs: Iterator[Callable[[], Any]], buffersize: int | None, deadline: float | None
    ) -> Generator[Any, None, None]:
        futures: deque[Future[Any]] = deque()
        submitted = map(self.submit, jobs)
        try:
            futures.extend(itertools.islice(submitted, buffersize))
        except BaseException:
            _cancel(futures)
            raise
        if buffersize is None:
            # As with the stdlib's, this neither keeps the executor, nor stops the jobs when dropped
            # before the first result was asked for.
            return _in_order(futures, deadline)
        results = _in_order(futures, deadline, submitted)
        next(results)
        return results

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse new submitters, wake those who wait with RuntimeError, then shut the pool down.

        Args:
            wait: Whether to return only when all jobs are over.
            cancel_futures: Whether to cancel the jobs that have not begun.
        """
        self._shut = True
        self._governor._close()  # of which nobody is told: nobody has asked for that branch
        self._executor.shutdown(wait=wait, cancel_futures=cancel_futures)


def _run(
    permit: ConcurrencyPermit,
    context: Context,
    fn: Callable[..., T],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    """Call a function in a thread of the pool: under its permit, in its submitter's context."""
    # Refused where the submitter was interrupted and took the permit back; nobody has the future.
    with permit:
        return context.run(fn, *args, **kwargs)


def _may_enter(permit: ConcurrencyPermit) -> bool:
    """Whether no job has begun under this permit; then none will."""
    try:
        permit.__enter__()
    except RuntimeError:
        return False
    return True


class _Deferred(OwnedFuture[T]):
    """The future of a job that is submitted when its permit comes, as its submitter may not wait."""

    def __init__(self, executor: GovernedExecutor, request: Any, loop: Any, job: Callable[[], T]) -> None:
        super().__init__()
        self._todo = [(executor, copy_context(), job)]
        self._stage: Future[Any] = request  # what there is to cancel: this, then the job in the pool
        if executor._timeout is not None:
            loop.call_later(executor._timeout, _expire, weakref.ref(request), executor._timeout)
        request.add_done_callback(self._begin)

    def cancel(self) -> bool:
        return self.cancelled() or (self._stage.cancel() and self._cancel())

    def running(self) -> bool:
        return super().running() or (not self.done() and self._stage.running())

    def _begin(self, request: Future[ConcurrencyPermit]) -> None:
        if request.cancelled() or request.exception() is not None:
            self._end_as(request)
            return
        try:
            # Whoever gave the place back may be inside the pool, with its lock taken: in `shutdown`,
            # which cancels what is queued, or in a signal handler amid `submit`.
            Thread(target=self._submit, args=(request.result(),), daemon=False).start()
        except RuntimeError as error:
            request.result().release()
            self._fail(error)

    def _submit(self, permit: ConcurrencyPermit) -> None:
        try:
            executor, context, job = self._todo.pop()
        except IndexError:
            return  # begun already: an interrupt had the callback called again
        try:
            self._stage = context.run(executor._start, permit, job, (), {})
        except BaseException as error:
            self._fail(error)
        else:
            self._stage.add_done_callback(self._end_as)

    def _end_as(self, stage: Future[Any]) -> None:
        if stage.cancelled():
            self._cancel()
        elif (error := stage.exception()) is not None:
            shut = isinstance(error, SemaphoreClosed) and any(it._shut for it, _, _ in self._todo)
            self._fail(RuntimeError(_SHUT) if shut else error)
        elif not self.done():
            self.set_result(stage.result())
        self._let_go()

    def _fail(self, error: BaseException) -> None:
        if not self.done():
            self.set_exception(error)
        self._let_go()

    def _let_go(self) -> None:
        """Keep neither what is over, nor what that keeps."""
        self._todo.clear()
        self._stage = _OVER


_OVER: Future[Any] = Future()
_OVER.set_result(None)


def _expire(request: weakref.ref[Request], timeout: float) -> None:
    if (waiting := request()) is not None:
        waiting.expire(timeout)


def _call_each(fn: Callable[..., T], calls: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*call) for call in calls]


def _cancel(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


def _in_order(
    futures: deque[Future[Any]], deadline: float | None, submitted: Iterator[Future[Any]] | None = None
) -> Generator[Any, None, None]:
    """Yield results; after each, take one more of ``submitted``, where that is to be lazy."""
    try:
        if submitted is not None:
            yield None  # for the one who begins this, so that to drop it cancels from then on
        while futures:
            yield _result(futures, deadline)
            if submitted is not None:
                futures.extend(itertools.islice(submitted, 1))
    finally:
        _cancel(futures)


def _one_by_one(chunks: Generator[list[T], None, None]) -> Iterator[T]:
    """Yield what is in the chunks, and keep nothing of what was yielded."""
    with closing(chunks):
        for chunk in chunks:
            chunk.reverse()
            while chunk:
                yield chunk.pop()


def _result(futures: deque[Future[Any]], deadline: float | None) -> Any:
    """Wait for the first, and let go of it whatever comes: its result is the consumer's alone."""
    future = futures.popleft()
    try:
        try:
            return future.result(None if deadline is None else deadline - time.monotonic())
        finally:
            future.cancel()
    finally:
        del future


def _runs_in_threads(executor: Executor) -> bool:
    if isinstance(executor, GovernedExecutor):
        return executor._in_threads
    interpreters = getattr(sys.modules.get("concurrent.futures.interpreter"), "InterpreterPoolExecutor", ())
    return isinstance(executor, ThreadPoolExecutor) and not isinstance(executor, interpreters)


def _running_loop() -> Any:
    """The event loop that runs in this thread, if one does; asyncio is not imported to ask."""
    events = sys.modules.get("asyncio.events")
    return None if events is None else events._get_running_loop()
