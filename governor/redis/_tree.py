"""The tree of a fleet: this process' own books, of places that are had elsewhere.

What :class:`governor._tree.Tree` decides by its layers' room is asked of the fleet here. All else is as
there: who holds, who waits, who has suspended; who is woken, who is told; forks, interrupts, finalizers.

An operation that asks gets a *serial number*, by which the fleet knows it, and is in ``asked`` for as
long as the fleet may know of it. A serial number is used for one place and never again, so that a
command that is carried out late or twice does no harm: an operation that comes back from a suspension
asks under another one, with the number that the fleet gave it at first.

Nothing is said to the fleet with the lock taken. What is to be said when a step has changed the books
is left in ``after``, as a :class:`_Farewell`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Lock
from time import monotonic
from typing import Any
from urllib.parse import quote, unquote

from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from governor._errors import AcquireTimeout, ConcurrencyLimitExceeded, LayerUse, SemaphoreClosed
from governor._tree import (
    _BUSY,
    _PARKED,
    AWAY,
    HELD,
    OUT,
    UNLIMITED,
    WAITING,
    Gate,
    Node,
    PermitHolder,
    Ticket,
    Tree,
    _in_a_thread,
    _Latch,
    _Refusal,
    _thread_names,
    _untold,
    is_closed,
    path,
    waiting_files,
)
from governor.redis import _session
from governor.redis._session import Session, Snapshot, now
from governor.redis._wire import Answer, Reentered, grouped, open_gate

__all__ = ["MOST", "FleetNode", "FleetTree", "agent_of"]

_GO, _STALE = "go", "stale"
MOST = 1 << 53  # the numbers up to which a script of the server counts exactly

waiting_files.update((__file__, _session.__file__))
_OPEN = Lock()  # the gate of one who does not wait


class FleetNode(Node):
    """A layer that the fleet knows by ``key``. An agent's has the limit it was ``made`` with."""

    __slots__ = ("key", "made")

    def __init__(self, limit: int, name: str, parent: FleetNode | None = None, kind: str = "") -> None:
        super().__init__(limit, name, parent, kind)
        self.key = f"{kind}/" if kind else ""
        self.made = limit

    @classmethod
    def of_agent(cls, agent: str, limit: int, name: str, parent: FleetNode) -> FleetNode:
        """Return the layer of an agent below another one."""
        node = cls(limit if limit == UNLIMITED else min(limit, MOST), name, parent, parent.kind)
        node.key = f"{parent.key}{quote(agent, safe='')}/"
        return node


class FleetTree(Tree):
    """The books of one process, of places of a fleet."""

    __slots__ = ("asked", "asks", "main", "root", "session")

    main: tuple[Node, ...]
    root: FleetNode
    session: Session

    def __init__(self) -> None:
        self.asked: dict[int, Ticket] = {}  # before a fork can find this tree
        self.asks = 0
        super().__init__()
        self.calm = False

    # ------------------------------------------------------------- for callers without the lock

    def take(self, leaf: Node, ticket: Ticket) -> bool:
        ticket.gate = _OPEN
        ticket.waiter = None
        verdict = self.stand(ticket, at_once=True)
        if isinstance(verdict, _Failure):
            raise verdict.error
        return verdict is None and ticket.state is HELD

    def stand(self, ticket: Ticket, *, at_once: bool = False, resumes: bool = False) -> Any:
        leaf = ticket.leaf
        if self.is_amid_step():
            return _Refusal(ConcurrencyLimitExceeded)
        verdict = self._settled(self._enlist, leaf, ticket, resumes)
        if verdict is not _GO:
            return verdict
        while True:
            serial = ticket.serial
            try:
                answer = self.session.call(
                    "acquire", serial, *self._particulars(ticket, not at_once, resumes)
                )
            except (Reentered, RedisError, OSError) as error:
                if not resumes:
                    self.give_back(ticket)
                if isinstance(error, Reentered):
                    return _Refusal(ConcurrencyLimitExceeded)
                return _Failure(error)
            verdict = self._settled(self._admit_or_park, leaf, ticket, serial, answer, resumes)
            if ticket.serial != serial:
                self.session.wire.post("release", serial, _key(leaf))
            if verdict is not _STALE:
                break
        if verdict is answer:
            return _Failure(_error(ticket, answer))
        if verdict is _PARKED and ticket.waiter is not None and self._owns(ticket.waiter):
            # Whoever looks last, then to do nothing but sleep, sees all the others asleep. A circle is sure
            # once a renewal has told of the grants and the limits that there are.
            self.serve()
            while self._locked(self._is_in_circle, leaf, (ticket,)) is True:
                self._look_again(ticket)
            if ticket.number not in self.line:
                return self.withdraw(ticket)
        return verdict

    def error(
        self, refusal: Any, ticket: Ticket, timeout: float | None, what: str, governor: str | None
    ) -> Any:
        if isinstance(refusal, _Failure):
            return refusal.error
        return super().error(refusal, ticket, timeout, what, governor)

    def _owns(self, thread: int) -> bool:
        return any(it.owner == thread for it in list(self.held.values()))

    def withdraw(self, ticket: Ticket) -> Any:
        verdict = self._settled(self._may_withdraw, ticket.leaf, ticket)
        if verdict is not _GO:
            return verdict
        serial = ticket.serial
        answer = self.session.wire.call("withdraw", serial)
        return self._settled(self._strike, ticket.leaf, ticket, serial, answer)

    def revise(self, *changes: tuple[Node, int | None]) -> None:
        changes = tuple((node, None if limit is None else min(limit, MOST)) for node, limit in changes)
        limits = [(node, limit) for node, limit in changes if limit is not None]
        if limits:
            self._look("resize", *(part for node, limit in limits for part in (_key(node), limit)))
        super().revise(*changes)
        self.session.wire.flush()
        if limits and self.session.is_active:
            self._look_again()
        self.leave_if_over()

    def usage(self, *nodes: Node) -> list[tuple[int, int, int]]:
        usage: list[tuple[int, int, int]] = []
        for node, (used, waiting, limit) in zip(nodes, self.usage_of([*map(_key, nodes)]), strict=True):
            if limit is not None:
                node.limit = limit
            usage.append((used, waiting, node.limit))
        return usage

    def usage_of(self, keys: Sequence[str]) -> list[tuple[int, int, int | None]]:
        """Return of each layer how many hold it, how many wait, and its limit, if the fleet knows one."""
        # By the thousand: a script takes no more arguments than so many.
        slices = (keys[first : first + 1000] for first in range(0, len(keys), 1000))
        answer = [it for some in slices for it in self._look("usage", *some)]
        return [
            (int(used), int(waiting), None if limit == b"" else int(limit))
            for used, waiting, limit in grouped(answer, 3)
        ]

    def _look(self, *command: str | int) -> Answer:
        try:
            return self.session.look(*command)
        finally:
            self.serve()  # who leads takes in the grants of others

    def holders(self, *nodes: Node) -> list[PermitHolder]:
        """Return who holds any of these layers, in all processes, the longest first."""
        keys, mine, names = tuple(map(_key, nodes)), self.session.id, _thread_names()
        found: list[PermitHolder] = []
        for name, where, age in grouped(self._look("holders"), 3):
            session, _, serial = name.decode().rpartition(":")
            leaf = where.decode()
            if leaf.startswith(keys):
                ticket = self.asked.get(int(serial)) if session == mine else None
                owner = None if ticket is None or ticket.owner is None else names.get(ticket.owner)
                if ticket is not None:
                    agent = ticket.source.name
                else:
                    agent = "/".join(filter(None, (self.session.name, agent_of(leaf))))
                process = session.rpartition(":")[0]
                found.append(PermitHolder(leaf.partition("/")[0], agent, owner, int(age) / 1000, process))
        return sorted(found, key=lambda it: -it.seconds)

    def is_lost(self, ticket: Ticket) -> bool:
        """Whether the place of one that is held may be another's by now."""
        # In this order: what is lost is known to be before the deadline moves.
        late = self.session.deadline < now()
        return ticket.state is HELD and (late or ticket.lost)

    def nobody_waits(self) -> bool:
        """Whether nobody here could be granted anything."""
        return len(self.asked) == len(self.held)

    def leave_if_over(self) -> None:
        """End the session of a closed governor that has nothing of the fleet any more."""
        if self.closed and not self.asked and not self.away and not self.asked:  # it may have come back
            if self.is_amid_step():
                _in_a_thread(self.session.leave)
            else:
                self.session.leave()

    # ------------------------------------------------------------------- for the session

    def granted(self, grants: Sequence[Any]) -> None:
        """Take in what was granted, and wake whom that is for."""
        news = _Grants(self, grants)
        self.after.append(news)  # first of all: it is not said again so soon
        news.release()
        after, index = self.after, 0
        while index < len(after):  # by index, as others append and take out meanwhile
            try:
                item = after[index]
                if isinstance(item, _Latch):
                    open_gate(item)
                if item is news or isinstance(item, _Latch):
                    after.remove(item)
                else:
                    index += 1
            except (IndexError, ValueError):
                pass  # another thread was quicker

    def answered(self) -> Mapping[int, Ticket]:
        line = self.line
        return {
            serial: it for serial, it in list(self.asked.items()) if it.state is HELD or it.number in line
        }

    def reconcile(self, snapshot: Snapshot) -> bool:
        lost: list[Ticket] | str = self._locked(self._agree, self.root, (snapshot,))
        if lost is _BUSY:
            return False
        self._tell_lost(lost)
        return True

    def is_amid_step(self) -> bool:
        lock: Any = self.lock
        return bool(lock._is_owned())

    def lapse(self) -> None:
        self._tell_lost([it for it in list(self.held.values()) if not it.lost])

    def _tell_lost(self, tickets: Sequence[Any]) -> None:
        for ticket in tickets:
            ticket.lost = True
            self.tell(ticket, "lost", max(0.0, monotonic() - ticket.since), here=False)

    def asked_again(self, ticket: Ticket, serial: int, answer: Answer) -> None:
        """Take in the answer to one that was in line when the fleet forgot it."""
        self._locked(self._park_again, ticket.leaf, (ticket, serial, answer))

    # --------------------------------------------------- steps: with the lock held and dirty set

    def _enlist(self, leaf: Node, ticket: Ticket, resumes: bool) -> Any:
        """Write down what is about to ask. Returns _GO, or as ``Tree._park``."""
        if resumes:
            if ticket.state is not AWAY:
                return None  # another thread has released it
        elif is_closed(leaf):
            return _Refusal(SemaphoreClosed)
        # Straight line.
        ticket.serial = serial = self.asks = self.asks + 1
        ticket.lost = False
        if not resumes:
            ticket.number = self.drawn = self.drawn + 1
            ticket.state = WAITING
        self.asked[serial] = ticket
        return _GO

    def _admit_or_park(self, leaf: Node, ticket: Ticket, serial: int, answer: Answer, resumes: bool) -> Any:
        """Do as the fleet has answered.

        Returns:
            As ``Tree._park``; or _STALE, where the fleet has forgotten since what it answered;
            or the answer, to be raised.
        """
        state, verdict = ticket.state, answer[0]
        if not resumes and verdict in (b"held", b"waiting"):
            ticket.age = int(answer[1])
        if state is HELD or state is OUT:
            return None  # granted, or released by another thread, before the answer was read
        if not resumes and is_closed(leaf):
            self._give_back(leaf, ticket)
            return _Refusal(SemaphoreClosed)
        if ticket.serial != serial:
            return _STALE
        if verdict == b"held":
            self._take_in(ticket, int(answer[1]))
            return None
        if verdict == b"waiting":
            self._learn(leaf, answer[2])
            self.line[ticket.number] = ticket
            return _PARKED
        # Straight line.
        del self.asked[ticket.serial]
        if not resumes:
            ticket.state = OUT
        if verdict == b"full":
            return _Refusal(AcquireTimeout, self._learn(leaf, answer[2]), int(answer[1]))
        if verdict == b"queue":
            waiting, bound = int(answer[1]), int(answer[3])
            return _Refusal(ConcurrencyLimitExceeded, self._learn(leaf, answer[2]), waiting, bound)
        return answer

    def _may_withdraw(self, leaf: Node, ticket: Ticket) -> Any:
        if ticket.state is HELD or ticket.state is OUT:
            return None
        if ticket.number in self.line:
            # From here on a renewal that does not know of it must not have it asked for again.
            del self.line[ticket.number]
            return _GO
        refusal = getattr(ticket, "refusal", _Refusal(SemaphoreClosed))
        self._give_back(leaf, ticket)
        return refusal

    def _strike(self, leaf: Node, ticket: Ticket, serial: int, answer: Answer) -> Any:
        """Leave the line, unless the grant came first. Returns None, or a refusal."""
        if ticket.state is HELD or ticket.state is OUT:
            return None
        same = ticket.serial == serial  # else it stands in line under another one
        if same and answer[0] == b"held":
            self._take_in(ticket, int(answer[1]))
            return None
        left: Answer = answer[1:] if answer[0] == b"left" and answer[1:] else [0, []]
        ahead, uses = left
        # Straight line.
        if same and serial in self.asked:
            del self.asked[serial]
        self._give_back(leaf, ticket)
        self.after.append(ticket.gate)  # not in the line any more, by which it would have been opened
        return _Refusal(AcquireTimeout, self._learn(leaf, uses), int(ahead))

    def _take_grants(self, leaf: Node, grants: Sequence[Any]) -> None:
        for serial, number in grouped(grants, 2):
            ticket = self.asked.get(int(serial))
            if ticket is not None and ticket.state is not HELD:
                self._take_in(ticket, int(number))

    def _take_in(self, ticket: Ticket, fence: int) -> None:
        number = ticket.number
        ticket.fence = fence
        # Straight line: in the books before it wakes.
        self.held[number] = ticket
        ticket.state = HELD
        if number in self.away:
            del self.away[number]
        if number in self.line:
            del self.line[number]
        self.after.append(ticket.gate)

    def _give_back(self, leaf: Node, ticket: Ticket) -> bool:
        if (state := ticket.state) is OUT:
            return False
        number, serial = ticket.number, ticket.serial
        farewell = _Farewell(self, ticket)
        # Straight line.
        ticket.state = OUT
        if state is HELD:
            del self.held[number]
        else:
            if number in self.away:
                del self.away[number]
            if number in self.line:
                del self.line[number]
                self.after.append(ticket.gate)
        # Straight line.
        if serial in self.asked:
            del self.asked[serial]
            self.after.append(farewell)
        if self.drains:
            self._open_drains()
        return state is HELD and _untold(ticket)

    def _suspend(self, leaf: Node, ticket: Ticket) -> bool:
        if ticket.state is not HELD:
            return False
        number, serial = ticket.number, ticket.serial
        farewell = _Farewell(self, ticket)
        # Straight line.
        ticket.state = AWAY
        self.away[number] = ticket
        del self.held[number]
        del self.asked[serial]
        self.after.append(farewell)
        return _untold(ticket)

    def _agree(self, leaf: Node, snapshot: Snapshot) -> list[Ticket]:
        """Do as a renewal has reported. Returns what is lost.

        What is to be said in turn is put on the wire with the lock taken, so that it goes before
        whatever another thread will have to say of the same.
        """
        wire, lost = self.session.wire, list[Ticket]()
        if snapshot.current:
            for node, limit in zip(self.main, snapshot.limits, strict=True):
                node.limit = limit
        for serial, (state, number) in snapshot.known.items():
            mine = self.asked.get(serial)
            if mine is None:
                wire.post("release", serial)
            elif state == b"h" and mine.state is not HELD and mine.number in self.line:
                self._take_in(mine, number)
        for serial, ticket in list(self.asked.items()):
            if serial in snapshot.known or not (snapshot.began or serial in snapshot.before):
                continue
            if ticket.state is HELD:
                if snapshot.lost and not ticket.lost:
                    ticket.lost = True  # now: the next renewal will find it registered
                    lost.append(ticket)
                wire.post("register", serial, _key(ticket.leaf), ticket.fence, *_agents(ticket.leaf))
                continue
            if snapshot.began:
                # Under another one, so that no grant is taken for its that comes late and holds no more.
                # Straight line.
                del self.asked[serial]
                ticket.serial = self.asks = self.asks + 1
                self.asked[ticket.serial] = ticket
            if ticket.number in self.line:
                if serial not in snapshot.before:  # it may be there by now, though it was not a moment ago
                    wire.post("release", serial, _key(ticket.leaf))
                again = self._particulars(ticket, True, True)
                then = partial(self.asked_again, ticket, ticket.serial)
                wire.post("acquire", ticket.serial, *again, then=then)
            # Else whoever asks for it finds out.
        if snapshot.current:  # else it may be too late for what was true then
            self._break_circles()
        return lost

    def _is_in_circle(self, leaf: Node, ticket: Ticket) -> bool:
        return ticket.number in self.line and self._circle(ticket) is not None

    def _park_again(self, leaf: Node, ticket: Ticket, serial: int, answer: Answer) -> None:
        if ticket.serial != serial or ticket.number not in self.line:
            return
        if answer[0] == b"held" and ticket.state is not HELD:
            self._take_in(ticket, int(answer[1]))

    def _unused(self, leaf: Node, nodes: tuple[Node, ...]) -> bool:
        out = (*self.held.values(), *self.away.values())
        return not any(node in nodes for ticket in out for node in path(ticket.leaf))

    # -------------------------------------------------------------------------- parts of steps

    def _leaves_to_others(self, item: Gate) -> bool:
        if not isinstance(item, _Farewell):
            return False
        item.leave_to_others()
        return True

    def _particulars(self, ticket: Ticket, waits: bool, comes_back: bool) -> list[str | int]:
        age = ticket.age if comes_back else ""
        return [_key(ticket.leaf), int(waits), age, *_agents(ticket.leaf)]

    def _learn(self, leaf: Node, numbers: Sequence[Any]) -> tuple[LayerUse, ...]:
        """Take limits over. Returns how full each layer of the path is, the narrowest first."""
        uses: list[LayerUse] = []
        for node, (used, limit) in zip(path(leaf)[::-1], grouped(numbers, 2), strict=False):
            if limit != b"":
                node.limit = int(limit)
                node.room = node.limit - int(used)
                uses.append(LayerUse(node.name, int(used), node.limit))
        return tuple(uses[::-1])

    def _report(self, ticket: Ticket, slow: float, what: str, governor: str | None) -> None:
        try:
            super()._report(ticket, slow, what, governor)
        except (RedisError, OSError):
            pass  # no reason to end a wait

    def _look_again(self, ticket: Ticket | None = None) -> None:
        self.session.renew()  # which ends circles, knowing the grants and the limits that there are
        self.serve()

    def _rebuild(self) -> None:
        for ticket in list(self.asked.values()):
            if ticket.state is WAITING and is_closed(ticket.leaf):
                self.session.wire.post("release", ticket.serial, _key(ticket.leaf))
                if ticket.number not in self.line:
                    continue  # its own answer is yet to be read, and will be refused
                # Straight line.
                del self.line[ticket.number]
                del self.asked[ticket.serial]
                self.after.append(ticket.gate)
        self._open_drains()
        self.dirty = None

    def _is_calm(self) -> bool:
        return False

    def _forget(self) -> None:
        for ticket in self.asked.values():
            ticket.state = OUT
        super()._forget()
        self.asked = {}
        if hasattr(self, "session"):  # not where making it has failed, or another thread was about to
            self.session = self.session.renewed(self)


class _Failure:
    """What an error of the client or of the server is returned as, to be raised in whoever asked."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Farewell:
    """To be said to the fleet when the lock is free: that a place is given back.

    Several threads may be asked to. Who finds ``taken`` empty does it. Where that fails, the next renewal
    will report a place that nobody here knows of.
    """

    __slots__ = ("path", "serial", "taken", "tree")

    def __init__(self, tree: FleetTree, ticket: Ticket) -> None:
        self.tree = tree
        self.serial = ticket.serial
        self.path = _key(ticket.leaf)
        self.taken: dict[int, object] = {}

    def release(self) -> None:
        """Say it, and see to it that it is sent."""
        self._say(partial(self.tree.session.wire.tell, alone=self.tree.nobody_waits))
        self.tree.leave_if_over()

    def leave_to_others(self) -> None:
        """Have it said before whatever this thread may say next, by another one."""
        self._say(self.tree.session.wire.post)
        _in_a_thread(self._send)

    def _send(self) -> None:
        self.tree.session.wire.flush()
        self.tree.serve()  # the answer may have had grants to requests
        self.tree.leave_if_over()

    def _say(self, say: Callable[..., object]) -> None:
        by = object()
        try:
            if self.taken.setdefault(0, by) is by:
                say("release", self.serial, self.path)
        except (RedisError, OSError, Reentered):
            pass
        except BaseException:
            # Straight line.
            if 0 in self.taken and self.taken[0] is by:
                self.taken = {}
            self.tree.after.append(self)
            raise


class _Grants:
    """To be done when the lock is free: to take in what was granted."""

    __slots__ = ("grants", "tree")

    def __init__(self, tree: FleetTree, grants: Sequence[Any]) -> None:
        self.tree = tree
        self.grants = grants

    def release(self) -> None:
        tree = self.tree
        if tree._locked(tree._take_grants, tree.root, (self.grants,)) is _BUSY:
            _in_a_thread(self.release)  # in a signal handler amid a step


def agent_of(key: str) -> str:
    """Return the name of the agent that a layer or path is of; empty where that is of none."""
    return "/".join(map(unquote, key.split("/")[1:-1]))


def _key(node: Node) -> str:
    assert isinstance(node, FleetNode)
    return node.key


def _agents(leaf: Node) -> list[str | int]:
    """For each agent of a path, the outermost first: the limit it was made with, and the one it has."""
    found: list[str | int] = []
    for node in path(leaf)[-3::-1]:
        assert isinstance(node, FleetNode)
        found += ["", ""] if node.limit == UNLIMITED else [node.made, node.limit]
    return found


def _error(ticket: Ticket, answer: Answer) -> Exception:
    if answer[0] == b"conflict":
        key, made = answer[1].decode(), int(answer[2])
        return ValueError(
            f"agent {agent_of(key)!r} exists in the fleet with max_{ticket.leaf.kind}s={made}: ask for that, "
            "or wait until nobody uses it"
        )
    said = answer[1].decode()
    return OutOfMemoryError(said) if "OOM" in said else ResponseError(said)
