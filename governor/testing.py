"""For tests of code that uses a governor: one that fails instead of waiting, and a check for leaks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

from governor._errors import LayerUse
from governor._governor import Governor, check_governor
from governor._in_process import ConcurrencyGovernor
from governor._tree import _PARKED, Node, PermitHolder, Ticket, Tree, _uses, path
from governor._validate import check_timeout

__all__ = ["NonBlockingGovernor", "WouldBlock", "assert_all_returned"]

G = TypeVar("G", bound=Governor)


class WouldBlock(AssertionError):
    """A wait for a permit, under a governor that lets nobody wait.

    Attributes:
        what: What was asked for, such as ``"tool permit"``.
        layers: How full each layer of the path was, the narrowest first.
        holders: Who held what was full, the longest first.
        governor: The name of the governor asked, or None.
    """

    def __init__(
        self,
        what: str,
        layers: tuple[LayerUse, ...],
        holders: tuple[PermitHolder, ...],
        governor: str | None = None,
    ) -> None:
        self.what, self.layers, self.holders, self.governor = what, layers, holders, governor
        called = "" if governor is None else f"governor {governor!r}: "
        held = "; ".join(map(str, holders)) or "nobody"
        super().__init__(
            f"{called}no {what} without waiting: {', '.join(map(str, layers))} in use; held: {held}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.layers, self.holders, self.governor), self.__dict__


class NonBlockingGovernor(ConcurrencyGovernor):
    """A governor that raises :class:`WouldBlock` wherever another one would wait for a permit.

    So a test of code that passes a limit fails at once and says who holds what, where it would hang,
    or pass for want of load::

        gov = NonBlockingGovernor(max_streams=1, max_tools=2, max_global=3)
        run_agent(gov)

    It is raised in whoever would wait, whatever the timeout: by ``acquire_*`` and ``request_*``, by a
    decorated call, by ``submit`` of an executor, and at the end of a ``suspended()`` block whose place
    was taken meanwhile, after which the permit is not held. It stands in for ``DeadlockError``, too.
    Its agents do the same. All else is as ever: what does not wait (a timeout of 0, ``try_acquire_*``,
    a line of ``max_queued=0``, a closed governor) is refused as it is elsewhere. ``drain`` waits.
    """

    def __init__(
        self,
        max_streams: int,
        max_tools: int,
        max_global: int,
        *,
        max_queued: int | None = None,
        slow_wait: float | None = None,
        name: str | None = None,
    ) -> None:
        """Make a governor with these limits; as :class:`governor.ConcurrencyGovernor`.

        Raises:
            TypeError: a limit is not an integer, or the name not a string.
            ValueError: a limit is negative, or the name empty.
        """
        super().__init__(
            max_streams, max_tools, max_global, max_queued=max_queued, slow_wait=slow_wait, name=name
        )
        # Agents stand in the tree of the layers that they are under.
        self._global.tree = self._streams.tree = self._tools.tree = _LinelessTree()


class _LinelessTree(Tree):
    """A tree in which nobody stands in line."""

    __slots__ = ()

    def stand(self, ticket: Ticket, *, at_once: bool = False, resumes: bool = False) -> Any:
        refusal = super().stand(ticket, at_once=at_once, resumes=resumes)
        if isinstance(refusal, _Full):
            # With the lock free, since the names of threads are behind a lock of others. Who has left
            # by now is not named.
            holders = tuple(self.holders(*refusal.nodes))
            raise WouldBlock(f"{ticket.leaf.kind} permit", refusal.uses, holders, ticket.source.name)
        return refusal

    def _park(self, leaf: Node, ticket: Ticket, at_once: bool, resumes: bool) -> Any:
        refusal = super()._park(leaf, ticket, at_once, resumes)
        if refusal is not _PARKED:
            return refusal
        full = _Full(leaf)
        self._give_back(leaf, ticket)
        return full


class _Full:
    """What was in the way of one who would have stood in line."""

    def __init__(self, leaf: Node) -> None:
        self.uses = _uses(leaf)
        self.nodes = [node for node in path(leaf) if node.room <= 0]


@contextmanager
def assert_all_returned(governor: G, *, timeout: float = 1.0) -> Generator[G, None, None]:
    """Fail at the end of the block where a permit is still out, or somebody still in line.

    Out is what is held, by a stream or a job too, and what is suspended. A permit that was dropped
    unreleased is back; for it there is the ``ResourceWarning``. When the block itself fails, nothing
    is checked. As a fixture of pytest::

        @pytest.fixture
        def gov():
            with assert_all_returned(NonBlockingGovernor(4, 8, 16)) as gov:
                yield gov

    Args:
        governor: Of any kind. Of an agent, only what was asked of it and of its own agents counts.
        timeout: Seconds that other threads get, at the end, to give back what they are about to.

    Yields:
        The governor.

    Raises:
        AssertionError: not all is back; it names who holds what.
        TypeError: it is not a governor.
        ValueError: the timeout is negative.
    """
    check_governor(governor)
    seconds = check_timeout(timeout)
    yield governor
    tree, own = governor._global.tree, governor._own
    tree.drain(own, seconds)  # without closing
    stats = governor.stats()
    out = [f"held: {it}" for it in governor.holders()]
    away = [it for it in list(tree.away.values()) if not set(own).isdisjoint(path(it.leaf))]
    out += [f"suspended: {it.leaf.kind}" for it in away]
    for kind, count in ("stream", stats.streams_waiting), ("tool", stats.tools_waiting):
        if count:
            out.append(f"{count} waiting for a {kind}")
    if out:
        raise AssertionError("not all permits are back: " + "; ".join(out))
