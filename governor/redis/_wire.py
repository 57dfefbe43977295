"""The wire: the commands of all threads of a process, combined on one connection.

One thread at a time leads: it sends all commands that are there in one call of the script, and hands the
answers out. So a call costs one round trip where nobody else calls, and a share of one where many do.
The technique is flat combining (Hendler, Incze, Shavit and Tzafrir, 2010).

Commands are carried out in the order in which they were called, and each at least once: after an
interrupt, or where an answer was lost, it is sent again. All commands bear that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha1
from importlib.resources import files
from threading import Lock, RLock, get_ident, main_thread
from types import NoneType
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from governor._errors import ConcurrencyError
from governor._tree import _in_a_thread

__all__ = ["KEYS", "Answer", "Reentered", "Wire", "grouped", "open_gate"]

Answer = list[Any]

_SCRIPT = files("governor.redis").joinpath("fleet.lua").read_bytes()
_SHA = sha1(_SCRIPT).hexdigest().encode()
_MOST = 128  # commands in one call

KEYS = ("state", "held", "line", "ids", "sessions")


class Reentered(ConcurrencyError):
    """A signal handler wants an answer for which what it has interrupted would have to go on."""

    def __init__(self) -> None:
        super().__init__(
            "a fleet cannot be asked inside a signal handler that interrupted a command to it, "
            "or the governor itself"
        )


class _Call:
    __slots__ = ("answer", "args", "done", "gate", "size", "then", "waits")

    def __init__(
        self, command: tuple[str | int, ...], then: Callable[[Answer], object] | None, waits: bool
    ) -> None:
        name, *args = [str(part).encode() for part in command]
        self.args = _pack(name, b"%d" % len(args), *args)
        self.size = 2 + len(args)
        self.then = then
        self.waits = waits
        self.gate: Any = None
        self.done = False
        self.answer: Answer | BaseException = []


class Wire:
    """Calls the script, on a connection of a client's pool.

    ``deliver`` is called, in the thread that leads, with the grants that a call has brought about.
    """

    def __init__(
        self, client: Any, name: str, session: str, deliver: Callable[[Sequence[Any]], None]
    ) -> None:
        self._pool = client.connection_pool
        self._connection: Any = None
        self._proven = False  # whether that has served
        self._amid = False  # whether there is, or may be, more on it than the queue says
        self._deliver = deliver
        self._queue: deque[_Call] = deque()
        self._sent = 0  # of the first in the queue, how many were sent with their answer unread
        self._lock = RLock()  # whose owner leads
        keys = [f"governor:{{{name}}}:{key}".encode() for key in KEYS]
        self._head = _pack(b"EVALSHA", _SHA, b"%d" % len(keys), *keys, session.encode())
        self._head_size = 4 + len(keys)

    def call(self, *command: str | int, then: Callable[[Answer], object] | None = None) -> Answer:
        """Return the answer to a command.

        ``then`` is called with it first, by whoever leads, before it sends anything else.

        Raises:
            RedisError: the server could not be reached, or refused.
            Reentered: this very thread is amid another command, which will send this one too.
        """
        call = _Call(command, then, True)
        try:
            self._queue.append(call)
            while not call.done:
                self._wait(call)
        except BaseException:
            # Whoever leads next sends it. That may be up to this thread, which was woken for it.
            call.waits = False
            call.gate = None
            _in_a_thread(self.flush)
            raise
        answer = call.answer
        if isinstance(answer, BaseException):
            try:
                raise answer
            finally:
                del answer, call
        return answer

    def post(self, *command: str | int, then: Callable[[Answer], object] | None = None) -> None:
        """Have a command sent by whoever leads next, which is to be seen to with :meth:`flush`.

        ``then`` is called with the answer, if one comes.
        """
        self._queue.append(_Call(command, then, False))

    def tell(self, *command: str | int, alone: Callable[[], bool]) -> None:
        """Have a command sent, by this thread or by the one that leads.

        Where nobody else sends anything, and ``alone`` returns True, its answer is not waited for: it is
        read with that of the next command. Where that one fails, this one is sent again with it.
        """
        call = _Call(command, None, False)
        self._queue.append(call)
        self._lead(call, alone)

    def flush(self) -> None:
        """Send what is there, unless another thread does, and read what was not read."""
        self._lead(None)

    def attempt(self, *command: str | int, timeout: float) -> None:
        """Say one last thing, where that takes no new connection, within so many seconds."""
        if not self._lock.acquire(timeout=timeout):
            return
        try:
            connection = self._connection
            if connection is not None and _is_open(connection):
                call = _Call(command, None, False)
                connection.send_packed_command(
                    [self._encode([self._queue[i] for i in range(len(self._queue))] + [call])],
                    check_health=False,
                )
                # Closed with something unread, it might not arrive.
                for _ in range(1 + bool(self._sent)):
                    if connection.can_read(timeout):
                        connection.read_response(disable_decoding=True)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Give the connection back."""
        if self._lock._is_owned():  # type: ignore[attr-defined]
            return  # in a signal handler amid a command, which needs it
        try:
            self._lock.acquire()
            connection, self._connection, self._sent = self._connection, None, 0
        finally:
            try:
                self._lock.release()
            except RuntimeError:
                pass  # not taken yet
            self._wake_next()  # who came meanwhile found it taken, and sleeps
        if connection is not None:
            connection.disconnect()
            self._pool.release(connection)

    def _wait(self, call: _Call) -> None:
        """Lead, or wait until there is an answer or nobody leads."""
        if self._lead(call):
            return
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise Reentered
        if call.gate is None:
            gate = Lock()
            gate.acquire()
            call.gate = gate
        # Once more, now that whoever leaves off leading can see that somebody waits.
        if not call.done and not self._lead(call):
            call.gate.acquire()

    def _lead(self, call: _Call | None, alone: Callable[[], bool] | None = None) -> bool:
        """Send what is there until this call is done, if nobody else leads. Returns whether it did."""
        lock = self._lock
        if lock._is_owned():  # type: ignore[attr-defined]
            return False
        try:
            if get_ident() != main_thread().ident or self._is_connected():
                return self._lead_on(call, alone)
            # Signals interrupt the main thread, and what connects may have a lock of others in hand, such as
            # that of `logging`, which would stay taken.
            return not _in_a_thread(self.flush) and self._lead_on(call, alone)
        except BaseException:
            try:
                lock.release()
            except RuntimeError:
                pass  # not taken yet, or free again
            _in_a_thread(self.flush)  # in place of whoever would have been woken
            raise

    def _lead_on(self, call: _Call | None, alone: Callable[[], bool] | None) -> bool:
        lock, led = self._lock, False
        while lock.acquire(False):
            self._send_all(call, alone)
            lock.release()
            led = True
            if self._wake_next() or len(self._queue) <= self._sent:
                break
            # Else nobody waits for what has come just now, and so nobody would send it.
        return led

    def _is_connected(self) -> bool:
        connection = self._connection
        return connection is not None and not self._amid and _is_open(connection)

    def _wake_next(self) -> bool:
        """Let the first that waits lead, if there is one. Returns whether there is."""
        following = self._first_that_waits()
        if following is not None and following.gate is not None:
            open_gate(following.gate)
        return following is not None

    def _first_that_waits(self) -> _Call | None:
        for index in range(len(self._queue)):
            try:
                if self._queue[index].waits:
                    return self._queue[index]
            except IndexError:
                break  # another thread leads by now
        return None

    def _send_all(self, call: _Call | None, alone: Callable[[], bool] | None) -> None:
        queue = self._queue
        if alone is not None and len(queue) == 1 and not self._sent and alone() and self._send(queue[0]):
            # Straight line.
            self._sent = 1
            self._amid = False
            return
        while queue:
            # By index, as others append meanwhile; only who leads takes out.
            batch = [queue[index] for index in range(min(len(queue), _MOST))]
            try:
                answers = self._exchange(batch)
            except ResponseError as error:
                # One that the server refuses may not take the others with it.
                answers = [error] if len(batch) == 1 else [self._alone(it) for it in batch]
            except (RedisError, OSError) as error:
                answers = [error] * len(batch)
            except Exception as error:
                if call is not None:
                    raise  # a signal handler's: no matter of the others
                answers = [error] * len(batch)
            for it, answer in zip(batch, answers, strict=True):
                it.answer = answer
                if it.then is not None and isinstance(answer, list):
                    it.then(answer)
                it.done = True
                if it.gate is not None:
                    open_gate(it.gate)
                queue.popleft()
            if (call is None or call.done) and self._first_that_waits() is not None:
                return  # who needs no more leaves the rest to who does, else it would lead for ever

    def _alone(self, call: _Call) -> Any:
        try:
            return self._exchange([call])[0]
        except RedisError as error:
            return error

    def _send(self, call: _Call) -> bool:
        """Send a first attempt, without reading the answer. Returns whether that went well."""
        connection = self._connection
        if connection is None or self._amid:
            return False
        self._amid = True
        try:
            connection.send_packed_command([self._encode([call])])
        except (RedisError, OSError):
            return False
        return True

    def _exchange(self, batch: list[_Call]) -> list[Any]:
        """Call the script; as often as the client is to try. The first of the calls may have been sent."""
        connection = self._connection
        if connection is None:
            connection = self._connection = self._pool.get_connection()
            self._proven = self._amid = False
        if self._amid:  # what was interrupted there may have left half a command, or an answer to it
            connection.disconnect()
        # Straight line.
        self._amid = True
        sent = self._sent
        self._sent = 0
        try:
            answers = self._try_all(connection, batch, sent)
        except ResponseError:
            self._amid = False  # that was the whole of an answer
            raise
        self._amid = False
        return answers

    def _try_all(self, connection: Any, batch: list[_Call], sent: int) -> list[Any]:
        if sent:
            try:
                if len(batch) > sent:
                    # With no look at its health first, whose answer would be the one that is to come.
                    connection.send_packed_command([self._encode(batch[sent:])], check_health=False)
                first = self._read(connection, sent)
                return first + self._read(connection, len(batch) - sent) if len(batch) > sent else first
            except (RedisError, OSError):
                connection.disconnect()  # and all of it once more
        data = self._encode(batch)

        def attempt() -> list[Any]:
            connection.send_packed_command([data])
            try:
                return self._read(connection, len(batch))
            except NoScriptError:
                connection.send_command("SCRIPT", "LOAD", _SCRIPT)
                connection.read_response()
                connection.send_packed_command([data])
                return self._read(connection, len(batch))
            except ReadOnlyError:
                connection.disconnect()  # a primary once: the next attempt may find the one there is now
                raise

        def cut(_error: Exception) -> None:
            connection.disconnect()

        try:
            answers: list[Any] = connection.retry.call_with_retry(attempt, cut)
        except RedisConnectionError:
            # One that has served before may have been cut since, which is no reason to fail: the client's
            # own commands, which look at a connection first, would not.
            if not self._proven:
                raise
            self._proven = False
            answers = connection.retry.call_with_retry(attempt, cut)
        self._proven = True
        return answers

    def _encode(self, batch: list[_Call]) -> bytes:
        size = self._head_size + sum([it.size for it in batch])
        return b"".join([b"*%d" % size, self._head, *[it.args for it in batch], b"\r\n"])

    def _read(self, connection: Any, size: int) -> list[Any]:
        reply: Any = connection.read_response(disable_decoding=True)
        if isinstance(reply, (bytes, int, NoneType)) or len(reply) != size + 1:
            raise RedisConnectionError("that is no answer to what was asked")  # and what follows neither
        if reply[0]:
            self._deliver(reply[0])
        answers: list[Any] = reply[1:]
        return answers


def _is_open(connection: Any) -> bool:
    """Whether there is a socket; of one with a client-side cache, below that."""
    return getattr(connection, "_conn", connection)._sock is not None


def open_gate(gate: Any) -> None:
    """Open what somebody waits at, if it is not open already."""
    try:
        gate.release()
    except RuntimeError:
        pass  # open already


def _pack(*parts: bytes) -> bytes:
    return b"".join([b"\r\n$%d\r\n%b" % (len(part), part) for part in parts])


def grouped(parts: Sequence[Any], size: int) -> Iterable[tuple[Any, ...]]:
    """Return what an answer has one after the other in groups of so many."""
    return zip(*[iter(parts)] * size, strict=True)
