"""The permit: the right to run one operation, and its suspension."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from sys import _getframe
from threading import get_ident
from time import monotonic
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from governor._deadlock import is_inside
from governor._errors import LeaseLost
from governor._tree import AWAY, HELD, OUT, Holder, Node, Ticket, nothing, trees
from governor._validate import check_timeout

__all__ = ["ConcurrencyPermit", "Kind", "check_kind", "suspended", "try_acquire", "wait_for"]

Kind = Literal["stream", "tool"]


def check_kind(kind: str) -> None:
    """Refuse what is no kind of permit.

    Raises:
        ValueError: it is neither ``"stream"`` nor ``"tool"``.
    """
    if kind not in ("stream", "tool"):
        raise ValueError(f"kind must be 'stream' or 'tool', not {kind!r}")


class ConcurrencyPermit(Holder):
    """The right to run one operation; gives back all it took, exactly once.

    Comes from a governor's ``acquire_*`` and ``try_acquire_*``. Use it as a context manager::

        with gov.acquire_tool() as permit:
            run_tool()

    or call :meth:`release` when the operation is over, from any thread. A permit that is dropped
    unreleased gives its place back when it is collected, with a ``ResourceWarning``.

    The thread that enters the permit owns it; only that thread may suspend it.
    """

    __slots__ = ("__weakref__",)

    @property
    def kind(self) -> Kind:
        """``"stream"`` or ``"tool"``."""
        return "stream" if self._ticket.leaf.kind == "stream" else "tool"

    @property
    def held(self) -> bool:
        """Whether it holds its place now: not given back, and not suspended."""
        return self._ticket.state is HELD

    @property
    def waited(self) -> float:
        """Seconds spent in line before it was granted."""
        return getattr(self._ticket, "waited", 0.0)

    @property
    def lost(self) -> bool:
        """Whether the place may be another's by now, though it is held. Only a fleet loses permits."""
        return False

    @property
    def fence(self) -> int:
        """Its age: a number that is greater than those of all that asked before it (a fencing token)."""
        return self._ticket.number

    def check(self) -> None:
        """Go on only while the place is surely this operation's.

        Raises:
            LeaseLost: the permit is :attr:`lost`.
        """
        if self.lost:
            raise LeaseLost(f"{self.kind} permit", self._ticket.source.name)

    def release(self) -> None:
        """Give the place back. Does nothing if that has happened already. Any thread may call it."""
        self._end()

    def suspended(self, timeout: float | None = None) -> Suspension:
        """Give the place back for the length of a block, so that others can run meanwhile.

        For an operation that waits for other operations under the same governor::

            with gov.acquire_tool() as permit:
                with permit.suspended():
                    answer = sub_agent.run()

        At the end of the block it takes a place again, ahead of all operations that were admitted
        later than it, whatever ``max_queued`` says and even when the governor is closed by then.
        When that times out or is interrupted, the permit is simply no longer held, and the end of
        the outer block does nothing.

        Args:
            timeout: Seconds to wait for the place at the end of the block; None waits for ever.

        Raises:
            RuntimeError: on entering the block, when this thread is not the one that entered the
                permit, or the permit is not held, or is suspended already.
            AcquireTimeout: at the end of the block, when no place came within ``timeout``.
            DeadlockError: at the end of the block, when none can ever come.
        """

        def check() -> list[Ticket]:
            if self._ticket.owner != get_ident() or self._ticket.state is not HELD:
                self._refuse("suspend")
            return [self._ticket]

        return Suspension(check, check_timeout(timeout))

    def __enter__(self) -> Self:
        ticket, me, frame = self._ticket, get_ident(), _getframe(1)
        number = hash(frame)  # its address, as `id` has it, without an audit event
        # Straight line, so that of two threads one is refused.
        if ticket.owner is None and ticket.state is HELD:
            ticket.frame = number
            ticket.entry = frame.f_lasti
            ticket.owner = me
            return self
        self._refuse("enter")

    __exit__ = Holder._end

    def _pass_on(self) -> ConcurrencyPermit:
        """Let another permit be the one for this operation: no thread owns that, and it may be dropped."""
        ticket, heir = self._ticket, object.__new__(type(self))
        rest, drop = Ticket(), partial(ticket, warns=False)
        rest.leaf, rest.source, rest.state, rest.owner = ticket.leaf, ticket.source, OUT, None
        # Straight line.
        heir._ticket = ticket
        heir.__del__ = drop
        self._ticket = rest
        self.__del__ = nothing
        ticket.owner = None
        return heir

    def _release_after(self, _job: object) -> None:
        """Release, as the callback of a future."""
        if self._ticket.state:
            self.release()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind} {self._ticket.state or 'released'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a permit cannot be copied or pickled: it is given back once, in one process")

    def _refuse(self, verb: str) -> NoReturn:
        owner, state = self._ticket.owner, self._ticket.state
        if not state:
            why = "that is not held: acquire another"
        elif state is AWAY:
            why = "that is suspended"
        elif owner is None:
            why = "that no thread has entered: use it in a with block"
        elif owner != get_ident():
            why = "that another thread has entered"
        else:
            why = "twice"
        raise RuntimeError(f"cannot {verb} a permit {why}")


class Suspension:
    """The block in which permits are suspended; see ``ConcurrencyPermit.suspended``."""

    __slots__ = ("_tickets", "_timeout", "_which")

    def __init__(self, which: Callable[[], list[Ticket]], timeout: float | None) -> None:
        self._which = which
        self._timeout = timeout

    def __enter__(self) -> None:
        self._tickets = tickets = self._which()
        try:
            for ticket in tickets:
                ticket.leaf.tree.suspend(ticket)
        except BaseException:
            _give_back(tickets)
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tickets, left, refusal = self._tickets, self._timeout, None
        deadline = None if left is None else monotonic() + left
        try:
            for ticket in tickets:
                if ticket.state is not AWAY:
                    continue  # released meanwhile, or inherited by a forked child
                tree, what = ticket.leaf.tree, f"{ticket.leaf.kind} permit"
                refusal = tree.wait(ticket, left, what, ticket.source.name, resumes=True)
                if refusal is not None:
                    break
                left = None if deadline is None else max(0.0, deadline - monotonic())
        except BaseException:
            _give_back(tickets)
            for ticket in tickets:
                ticket.leaf.tree.tell_cancelled(ticket)
            raise
        if refusal is not None:
            _give_back([it for it in tickets if it.state is AWAY])
            try:
                raise refusal
            finally:
                del refusal  # else the error and this frame would keep each other


def suspended(timeout: float | None = None) -> Suspension:
    """Give back all places of this thread for the length of a block, so that others can run.

    For code that has no permit at hand, such as a decorated tool, or a job of an executor::

        @gov.tool
        def research(question: str) -> str:
            with governor.suspended():
                return sub_agent.run(question)

    It is as :meth:`ConcurrencyPermit.suspended` of every permit whose ``with`` block this thread is
    inside of, of all governors. At the end of the block it takes them again, the oldest first. Where
    there is none, it does nothing.

    Args:
        timeout: Seconds to wait for the places at the end of the block; None waits for ever.

    Raises:
        AcquireTimeout: at the end of the block, when not all came within ``timeout``. Those that did
            not are no longer held.
        DeadlockError: at the end of the block, when one can never come.
    """

    def inside() -> list[Ticket]:
        held = [it for tree in trees() for it in tree.owned() if it.state is HELD]
        found = [it for it in held if is_inside(it.frame, it.entry, _getframe())]
        if len(found) < len(held):
            warnings.warn(
                "a permit that this thread has entered, but not by a with statement that it is inside of, "
                "stays held: use permit.suspended()",
                RuntimeWarning,
                stacklevel=3,
            )
        return found

    return Suspension(inside, check_timeout(timeout))


def _give_back(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.leaf.tree.after.append(ticket)
    for ticket in tickets:
        ticket.leaf.tree.serve()


def wait_for(permit: ConcurrencyPermit, timeout: float | None) -> ConcurrencyPermit:
    """Return a permit that was not admitted at once, when it is."""
    ticket = permit._ticket
    tree, kind, governor = ticket.leaf.tree, ticket.leaf.kind, ticket.source.name
    try:
        refusal = tree.wait(ticket, timeout, f"{kind} permit", governor)
    except BaseException:
        tree.after.append(ticket)
        tree.serve()
        tree.tell_cancelled(ticket)
        raise
    if refusal is not None:
        try:
            raise refusal
        finally:
            del refusal  # else the error and this frame would keep each other, and the agent
    return permit


def try_acquire(leaf: Node, source: Any) -> ConcurrencyPermit | None:
    """Return a permit for the path of ``leaf``, or None at once.

    ``source`` lives as long as the permit is out.
    """
    permit: ConcurrencyPermit = source._permit(leaf, source)
    tree = leaf.tree
    if permit._ticket.state is HELD:
        return permit
    ticket = permit._ticket
    try:
        taken = tree.take(leaf, ticket)
        if tree.observed:
            tree.tell_tried(ticket)
    except BaseException:
        tree.after.append(ticket)
        tree.serve()
        raise
    return permit if taken else None
