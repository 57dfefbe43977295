"""The layer: a bounded semaphore that may have a parent."""

from __future__ import annotations

import threading
from collections import deque
from itertools import repeat, starmap
from types import TracebackType

from governor._errors import ConcurrencyLimitExceeded, SemaphoreClosed
from governor._tree import HELD, Holder, Node, Ticket, is_closed, nothing
from governor._validate import check_count, check_name, check_timeout

__all__ = ["Layer"]


class Layer(threading.BoundedSemaphore):
    """A bounded semaphore of which every unit is also a unit of its parent.

    Use it for a tree of limits of your own::

        everything = Layer(16)
        downloads = Layer(4, parent=everything)
        with downloads:         # one of each, taken in one step
            fetch()

    Behaves as ``threading.BoundedSemaphore``; beyond that it is fair (first come, first served,
    skipping only those whose layers are full), can be resized and closed, and a waiter holds
    nothing of any layer.
    """

    def __init__(self, value: int = 1, *, parent: Layer | None = None, name: str | None = None) -> None:
        """Make a layer.

        Args:
            value: How many may hold it at once, a count >= 0.
            parent: The layer of which each unit also takes one.
            name: For messages.

        Raises:
            TypeError: ``value`` is not an integer, ``parent`` not a layer, ``name`` not a string.
            ValueError: ``value`` is negative, ``name`` empty.
        """
        # Not the base's __init__: its condition and counter would be books beside the books.
        limit = check_count("value", value)
        if parent is not None and not isinstance(parent, Layer):
            raise TypeError(f"parent must be a Layer or None, not {parent!r}")
        label = "layer" if name is None else check_name("name", name)
        self._node: Node = Node(limit, label, None if parent is None else parent._node)
        self._tickets: deque[Ticket] = deque()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take one of this layer and of each above it, in one step.

        Args:
            blocking: Whether to wait where there is no room.
            timeout: Seconds to wait; None waits for ever.

        Returns:
            Whether it was taken. False, also on a closed layer, where it did not wait.

        Raises:
            SemaphoreClosed: the layer, or one above it, is closed, or was while waiting.
            ValueError: a timeout was given for a call that does not wait, or is negative.
        """
        if not blocking and timeout is not None:
            raise ValueError("can't specify timeout for non-blocking acquire")
        timeout = check_timeout(timeout)
        node = self._node
        tree, hold, refusal = node.tree, Holder(node, None), None
        # Straight line to the `try`: from here on this layer answers for the ticket.
        ticket = hold._ticket
        hold.__del__ = nothing
        taken = ticket.state is HELD
        try:
            taken = taken or tree.take(node, ticket)
            if not taken and blocking:
                refusal = tree.wait(ticket, timeout, f"place in {node.name!r}")
                taken = refusal is None
            if taken:
                self._tickets.append(ticket)
        except BaseException:
            tree.after.append(ticket)
            try:
                self._tickets.remove(ticket)
            except ValueError:
                pass  # not there yet, or released by another thread meanwhile
            tree.serve()
            raise
        if isinstance(refusal, (SemaphoreClosed, ConcurrencyLimitExceeded)):
            try:
                raise refusal
            finally:
                del refusal  # else the error and this frame would keep each other
        return taken

    __enter__ = acquire

    def release(self, n: int = 1) -> None:
        """Give back ``n`` of what was taken of this layer.

        Raises:
            ValueError: ``n`` is less than one, or more than is held.
        """
        if n < 1:
            raise ValueError("n must be one or more")
        tickets: list[Ticket] = []
        tree = self._node.tree
        try:
            # One C call: no interrupt finds a ticket on its way from one list to the other.
            tickets.extend(starmap(self._tickets.pop, repeat((), n)))
            for ticket in tickets:
                tree.give_back(ticket)
        except IndexError:
            self._tickets.extend(tickets)
            raise ValueError("Semaphore released too many times") from None
        except BaseException:
            tree.after.extend(tickets)
            tree.serve()
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def limit(self) -> int:
        """How many may hold it at once."""
        return self._node.limit

    @property
    def in_use(self) -> int:
        """How many hold it or a layer below it."""
        return self._node.tree.usage(self._node)[0][0]

    @property
    def available(self) -> int:
        """How many more could hold it: ``max(0, limit - in_use)``."""
        used, _, limit = self._node.tree.usage(self._node)[0]
        return max(0, limit - used)

    @property
    def waiting(self) -> int:
        """How many wait for it or for a layer below it."""
        return self._node.tree.usage(self._node)[0][1]

    def resize(self, limit: int) -> None:
        """Change the limit while in use: growing admits waiters at once, shrinking revokes nothing.

        Raises:
            TypeError: ``limit`` is not an integer.
            ValueError: ``limit`` is negative.
        """
        self._node.tree.revise((self._node, check_count("limit", limit)))

    def close(self) -> None:
        """Wake every waiter with ``SemaphoreClosed`` and refuse newcomers, below it too."""
        self._node.tree.revise((self._node, None))

    @property
    def closed(self) -> bool:
        """Whether it, or a layer above it, was closed."""
        return is_closed(self._node)

    def __repr__(self) -> str:
        used, waiting, limit = self._node.tree.usage(self._node)[0]
        closed = " closed" if self.closed else ""
        return (
            f"<{type(self).__module__}.{type(self).__qualname__} {self._node.name!r}"
            f" {used}/{limit} in use, {waiting} waiting{closed} at {id(self):#x}>"
        )
