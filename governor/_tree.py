"""The tree: the lock, the books, the line, hand-off, close and fork of layers that share a root.

All change of shared state happens in this file.

Guarantees
    *All or nothing.* An operation takes one of every layer of its path in one step, or none. A
    waiter holds nothing.

    *Fairness.* Whenever the lock is free, no waiter could run. So a newcomer with room on its whole
    path overtakes nobody, and need not look at the line.

    *Interruption.* An exception from a signal handler, at any point, leaves the books right or
    marked for repair, the lock free, and every ticket in the books or noted for giving back.

Assumptions
    *The truth* is three dicts, ``held``, ``line`` and ``away``, and each layer's ``limit`` and
    ``closed``. All else is derived from them, and can be derived anew at any time (``_rebuild``).

    *Straight lines.* CPython runs signal handlers only at a function's start, after a call and on a
    backward jump. So a line of loads, stores and comparisons of plain attributes, locals and items
    of int-keyed dicts is not cut in two, nor is one that ends in its only C call. A comment marks
    where that is relied upon. All else runs with ``dirty`` set, and whoever finds it set rebuilds.

The line is a tree of heaps: each layer that has room offers its oldest waiter to its parent, and
what the root would offer is granted. That finds the oldest waiter whose whole path has room with one
heap operation a layer, however many agents there are.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from threading import TIMEOUT_MAX, Lock, RLock, get_ident
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

from governor._deadlock import find_circle, is_inside
from governor._errors import (
    AcquireTimeout,
    ConcurrencyError,
    ConcurrencyLimitExceeded,
    DeadlockError,
    LayerUse,
    SemaphoreClosed,
    ThreadWait,
)

__all__ = [
    "AWAY", "HELD", "OUT", "UNLIMITED", "WAITING", "Holder", "Node", "PermitHolder", "Ticket", "Tree",
    "is_closed", "nothing", "path", "trees", "waiting_files",
]  # fmt: skip

nothing = bool  # the cheapest to call, to no effect
_Latch = type(Lock())
_loaded: bool | None = True  # None when the interpreter ends and has taken this module apart

UNLIMITED = 1 << 256  # a limit that nobody means

# A ticket's states; compared by identity.
OUT, WAITING, HELD, AWAY = "", "waiting", "held", "suspended"

_PARKED, _BUSY = "parked", "busy"

# What listeners are told of a refusal.
_REASONS = {
    AcquireTimeout: "timeout",
    ConcurrencyLimitExceeded: "full",
    DeadlockError: "deadlock",
    SemaphoreClosed: "closed",
}


class Gate(Protocol):
    """What a waiter is woken by: a taken lock, or whatever delivers a grant in its place."""

    def release(self) -> object: ...


class Ticket:
    """The record of one operation, from the line to its end.

    ``number`` is its age, drawn under the lock, and so its place in line for ever. ``state`` says
    which books it is in: OUT (none), WAITING (``line``), HELD (``held``) or AWAY (``away``, and
    ``line`` while it waits to come back). ``owner`` is the thread that entered the permit, at
    ``entry``; ``source`` is whoever asked for it, kept alive as long as the ticket is in the books.
    ``waiter`` is the thread that waits with no timeout. ``refusal`` is why one was turned out of the
    line, and ``since`` the time when the place was taken. ``told`` says what listeners know: True that
    it has its place, False that it has none, None that it has asked. ``age``, ``fence``, ``lost`` and
    ``serial`` are a fleet's: its place in line among all, its fencing number, whether its place may be
    another's by now, and what the fleet knows its place by.
    """

    __slots__ = (
        "age", "entry", "fence", "frame", "gate", "leaf", "lost", "number", "owner", "refusal", "serial",
        "since", "source", "state", "told", "waited", "waiter",
    )  # fmt: skip

    age: int
    entry: int
    fence: int
    frame: int
    gate: Gate
    leaf: Node
    lost: bool
    number: int
    owner: int | None
    refusal: _Refusal
    serial: int
    since: float
    source: Any
    state: str
    told: bool | None
    waited: float
    waiter: int | None

    _warn = staticmethod(warnings.warn)  # at hand even when the module is being torn down

    def __call__(self, *, warns: bool = True) -> None:
        """End what was dropped unreleased: the finalizer of whoever answers for it."""
        if state := self.state:
            tree = self.leaf.tree
            try:
                tree.after.append(self)
                tree.serve(wait=False)
            except BaseException:
                tree.serve(wait=False)
                raise
            if warns and self.leaf.kind:
                self._warn(
                    f"<ConcurrencyPermit {self.leaf.kind} {state}> was dropped unreleased",
                    ResourceWarning,
                    source=self,
                )


class Holder:
    """Who answers for a ticket: a permit.

    ``__del__``, here an attribute of each, is what a collected one calls: its ticket, or something
    that does nothing once that is given back. That costs less than a finalizer that must look.
    """

    __slots__ = ("__del__", "_ticket")

    __del__: Callable[[], object]
    _ticket: Ticket

    def __init__(self, leaf: Node, source: Any) -> None:
        """Draw a newcomer's ticket, and admit it in the common case.

        The common case is a path of two or three layers with room in all, and nobody in line. One that
        is not admitted is for ``take`` or ``wait``. Written out for speed.
        """
        self._ticket = self.__del__ = ticket = Ticket()
        ticket.leaf = leaf
        ticket.source = source
        ticket.state = OUT
        ticket.owner = None
        ticket.since = monotonic()
        tree = leaf.tree
        lock = tree.lock
        try:
            lock.acquire()
        except BaseException:
            try:
                lock.release()  # with no call before, where a second interrupt could strike
            except RuntimeError:
                pass  # it was not taken yet
            raise
        # Straight line.
        root = leaf.over
        if tree.calm and root is not None and leaf.room > 0 and root.room > 0:
            middle = leaf.middle
            if middle is None or (middle.room > 0 and not middle.closed):
                ticket.number = tree.drawn = number = tree.drawn + 1
                tree.held[number] = ticket
                ticket.state = HELD
                leaf.room -= 1
                root.room -= 1
                if middle is not None:
                    middle.room -= 1
        try:
            lock.release()
            if tree.after:
                tree.serve()
        except BaseException:
            tree.after.append(ticket)
            tree.serve()
            raise

    def _end(
        self,
        exc_type: type[BaseException] | None = None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Take the ticket out of the books, wherever it is. The common case is as in ``__init__``."""
        ticket = self._ticket
        leaf = ticket.leaf
        tree = leaf.tree
        lock = tree.lock
        try:
            lock.acquire()
        except BaseException:
            try:
                lock.release()  # with no call before, where a second interrupt could strike
            except RuntimeError:
                pass  # it was not taken yet
            tree.after.append(ticket)
            tree.serve()
            raise
        # Straight line.
        root = leaf.over
        if tree.calm and ticket.state is HELD and root is not None:
            ticket.state = OUT
            del tree.held[ticket.number]
            leaf.room += 1
            root.room += 1
            middle = leaf.middle
            if middle is not None:
                middle.room += 1
        try:
            lock.release()
            if ticket.state:
                tree.give_back(ticket)
            self.__del__ = nothing
            if tree.after:
                tree.serve()
        except BaseException:
            tree.after.append(ticket)
            tree.serve()
            raise


class Node:
    """One layer.

    ``room`` is the limit less those who hold it, and negative after the limit shrank. ``waiting``
    counts those in line for it or for a layer below. ``heap`` has the numbers of those who want it
    next, its own and its children's offers; stale ones are dropped when they come up. ``offer`` is
    the oldest of them while there is room. ``over`` is the root where the path has two layers, or
    three with the ``middle`` one: the paths to be quick about. None once closed.
    """

    __slots__ = (
        "above", "closed", "heap", "kind", "limit", "max_queued", "middle", "name", "offer", "over", "parent",
        "room", "tree", "waiting",
    )  # fmt: skip

    def __init__(
        self, limit: int, name: str, parent: Node | None = None, kind: str = "", max_queued: int = UNLIMITED
    ) -> None:
        self.tree: Tree = Tree() if parent is None else parent.tree
        self.parent = parent
        self.above: tuple[Node, ...] = () if parent is None else path(parent)
        self.over = path(parent)[-1] if parent is not None and len(self.above) <= 2 else None
        self.middle = parent if len(self.above) == 2 else None
        self.name, self.kind, self.limit, self.max_queued = name, kind, limit, max_queued
        self.closed = False
        self.clear()

    def clear(self) -> None:
        self.room = self.limit
        self.waiting = 0
        self.heap: list[int] = []
        self.offer: int | None = None


def path(leaf: Node) -> tuple[Node, ...]:
    """The layers from this one up to the root."""
    return leaf, *leaf.above


def is_closed(leaf: Node) -> bool:
    """Whether this layer, or one above it, is closed. Needs no lock: closed stays closed."""
    return any(node.closed for node in path(leaf))


class _Refusal(NamedTuple):
    """What an error is made of when the lock is free, counting who stands ahead included."""

    error: type[AcquireTimeout | ConcurrencyLimitExceeded | DeadlockError | SemaphoreClosed]
    uses: tuple[LayerUse, ...] = ()
    ahead: int = 0
    bound: int | None = None
    line: Sequence[Ticket] = ()
    circle: Sequence[tuple[int, tuple[str, ...], str]] = ()


class PermitHolder(NamedTuple):
    """Who holds a permit.

    Attributes:
        kind: ``"stream"`` or ``"tool"``.
        governor: The name of the governor or agent it is from, or None.
        thread: The name of the thread that entered it, or None.
        seconds: For how long it has been held, in seconds.
        process: Of a fleet, where it is held, as ``host:pid``; else None.
    """

    kind: str
    governor: str | None
    thread: str | None
    seconds: float
    process: str | None = None

    def __str__(self) -> str:
        who = f" by thread {self.thread!r}" if self.thread else ""
        of = f" of {self.governor!r}" if self.governor else ""
        at = f" in {self.process}" if self.process else ""
        return f"{self.kind}{of}{who} for {self.seconds:.1f} s{at}"


class Tree:
    """The books of all layers that share a root."""

    __slots__ = (
        "__weakref__", "after", "away", "calm", "closed", "dirty", "drains", "drawn", "held", "line",
        "lock", "observed", "slow_wait",
    )  # fmt: skip

    def __init__(self) -> None:
        self.lock = RLock()
        self.held: dict[int, Ticket] = {}
        self.line: dict[int, Ticket] = {}
        self.away: dict[int, Ticket] = {}
        self.drains: dict[int, tuple[Gate, tuple[Node, ...]]] = {}
        self.drawn = 0
        self.closed = False
        self.slow_wait: float | None = None
        self.dirty: Node | None = None  # a layer under change: what is derived may be wrong
        self.observed = False  # whether there are listeners
        self.calm = True  # open, and neither a line nor a drain nor a listener nor dirt to look after
        # To be done when the lock is free: gates to open, tickets to give back that could not be
        # at once, layers that were changed. Whoever is interrupted with a ticket in hand appends it
        # first of all, in a straight line from the `except`, and then calls `serve`.
        self.after: deque[Gate | Ticket | Node] = deque()
        _trees.add(weakref.ref(self, _trees.discard))

    # ------------------------------------------------------------- for callers without the lock

    def take(self, leaf: Node, ticket: Ticket) -> bool:
        """Admit a newcomer if its whole path has room."""
        return self._settled(self._take, leaf, ticket) is True

    def wait(
        self,
        ticket: Ticket,
        timeout: float | None,
        what: str,
        governor: str | None = None,
        *,
        resumes: bool = False,
    ) -> ConcurrencyError | None:
        """Take, or stand in line for up to ``timeout`` seconds. Returns the refusal, or None.

        One that ``resumes`` keeps its place in line, and passes by ``max_queued`` and ``close``.
        """
        began = monotonic()
        if self.observed:
            ticket.told = None
        ticket.gate = gate = Lock()
        gate.acquire()
        ticket.waiter = get_ident() if timeout is None else None
        refusal = self.stand(ticket, at_once=timeout == 0, resumes=resumes)
        if refusal is _PARKED:
            if self.observed:
                self.tell(ticket, "queued")
                self._look_again(ticket)
            self._sleep(ticket, gate, timeout, what, governor)
            refusal = None
            if ticket.state is not HELD:
                refusal = self.withdraw(ticket)
            ticket.since = monotonic()
            if not resumes:
                ticket.waited = ticket.since - began
        else:
            ticket.since = monotonic()
        self.tell_end(ticket, refusal, ticket.since - began)
        return self.error(refusal, ticket, timeout, what, governor)

    def _sleep(
        self, ticket: Ticket, gate: Any, timeout: float | None, what: str, governor: str | None
    ) -> None:
        slow = self.slow_wait
        if slow is not None and (timeout is None or timeout > slow):
            if _opens(gate, slow):
                return
            self._report(ticket, slow, what, governor)
            self._look_again(ticket)
            timeout = None if timeout is None else timeout - slow
        _opens(gate, timeout)

    def _look_again(self, ticket: Ticket) -> None:
        """See the circle that may have closed unseen, as this thread in line did not only wait."""
        self._settled(self._revise, ticket.leaf, ())

    def _report(self, ticket: Ticket, slow: float, what: str, governor: str | None) -> None:
        import logging  # seldom needed

        holders = "; ".join(map(str, self.holders(path(ticket.leaf)[-1]))) or "nobody"
        logging.getLogger("governor").warning(
            "%sstill waiting for a %s after %g s; held: %s",
            f"governor {governor!r}: " if governor else "",
            what,
            slow,
            holders,
        )

    def stand(self, ticket: Ticket, *, at_once: bool = False, resumes: bool = False) -> Any:
        """Take, or stand in line until ``ticket.gate`` is opened. Returns what ``_park`` does."""
        if self.lock._is_owned():  # type: ignore[attr-defined]
            # In a signal handler or finalizer that interrupted this very tree: a wait never ended.
            refusal = self._settled(self._park, ticket.leaf, ticket, True, resumes)
            full = isinstance(refusal, _Refusal) and refusal.error is AcquireTimeout
            return _Refusal(ConcurrencyLimitExceeded) if full or refusal is _BUSY else refusal
        return self._settled(self._park, ticket.leaf, ticket, at_once, resumes)

    def withdraw(self, ticket: Ticket) -> Any:
        """Leave the line, unless the grant came first. Returns what ``_withdraw`` does."""
        return self._settled(self._withdraw, ticket.leaf, ticket)

    def error(
        self, refusal: Any, ticket: Ticket, timeout: float | None, what: str, governor: str | None
    ) -> ConcurrencyError | None:
        """Make the error of a refusal, if it is one."""
        if not isinstance(refusal, _Refusal):
            return None
        if issubclass(refusal.error, SemaphoreClosed):
            return SemaphoreClosed(what, governor)
        if issubclass(refusal.error, DeadlockError):
            names = _thread_names()
            circle = [ThreadWait(names.get(it, str(it)), holds, wants) for it, holds, wants in refusal.circle]
            return DeadlockError(what, refusal.uses, tuple(circle), governor)
        ahead = refusal.ahead
        for other in refusal.line:
            ahead += other.number < ticket.number and other.leaf.kind == ticket.leaf.kind
        bound = timeout if refusal.error is AcquireTimeout else refusal.bound
        return refusal.error(what, bound, refusal.uses, ahead, governor)

    def suspend(self, ticket: Ticket) -> None:
        """Give back what a held ticket took, but keep its number for its return."""
        if self._settled(self._suspend, ticket.leaf, ticket) is True:
            self._tell_released(ticket)

    def give_back(self, ticket: Ticket) -> None:
        """Take a ticket out of the books, wherever it is."""
        told = self._settled(self._give_back, ticket.leaf, ticket)
        if told is _BUSY:
            self.after.append(ticket)
        elif told:
            self._tell_released(ticket)

    def revise(self, *changes: tuple[Node, int | None]) -> None:
        """Hold layers to other limits, or close those without one, all at one moment.

        A closed layer stays closed.
        """
        if self._settled(self._revise, changes[0][0], changes) is _BUSY:
            for node, limit in changes:
                _revise(node, limit)
            self.after.append(changes[0][0])

    def usage(self, *nodes: Node) -> list[tuple[int, int, int]]:
        """Return of each layer how many hold it, how many wait, and its limit, all at one moment."""
        usage: list[tuple[int, int, int]] | str = self._settled(self._usage, nodes[0], nodes)
        if isinstance(usage, str):  # in this very thread, so that nothing moves: but the counts may be off
            usage = [(_count(self.held, it), _count(self.line, it), it.limit) for it in nodes]
        return usage

    def owned(self) -> list[Ticket]:
        """Return what this thread has entered, held or suspended, the oldest first."""
        me = get_ident()
        tickets = (*list(self.held.values()), *list(self.away.values()))
        return sorted((it for it in tickets if it.owner == me), key=_age)

    def holders(self, *nodes: Node) -> list[PermitHolder]:
        """Return who holds any of these layers, the longest first."""
        now, names = monotonic(), _thread_names()
        tickets = [it for it in list(self.held.values()) if not set(nodes).isdisjoint(path(it.leaf))]
        return [
            PermitHolder(
                it.leaf.kind,
                getattr(it.source, "name", None),
                None if it.owner is None else names.get(it.owner),
                max(0.0, now - it.since),
            )
            for it in sorted(tickets, key=lambda it: it.since)
        ]

    def drain(self, nodes: tuple[Node, ...], timeout: float | None) -> bool:
        """Wait until nobody holds, or has suspended, any of these layers."""
        gate = Lock()
        gate.acquire()
        key = id(gate)
        try:
            self._settled(self._watch, nodes[0], key, gate, nodes)
            _opens(gate, timeout)
            return self._settled(self._unused, nodes[0], nodes) is True
        finally:
            self.drains.pop(key, None)

    def atomically(self, node: Node, change: Callable[[], Any]) -> Any:
        """Return what ``change`` returns, no other thread being in the tree meanwhile."""
        result = self._settled(_change, node, change)
        return change() if result is _BUSY else result

    def serve(self, *, wait: bool = True) -> None:
        """Do what was left for when the lock is free.

        Each item is done first and struck off afterwards, so that an interrupt between the two
        does it twice rather than never; all bear that.
        """
        after = self.after
        while after and _loaded:
            try:
                item = after[0]
            except IndexError:
                return  # another thread was quicker
            if isinstance(item, Ticket):
                told = self._locked(self._give_back, item.leaf, (item,), wait=wait)
                if told is _BUSY:
                    return  # whoever has the lock comes by here
                if told:
                    self._tell_released(item, here=False)
            elif isinstance(item, Node):
                if self._locked(self._revise, item, ((),), wait=wait) is _BUSY:
                    return
            elif wait or isinstance(item, _Latch):
                try:
                    item.release()
                except RuntimeError:
                    pass  # open already
            elif not self._leaves_to_others(item):
                # A finalizer may run amid anything, and must not deliver a grant to code of others.
                _in_a_thread(self.serve)
                return
            try:
                after.remove(item)
            except ValueError:
                pass

    def _leaves_to_others(self, item: Gate) -> bool:
        """Let another thread do what may not be done here, if that is for sure."""
        return False

    # ----------------------------------------------------------------------------- listeners

    def tell_end(self, ticket: Ticket, refusal: Any, seconds: float) -> None:
        """Tell listeners, if there are any, how an operation that asked for a permit has fared."""
        if not self.observed:
            return
        if isinstance(refusal, _Refusal):
            self.tell_rejected(ticket, seconds, _REASONS[refusal.error])
        elif self._settled(self._mark_told, ticket.leaf, ticket) is True:
            self.tell(ticket, "acquired", seconds)
        else:
            self.tell_cancelled(ticket)  # released by another thread while it waited to resume

    def tell_asked(self, ticket: Ticket, refusal: Any) -> None:
        """Tell listeners how an operation has fared so far that another thread will be told of."""
        if refusal is _PARKED:
            self.tell(ticket, "queued")
        else:
            self.tell_end(ticket, refusal, 0.0)

    def tell_tried(self, ticket: Ticket) -> None:
        """Tell listeners how an operation has fared that would not wait."""
        if ticket.state is HELD:
            self.tell_end(ticket, None, 0.0)
        else:
            self.tell_rejected(ticket, 0.0, "closed" if is_closed(ticket.leaf) else "timeout")

    def tell_cancelled(self, ticket: Ticket) -> None:
        """Tell listeners that an operation was given up by whoever asked, unless they know its end."""
        self.tell_rejected(ticket, max(0.0, monotonic() - ticket.since), "cancelled")

    def tell_rejected(self, ticket: Ticket, seconds: float, reason: str) -> None:
        """Tell listeners that an operation got no permit, unless they know how it has fared."""
        if self.observed and getattr(ticket, "told", None) is None:
            ticket.told = False
            self.tell(ticket, "rejected", seconds, reason)

    def _tell_released(self, ticket: Ticket, *, here: bool = True) -> None:
        self.tell(ticket, "released", max(0.0, monotonic() - ticket.since), here=here)

    def tell(
        self,
        ticket: Ticket,
        event: str,
        seconds: float | None = None,
        reason: str | None = None,
        *,
        here: bool = True,
    ) -> None:
        """Tell listeners what happened to an operation, with the lock free."""
        if self.observed and ticket.source is not None:
            self.tell_of(ticket.source, event, ticket.leaf.kind, seconds, reason, here=here)

    def tell_of(self, source: Any, *what: Any, here: bool = True) -> None:
        """Have a governor tell its listeners something, with the lock free."""
        if here and not self.lock._is_owned():  # type: ignore[attr-defined]
            source._tell(*what)
            return
        # In a finalizer, or in a signal handler that interrupted a call with the lock in hand: what is
        # told may want a lock that this very thread has.
        _in_a_thread(source._tell, *what)

    # ------------------------------------------------------------------------------- the lock

    def _settled(self, step: Callable[..., Any], leaf: Node, *args: Any) -> Any:
        """Run one step under the lock, then do what it, or another meanwhile, left to be done."""
        try:
            result = self._locked(step, leaf, args)
            if self.after:
                self.serve()
            return result
        except BaseException:
            self.serve()
            raise

    def _locked(
        self, step: Callable[..., Any], leaf: Node, args: tuple[Any, ...], *, wait: bool = True
    ) -> Any:
        """Run one step under the lock and, whatever interrupts it, leave the books in order.

        A step returns its refusals: an exception is an interrupt, and costs a rebuild.

        Returns _BUSY where the lock cannot be had: when ``wait`` is False and another thread has
        it, or when this thread itself is inside a step, which a signal handler or a finalizer
        interrupted.
        """
        lock = self.lock
        inside = lock._is_owned()  # type: ignore[attr-defined]
        if inside and self.dirty is not None:
            return _BUSY
        try:
            # Inside but not dirty, the interrupted call has the lock and has not begun: go ahead.
            if not inside and not lock.acquire(wait):
                return _BUSY
            if self.dirty is not None:
                self._rebuild()
            self.calm = False
            self.dirty = leaf
            result = step(leaf, *args)
            self.dirty = None
            self.calm = self._is_calm()
            if not inside:
                lock.release()
        except BaseException:
            if inside:
                raise  # the interrupted call, finding dirt, rebuilds
            try:
                if self.dirty is not None and lock._is_owned():  # type: ignore[attr-defined]
                    self._rebuild()
            finally:
                try:
                    lock.release()
                except RuntimeError:
                    pass  # not taken yet, or free again
            raise
        return result

    # --------------------------------------------------- steps: with the lock held and dirty set

    def _take(self, leaf: Node, ticket: Ticket) -> bool:
        for node in path(leaf):
            if node.room <= 0 or node.closed:
                return False
        self._admit(leaf, ticket)
        return True

    def _park(self, leaf: Node, ticket: Ticket, at_once: bool, resumes: bool) -> Any:
        """Admit, or put in line. Returns None, or _PARKED, or a refusal."""
        if resumes and ticket.state is not AWAY:
            return None  # another thread has released it
        nodes, newcomer = path(leaf), not resumes
        full = over_queued = None
        for node in nodes:
            if newcomer and node.closed:
                return _Refusal(SemaphoreClosed)
            if node.room <= 0:
                full = node
            if node.waiting >= node.max_queued:
                over_queued = node
        if full is None:
            self._admit(leaf, ticket)
            return None
        if at_once:
            return _Refusal(AcquireTimeout, _uses(leaf), _kind(leaf).waiting)
        if newcomer and over_queued is not None:
            waiting, bound = over_queued.waiting, over_queued.max_queued
            return _Refusal(ConcurrencyLimitExceeded, _uses(leaf), waiting, bound)
        if (circle := self._circle(ticket)) is not None:
            return circle
        if newcomer:
            # Straight line.
            ticket.number = self.drawn = self.drawn + 1
            ticket.state = WAITING
        self.line[ticket.number] = ticket
        for node in nodes:
            node.waiting += 1
        self._queue(leaf, ticket.number)
        return _PARKED

    def _withdraw(self, leaf: Node, ticket: Ticket) -> Any:
        """Leave the line, unless the grant came first. Returns None, or a refusal."""
        if ticket.state is HELD or ticket.state is OUT:
            return None
        line = list(self.line.values())
        refusal = _Refusal(AcquireTimeout, _uses(leaf), line=line)
        if ticket.number not in self.line:
            refusal = getattr(ticket, "refusal", _Refusal(SemaphoreClosed))
        self._give_back(leaf, ticket)
        return refusal

    def _mark_told(self, leaf: Node, ticket: Ticket) -> bool:
        if ticket.state is not HELD or getattr(ticket, "told", None):
            return False
        ticket.told = True
        return True

    def _give_back(self, leaf: Node, ticket: Ticket) -> bool:
        """Take out of the books. Returns whether listeners know that it was held."""
        if (state := ticket.state) is OUT:
            return False
        number = ticket.number
        # Straight line.
        ticket.state = OUT
        if state is HELD:
            del self.held[number]
            self._vacate(leaf)
        else:
            if number in self.away:
                del self.away[number]
            if number in self.line:
                del self.line[number]
                self.after.append(ticket.gate)
                for node in path(leaf):
                    node.waiting -= 1
                self._offer(leaf)
        if self.drains:
            self._open_drains()
        return state is HELD and _untold(ticket)

    def _suspend(self, leaf: Node, ticket: Ticket) -> bool:
        """Take out of the books of those who hold. Returns whether listeners know that it was held."""
        if ticket.state is not HELD:
            return False
        number = ticket.number
        # Straight line.
        ticket.state = AWAY
        self.away[number] = ticket
        del self.held[number]
        self._vacate(leaf)
        return _untold(ticket)

    def _revise(self, leaf: Node, changes: tuple[tuple[Node, int | None], ...]) -> None:
        for node, limit in changes:
            _revise(node, limit)
        self._rebuild()

    def _usage(self, leaf: Node, nodes: tuple[Node, ...]) -> list[tuple[int, int, int]]:
        return [(node.limit - node.room, node.waiting, node.limit) for node in nodes]

    def _watch(self, leaf: Node, key: int, gate: Gate, nodes: tuple[Node, ...]) -> None:
        self.drains[key] = gate, nodes
        self._open_drains()

    def _unused(self, leaf: Node, nodes: tuple[Node, ...]) -> bool:
        return not any(it.room < it.limit or _count(self.away, it) for it in nodes)

    # -------------------------------------------------------------------------- parts of steps

    def _admit(self, leaf: Node, ticket: Ticket) -> None:
        if ticket.state is OUT:
            ticket.number = self.drawn = self.drawn + 1
        number = ticket.number
        # Straight line.
        self.held[number] = ticket
        ticket.state = HELD
        if number in self.away:
            del self.away[number]
        for node in path(leaf):
            node.room -= 1

    def _vacate(self, leaf: Node) -> None:
        nodes = path(leaf)
        for node in nodes:
            node.room += 1
        if self.line:
            for node in nodes:
                if node.room == 1:
                    self._offer(node)
            self._grant(nodes[-1])

    def _grant(self, root: Node) -> None:
        """Hand on what is free: to the oldest whose whole path has room, while there is one."""
        while root.room > 0 and (number := self._oldest(root)) is not None:
            ticket = self.line[number]
            # Straight line: in the books before it wakes.
            self.held[number] = ticket
            ticket.state = HELD
            del self.line[number]
            if number in self.away:
                del self.away[number]
            self.after.append(ticket.gate)
            for node in path(ticket.leaf):
                node.room -= 1
                node.waiting -= 1
            self._offer(ticket.leaf)

    def _offer(self, node: Node) -> None:
        """Bring the offer of a layer up to date, and of those above as far as that changes theirs."""
        while (parent := node.parent) is not None:
            offer = self._oldest(node) if node.room > 0 else None
            if offer == node.offer:
                return
            node.offer = offer
            if offer is not None:
                self._want(parent, offer)
            node = parent

    def _queue(self, leaf: Node, number: int) -> None:
        """Let a waiter want its layer, and those above as far as it is the oldest that may pass."""
        node: Node | None = leaf
        while node is not None:
            self._want(node, number)
            if node.room <= 0 or (node.offer is not None and node.offer < number):
                return
            node.offer = number
            node = node.parent

    def _want(self, node: Node, number: int) -> None:
        heappush(node.heap, number)
        # Those who left are dropped when they come up. Where nothing comes up (a paused layer with
        # many timeouts) they are swept before they far outnumber the waiting.
        if len(node.heap) > 2 * node.waiting + 64:
            node.heap = sorted({it for it in node.heap if self._wants(it, node)})

    def _oldest(self, node: Node) -> int | None:
        """Who wants this layer next, the oldest of them."""
        heap = node.heap
        while heap:
            if self._wants(heap[0], node):
                return heap[0]
            heappop(heap)
        return None

    def _wants(self, number: int, node: Node) -> bool:
        """Whether this waiter waits at this very layer, or is offered to it from below."""
        ticket = self.line.get(number)
        if ticket is None:
            return False
        below = ticket.leaf
        if below is node:
            return True
        for above in below.above:
            if above is node:
                break
            below = above
        return below.offer == number

    def _circle(self, ticket: Ticket) -> _Refusal | None:
        """Refuse a wait without a timeout that closes a circle of such waits."""
        me = ticket.waiter
        if me is None or me not in [it.owner for it in self.held.values()]:
            return None
        waits = {it.waiter: it.leaf for it in self.line.values() if it.waiter is not None}
        waits[me] = ticket.leaf
        owned = [it for it in self.held.values() if it.owner in waits]
        # To look at the stacks is slow, and seldom called for.
        if _find_circle(me, waits, owned) is None:
            return None
        waits, owned = _proven(waits, owned)
        circle = _find_circle(me, waits, owned)
        if circle is None:
            return None
        holds = [tuple([_what(it.leaf) for it in owned if it.owner == thread]) for thread in circle]
        wants = [_what(waits[thread]) for thread in circle]
        return _Refusal(DeadlockError, _uses(ticket.leaf), circle=[*zip(circle, holds, wants, strict=True)])

    def _break_circles(self) -> bool:
        """Turn out of the line, the youngest first, whose wait closes a circle. Returns whether any did."""
        owners = {it.owner for it in self.held.values()}
        found = False
        for ticket in sorted(self.line.values(), key=_age, reverse=True):
            if ticket.waiter in owners and (refusal := self._circle(ticket)) is not None:
                # Straight line.
                ticket.refusal = refusal
                del self.line[ticket.number]
                self.after.append(ticket.gate)
                found = True
        return found

    def _open_drains(self) -> None:
        for gate, nodes in list(self.drains.values()):
            if self._unused(nodes[0], nodes):
                self.after.append(gate)

    def _rebuild(self) -> None:
        """Derive all from the truth, hand on, turn out of the line who waits in vain.

        That is whom a closed layer refuses, and whose wait closes a circle.

        Can be interrupted and done again, as ``dirty`` is cleared last.
        """
        assert self.dirty is not None
        leaves = {self.dirty}
        for ticket in list(self.line.values()):
            leaves.add(ticket.leaf)
            if ticket.state is WAITING and is_closed(ticket.leaf):
                # Straight line.
                del self.line[ticket.number]
                self.after.append(ticket.gate)
        leaves.update(ticket.leaf for ticket in self.held.values())
        depths = {it: depth for leaf in leaves for depth, it in enumerate(path(leaf)[::-1])}
        for node in depths:
            node.clear()
        for ticket in self.held.values():
            for node in path(ticket.leaf):
                node.room -= 1
        for number, ticket in self.line.items():
            heappush(ticket.leaf.heap, number)
            for node in path(ticket.leaf):
                node.waiting += 1
        # Leaves first, else a younger waiter of another leaf is offered in an elder's place.
        for node in sorted(depths, key=depths.__getitem__, reverse=True):
            if node.parent is None:
                self._grant(node)
            elif node.room > 0 and (offer := self._oldest(node)) is not None:
                node.offer = offer
                heappush(node.parent.heap, offer)
        if self._break_circles():
            self._rebuild()
            return
        self._open_drains()
        self.dirty = None
        self.calm = self._is_calm()

    def _is_calm(self) -> bool:
        return not (self.line or self.drains or self.observed or self.closed)

    def _forget(self) -> None:
        """In a forked child: full limits, nobody in line, and a lock that nobody holds."""
        for ticket in (*self.held.values(), *self.away.values(), *self.line.values()):
            ticket.state = OUT
            for node in path(ticket.leaf):
                node.clear()
        for node in () if self.dirty is None else path(self.dirty):
            node.clear()
        self.held, self.line, self.away, self.drains = {}, {}, {}, {}
        self.after = deque()
        self.dirty = None
        self.calm = self._is_calm()
        self.lock = RLock()


def _untold(ticket: Ticket) -> bool:
    """Whether listeners know that it was held, who are now to hear that it is no longer."""
    if not getattr(ticket, "told", None):  # as what was had before there were listeners
        return False
    ticket.told = False
    return True


def _age(ticket: Ticket) -> int:
    return ticket.number


def _proven(waits: dict[int, Node], owned: list[Ticket]) -> tuple[dict[int, Node], list[Ticket]]:
    """Return which threads do nothing but wait, and what they are inside of, by their stacks."""
    frames = sys._current_frames()
    try:
        waits = {it: leaf for it, leaf in waits.items() if _only_waits(frames.get(it))}
        inside = [it for it in owned if it.owner and is_inside(it.frame, it.entry, frames.get(it.owner))]
        return waits, inside
    finally:
        del frames  # this very frame is in it, and would keep itself, and those below it


# Of the code that a thread is in while it does nothing but wait.
waiting_files = {__file__}


def _only_waits(frame: FrameType | None) -> bool:
    """Whether a thread is in a wait, and not in a signal handler or finalizer amid it."""
    while frame is not None and frame.f_code.co_filename in waiting_files:
        if frame.f_code is Tree.wait.__code__:
            return True
        frame = frame.f_back
    return False


def _find_circle(me: int, waits: dict[int, Node], owned: list[Ticket]) -> list[int] | None:
    owns: dict[int, dict[Node, int]] = {}
    for ticket in owned:
        if ticket.owner is not None:
            own = owns.setdefault(ticket.owner, {})
            for node in path(ticket.leaf):
                own[node] = own.get(node, 0) + 1
    paths = {thread: path(leaf) for thread, leaf in waits.items()}
    limits = {node: node.limit for nodes in paths.values() for node in nodes}
    return find_circle(me, paths, owns, limits)


def _what(leaf: Node) -> str:
    limited = len(leaf.above) > 1 and leaf.limit != UNLIMITED
    return f"{leaf.kind} permit ({leaf.name})" if limited else f"{leaf.kind} permit"


def _in_a_thread(work: Callable[..., object], *args: object) -> bool:
    """Have a new thread do something, without waiting for that to begin. Returns whether there is one."""
    try:
        start_new_thread(_start_a_thread, (work, args))
    except RuntimeError:
        return False  # the interpreter ends, or there are too many
    return True


def _start_a_thread(work: Callable[..., object], args: tuple[object, ...]) -> None:
    # One that `threading` knows: where code of others asks in one that it does not know who is running,
    # it notes that thread, up to 3.12 for ever.
    try:
        threading.Thread(target=work, args=args, daemon=True).start()
    except RuntimeError:
        work(*args)  # the interpreter ends, or there are too many: in this one, for somebody may wait for it


def _thread_names() -> dict[int | None, str]:
    return {thread.ident: thread.name for thread in threading.enumerate()}


def _change(_: Node, change: Callable[[], Any]) -> Any:
    return change()


def _kind(leaf: Node) -> Node:
    """The layer of all operations of its kind: the one below the root."""
    return path(leaf)[-2] if leaf.above else leaf


def _uses(leaf: Node) -> tuple[LayerUse, ...]:
    limited = (node for node in path(leaf) if node.limit != UNLIMITED)
    return tuple(LayerUse(node.name, node.limit - node.room, node.limit) for node in limited)


def _revise(node: Node, limit: int | None) -> None:
    if limit is not None:
        # Straight line.
        node.room += limit - node.limit
        node.limit = limit
        return
    node.closed = True
    node.over = None
    if node.parent is None:
        node.tree.closed = True


def _count(book: dict[int, Ticket], node: Node) -> int:
    return sum(node in path(ticket.leaf) for ticket in list(book.values()))


def _opens(gate: Any, timeout: float | None) -> bool:
    """Wait for up to ``timeout`` seconds. Returns whether the gate opened."""
    if timeout is None:
        return bool(gate.acquire())
    deadline = monotonic() + timeout
    while not gate.acquire(True, min(timeout, TIMEOUT_MAX)):
        timeout = deadline - monotonic()
        if timeout <= 0:
            return False
    return True


_trees: set[weakref.ref[Tree]] = set()


def trees() -> list[Tree]:
    """Return the trees that there are in this process."""
    return [tree for ref in list(_trees) if (tree := ref()) is not None]


_forking = RLock()
_entered: list[Tree] = []


def _enter_all() -> None:
    """Before a fork, without the global lock: see that no other thread is amid any tree's books.

    A dict or deque that another thread is in the middle of would stay locked for ever in the child. No
    step takes long; a thread that stays inside, whatever keeps it there, is not waited for.
    """
    _forking.acquire()
    for tree in sorted(trees(), key=id):
        _entered.append(tree)
        if not tree.lock.acquire(timeout=1):
            _entered.pop()


def _leave_all() -> None:
    while _entered:
        try:
            _entered.pop().lock.release()
        except RuntimeError:
            pass  # interrupted before it was taken
    _forking.release()


def _forget_all() -> None:
    global _forking, _entered
    _forking, _entered = RLock(), []
    for tree in trees():
        tree._forget()


if hasattr(os, "register_at_fork"):
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        os.register_at_fork(after_in_child=_forget_all)
    else:
        os.register_at_fork(before=_enter_all, after_in_parent=_leave_all, after_in_child=_forget_all)
