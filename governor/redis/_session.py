"""The session: one process' part in a fleet, its lease, and the thread that renews it and listens."""

from __future__ import annotations

import atexit
import logging
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, Protocol

from redis.exceptions import RedisError

from governor._errors import ConcurrencyError
from governor._tree import _in_a_thread
from governor.redis._wire import Answer, Reentered, Wire, grouped

__all__ = ["LIMITS", "Owner", "Session", "Snapshot", "now"]

# The part of a lease for which a new fleet grants nothing: long enough for each that lives to renew
# its lease, which comes a little after each third.
SETTLING = 0.5

LIMITS = ("max_streams", "max_tools", "max_global", "max_queued")

_CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


def now() -> float:
    """Seconds on a clock that goes on while the machine sleeps, where there is one."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


@dataclass(frozen=True)
class Snapshot:
    """What a renewal has reported.

    Attributes:
        known: By a permit's serial number, its state (``h``, ``w``) and the fleet's number.
        limits: Of streams, tools, and all.
        before: What the fleet was to know when it was asked.
        current: Whether no limit was changed here since it was answered.
        began: Whether the session had ended, or the fleet had been forgotten: what was said before that,
            and comes late, holds no more.
        lost: Whether what it does not know may be another's by now.
    """

    known: Mapping[int, tuple[bytes, int]]
    limits: tuple[int, ...]
    before: Mapping[int, Any]
    current: bool
    began: bool
    lost: bool


class Owner(Protocol):
    """Who keeps this process' own books."""

    def granted(self, grants: Sequence[Any]) -> None:
        """Take in grants: for each the serial number and the fleet's."""

    def answered(self) -> Mapping[int, Any]:
        """Return what the fleet must know of, by serial number."""
        ...

    def reconcile(self, snapshot: Snapshot) -> bool:
        """Bring the fleet's books and one's own to agree. Returns whether that could be done now."""
        ...

    def is_amid_step(self) -> bool:
        """Whether this very thread has the lock of the books: in a signal handler amid a step."""
        ...

    def lapse(self) -> None:
        """Hold what is held for lost, and tell."""

    def serve(self, *, wait: bool = True) -> None:
        """Do what was left for when no lock is held."""


class Session:
    """Says commands on behalf of one process, and keeps its lease.

    It begins with the first command. Whatever it does can be interrupted, and be done by several threads
    at once: it has no lock that could be left taken.
    """

    def __init__(self, client: Any, name: str, owner: Owner, *, owns_client: bool) -> None:
        self.client = client
        self._owns_client = owns_client
        self.name = name
        self.pid = os.getpid()
        self.id = f"{_HOST}:{self.pid}:{secrets.token_hex(4)}"
        self.limits: dict[str, int | None] = {}
        self.lease = 0.0
        self.deadline = float("inf")
        self._epoch: bytes | None = None
        # How often the session has begun anew; up to which of these that is seen to; the last by which
        # places were lost.
        self._begun = self._seen = self._losing = 0
        self._changes = 0  # how often limits were changed here
        self._owner = weakref.ref(owner)
        self.wire = Wire(client, name, self.id, self._deliver)
        self._active = False
        self._thread: Thread | None = None
        self._next = 0.0
        weakref.finalize(owner, _in_a_thread, self._end).atexit = False

    def renewed(self, owner: Owner) -> Session:
        """Return another one for the same fleet: that of a forked child."""
        pool = self.client.connection_pool
        # Which another thread of the parent may have held, and no thread of the child will give back.
        for lock in ("_lock", "_fork_lock"):
            if hasattr(pool, lock):
                setattr(pool, lock, threading.RLock())
        other = Session(self.client, self.name, owner, owns_client=self._owns_client)
        other.limits, other.lease = self.limits, self.lease
        return other

    # ----------------------------------------------------------------------------- commands

    def join(self, limits: Mapping[str, int | None], lease: float | None) -> None:
        """Make the fleet, or join it. What it has for limits and lease is known from then on.

        Raises:
            ValueError: there is no such fleet, and not all limits were given.
            RedisError: the server could not be reached, or refused.
        """
        given = ["" if (it := limits[argument]) is None else it for argument in LIMITS]
        answer = self.wire.call("join", *given, "" if lease is None else round(lease * 1000), repr(SETTLING))
        if answer[0] == b"none":
            missing = ", ".join(argument for argument in LIMITS[:3] if limits[argument] is None)
            raise ValueError(
                f"{missing} must be given: there is no fleet {self.name!r} yet, and who is first makes it"
            )
        found = [None if it == b"" else int(it) for it in answer[1:5]]
        self.limits = dict(zip(LIMITS, found, strict=True))
        self.lease = int(answer[5]) / 1000
        if answer[6] == b"1":
            logging.getLogger("governor").info(
                "fleet %r is new: it grants nothing for its first %g s", self.name, SETTLING * self.lease
            )

    def call(self, *command: str | int) -> Answer:
        """Return the answer to a command; if need be, having begun the session, or brought it back.

        Raises:
            RedisError: the server could not be reached, or refused.
            Reentered: a signal handler has interrupted another command in this very thread.
        """
        if not self._active:
            self._begin()
        for _ in range(5):
            answer = self.wire.call(*command)
            if not answer or answer[0] not in (b"gone", b"lapsed"):
                return answer
            self.renew()
        raise self._lost()

    def _lost(self) -> ConcurrencyError:
        return ConcurrencyError(f"fleet {self.name!r}: its state is lost again and again")

    def look(self, *command: str | int) -> Answer:
        """Return the answer to a command that is of no session, and begins none."""
        owner = self._owner()
        if owner is not None and owner.is_amid_step():
            raise Reentered  # who leads may want the lock that this very thread has
        del owner
        then = self._note_change if command[0] == "resize" else None
        answer = self.wire.call(*command, then=then)
        if answer and answer[0] == b"gone":
            self.join(self.limits, self.lease)
            answer = self.wire.call(*command, then=then)
        if not self._active:
            self.close()
        return answer

    def renew(self) -> None:
        """Extend the lease, and bring the books to agree."""
        owner = self._owner()
        if owner is None:
            return
        noted: list[int] = []
        for _ in range(5):
            before, asked = owner.answered(), now()
            answer = self.wire.call("renew", then=partial(self._note, noted))
            if answer[0] != b"gone":
                break
            self.join(self.limits, self.lease)
        else:
            raise self._lost()
        if asked > self.deadline:
            owner.lapse()
        begun, seen = self._begun, self._seen
        limits, soonest, rest = tuple(map(int, answer[4:7])), answer[1], answer[7:]
        self.limits = {**self.limits, **dict(zip(LIMITS, limits, strict=False))}
        known = {int(serial): (state, int(number)) for serial, state, number in grouped(rest, 3)}
        if owner.reconcile(
            Snapshot(known, limits, before, noted[-1:] == [self._changes], begun > seen, self._losing > seen)
        ):
            self._seen = begun
            self.deadline = asked + self.lease  # not before what is lost is known to be
        self._next = time.monotonic() + min(self.lease / 3, int(soonest) / 1000 + 0.002)
        self.wire.flush()

    def _note_change(self, _: Answer) -> None:
        self._changes += 1

    def _note(self, noted: list[int], answer: Answer) -> None:
        """Note whether a renewal has begun the session anew: in the order of the answers."""
        noted.append(self._changes)
        if answer[0] == b"gone":
            return
        existed, _, settles, epoch = answer[:4]
        if existed == b"0" and self._epoch is not None:
            # Who is back while a new fleet settles has lost nothing.
            if epoch == self._epoch or settles == b"0":
                self._losing = self._begun + 1
            self._begun += 1
        self._epoch = epoch

    def leave(self) -> None:
        """Give back all that this process has, and end the session. The next command begins it again."""
        if not self._active or self.pid != os.getpid():
            return
        self._active = False
        self._thread = self._epoch = None
        try:
            self.wire.call("leave")
        except (RedisError, OSError, Reentered):
            pass  # its lease ends by itself
        self.wire.close()  # the listener, when it has noticed, closes the rest

    def close(self) -> None:
        """Let go of the connections, until they are needed again."""
        self.wire.close()
        if self._owns_client:
            # Those that nobody uses: another thread may be amid a command.
            self.client.connection_pool.disconnect(inuse_connections=False)

    def _end(self) -> None:
        """End what nobody uses any more."""
        if self.pid == os.getpid():
            self.leave()
            self.close()

    @property
    def is_active(self) -> bool:
        """Whether it has begun, and not ended."""
        return self._active

    def leave_at_once(self) -> None:
        """Leave at the end of the process, which may not wait for a server that is away."""
        if self._active and self.pid == os.getpid():
            self._active = False
            try:
                self.wire.attempt("leave", timeout=1.0)
            except (RedisError, OSError):
                pass  # its lease ends by itself

    def _begin(self) -> None:
        self.renew()
        # In this order: an interrupt leaves a session that has a listener, or one that begins again, with
        # another; the former one then ends.
        _sessions.add(self)
        self._thread = thread = Thread(target=self._attend, name="governor-fleet", daemon=True)
        thread.start()
        self._active = True

    def _deliver(self, grants: Sequence[Any]) -> None:
        owner = self._owner()
        if owner is not None:
            owner.granted(grants)

    # --------------------------------------------------------------------------- the thread

    def _attend(self) -> None:
        """Listen and renew, for as long as the session lasts."""
        channel = f"governor:{{{self.name}}}:{self.id}"
        pubsub = self.client.pubsub()
        trouble = 0
        try:
            while self._goes_on():
                try:
                    if not trouble:
                        self._listen(pubsub, channel)
                    else:
                        self._recover(trouble)
                    trouble = 0
                except Exception as error:
                    trouble += 1
                    if not isinstance(error, (RedisError, OSError)) and self._goes_on():
                        logging.getLogger("governor").exception("fleet %r: the listener failed", self.name)
        finally:
            if self._thread is threading.current_thread():
                self._active = False
            pubsub.close()
            if not self._active:
                self.close()

    def _goes_on(self) -> bool:
        return self._thread is threading.current_thread() and self._owner() is not None

    def _listen(self, pubsub: Any, channel: str) -> None:
        if not pubsub.subscribed:
            pubsub.subscribe(channel.encode())
        while self._goes_on():
            left = self._next - time.monotonic()
            if left <= 0:
                self._renew_alone()
                continue
            message = pubsub.get_message(timeout=left)
            if message is None:
                continue
            if message["type"] == "subscribe":
                self._renew_alone()  # what came while nobody listened is not said again
            elif message["type"] == "message":
                self._deliver(message["data"].split())
                self._serve()

    def _recover(self, trouble: int) -> None:
        owner = self._owner()
        if owner is not None and now() > self.deadline:
            owner.lapse()
        del owner
        time.sleep(min(1.0, 0.02 * 2**trouble))
        self._renew_alone()

    def _renew_alone(self) -> None:
        try:
            self.renew()
        finally:
            self._serve()

    def _serve(self) -> None:
        owner = self._owner()
        if owner is not None:
            owner.serve(wait=False)  # what others have to say in there is said in a thread of its own


_HOST = re.sub(r"[^\w.-]", "-", socket.gethostname(), flags=re.ASCII) or "host"
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for session in list(_sessions):
        session.leave_at_once()
