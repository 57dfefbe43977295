"""Requests: futures that stand in line, for code that may not block."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, LOGGER, PENDING, RUNNING
from contextvars import copy_context
from time import monotonic
from typing import Any, Generic, TypeVar

from governor._errors import SemaphoreClosed
from governor._permit import ConcurrencyPermit
from governor._tree import HELD, WAITING, Node

__all__ = ["OwnedFuture", "Request", "request"]

T = TypeVar("T")

_delivering = threading.local()


class OwnedFuture(Future[T], Generic[T]):
    """A future that is cancelled by its owner, where a pool's is by the worker that meets it."""

    def _cancel(self) -> bool:
        """Cancel it and tell whoever waits for it. May be done again."""
        if not super().cancel():
            return False
        with self._condition:
            if self._state == CANCELLED:  # not told yet
                self.set_running_or_notify_cancel()
        return True


class Request(OwnedFuture[ConcurrencyPermit]):
    """A future that stands in line for a permit."""

    _permit: ConcurrencyPermit | None = None

    def claim(self) -> bool:
        """Win the right to end it otherwise than by cancelling, or have it already."""
        with self._condition:
            if self._state == PENDING:
                self.set_running_or_notify_cancel()
            return self._state == RUNNING

    def cancel(self) -> bool:
        """Leave the line, if the permit is not on its way yet."""
        permit = self._permit
        try:
            if not self._cancel():
                return False
            if permit is not None:
                permit.release()
                ticket = permit._ticket
                ticket.leaf.tree.tell_cancelled(ticket)
        except BaseException:
            if permit is not None and self.cancelled():
                permit.release()
                self._tell_again()
            raise
        return True

    def expire(self, timeout: float) -> None:
        """Leave the line after ``timeout`` seconds with AcquireTimeout, if the permit has not come yet."""
        permit = self._permit
        if permit is None:
            return
        ticket = permit._ticket
        tree, what, name = ticket.leaf.tree, f"{permit.kind} permit", ticket.source.name
        try:
            refusal = tree.withdraw(ticket)
            error = tree.error(refusal, ticket, timeout, what, name)
            if error is not None:
                if not self.claim():
                    tree.tell_cancelled(ticket)
                    return
                tree.tell_end(ticket, refusal, monotonic() - ticket.since)
                self.set_exception(error)
        except BaseException:
            self.cancel()
            raise

    def _invoke_callbacks(self) -> None:
        """Call each callback; again, where an interrupt cut that short, those that are left."""
        callbacks: list[Any] = self._done_callbacks  # type: ignore[attr-defined]
        while callbacks:
            try:
                callbacks[0](self)
            except Exception:
                LOGGER.exception("exception calling callback for %r", self)
            del callbacks[0]

    def _tell_again(self) -> None:
        with self._condition:
            self._condition.notify_all()
        self._invoke_callbacks()


class _Delivery:
    """The gate of a waiter that is a future: opened by handing the permit over.

    Several threads may be asked to. Who finds ``taken`` empty does it, and puts there what tells it
    from others, for as long as no interrupt cuts it short.
    """

    __slots__ = ("began", "context", "future", "name", "permit", "taken")

    def __init__(self, future: Request, permit: ConcurrencyPermit, name: str | None) -> None:
        self.future, self.permit, self.name = future, permit, name
        self.began = monotonic()
        # For listeners, who look at what is current where the permit was asked for.
        self.context = copy_context() if permit._ticket.leaf.tree.observed else None
        self.taken: dict[int, object] = {}

    def release(self) -> None:
        """Deliver. A future's callbacks may themselves give permits back: no deeper, but next."""
        queue: deque[_Delivery] | None = getattr(_delivering, "queue", None)
        if queue is not None:
            queue.append(self)
            return
        # Straight line to the `try`.
        _delivering.queue = queue = deque([self])
        try:
            _deliver_all(queue)
        except BaseException:
            # Straight line.
            if queue and 0 in queue[0].taken and queue[0].taken[0] is queue:
                queue[0].taken = {}
            self.permit._ticket.leaf.tree.after.extend(queue)
            raise
        finally:
            del _delivering.queue

    def deliver(self, by: object) -> None:
        """Hand over the permit, or the reason why there is none."""
        if self.taken.setdefault(0, by) is not by:
            return
        future, permit = self.future, self.permit
        ticket = permit._ticket
        tree = ticket.leaf.tree
        if future.done():
            if not future.cancelled():  # or else that is up to whoever cancels it
                future._tell_again()
        elif ticket.state is HELD and future.claim():
            ticket.since = monotonic()
            ticket.waited = ticket.since - self.began
            self._tell(tree.tell_end, ticket, None, ticket.waited)
            future.set_result(permit)
        elif ticket.state is WAITING and future.claim():  # turned out of the line, which is closed
            self._tell(tree.tell_rejected, ticket, monotonic() - self.began, "closed")
            future.set_exception(SemaphoreClosed(f"{permit.kind} permit", self.name))
        if ticket.state is WAITING or future.cancelled():
            permit.release()
        # Else the ticket, its gate, and the permit would keep each other for ever.
        future._permit = None
        ticket.gate = _NO_ONE

    def _tell(self, tell: Callable[..., None], *what: Any) -> None:
        if self.context is None:
            tell(*what)
        else:
            self.context.run(tell, *what)


def _deliver_all(queue: deque[_Delivery]) -> None:
    """Deliver; in a function of its own, as 3.13 may not see what interrupts a loop in a ``try``."""
    while queue:
        queue[0].deliver(queue)
        queue.popleft()


class _NoOne:
    def release(self) -> None:
        """Nobody waits any more."""


_NO_ONE = _NoOne()


def request(leaf: Node, source: Any) -> Future[ConcurrencyPermit]:
    """Return a future that stands in line for a permit for the path of ``leaf``."""
    permit, future, tree = source._permit(leaf, source), Request(), leaf.tree
    delivery, ticket = _Delivery(future, permit, source.name), permit._ticket
    if ticket.state is HELD:
        delivery.deliver(None)
        return future
    try:
        future._permit = permit
        ticket.gate = delivery
        ticket.waiter = None
        refusal = tree.stand(ticket)
        if refusal is not None:
            tree.tell_asked(ticket, refusal)
        error = tree.error(refusal, ticket, None, f"{permit.kind} permit", source.name)
        if error is not None:
            future._permit = None
            ticket.gate = _NO_ONE
            future.set_exception(error)
        elif ticket.state is HELD:
            delivery.deliver(None)
    except BaseException:
        tree.after.append(ticket)
        tree.serve()
        tree.tell_cancelled(ticket)
        raise
    return future
