"""A process that takes part in a fleet and does what it is told: both ends of it.

:class:`Worker` is the end in the tests. Any method of :class:`Desk`, the other end, may be called on
it; what that raises is raised here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from fleet.history import History

import governor

__all__ = ["Desk", "Worker"]

PATIENCE = 20.0


class Worker:
    """A worker process, as the tests see it.

    Args:
        url: Where the server is.
        name: The fleet's name.
        client: Options of the worker's client.
        settling: Let a new fleet settle for as long as it does in earnest, else not at all.
        options: Of its ``RedisGovernor``.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        client: dict[str, Any] | None = None,
        settling: bool = False,
        **options: Any,
    ) -> None:
        from fleet.servers import reap

        self._pipe, theirs = Pipe()
        # Where the tests have these from, be it the working tree or an installed wheel.
        paths = [str(Path(governor.__file__).parents[1]), str(Path(__file__).parents[1])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fleet.workers", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the tests alone
        )
        theirs.close()
        self.pid = self._process.pid
        reap(self.pid)
        self._ready = False
        self._pipe.send((url, name, client or {}, settling, options))

    def ready(self) -> Worker:
        """Wait until it has joined; raise what kept it from that."""
        if not self._ready:
            self._receive(PATIENCE)
            self._ready = True
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self.call, name)

    def call(self, method: str, *args: Any, patience: float = PATIENCE, **options: Any) -> Any:
        """Call a method of its desk, and return or raise what comes of that."""
        self.ready()
        self._pipe.send((method, args, options))
        return self._receive(patience)

    def _receive(self, patience: float) -> Any:
        __tracebackhide__ = True
        if not self._pipe.poll(patience):
            pytest.fail(f"worker {self.pid} did not answer within {patience} s")
        try:
            answer, error = self._pipe.recv()
        except EOFError:
            pytest.fail(f"worker {self.pid} ended by itself: {self._process.wait()}")
        if error is not None:
            raise error
        return answer

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would, and wait for its end."""
        from fleet.servers import no_longer_reap

        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            no_longer_reap(self.pid)

    def fire(self) -> None:
        """End it, without asking."""
        self.kill()
        self._pipe.close()


class Desk:
    """What a worker does. Permits are known by their fencing numbers, and what waits by a name."""

    def __init__(
        self, url: str, name: str, client: dict[str, Any], settling: bool, options: dict[str, Any]
    ) -> None:
        import redis

        from governor.redis import RedisGovernor, _session

        if not settling:
            _session.SETTLING = 0.0
        self.client = redis.Redis.from_url(url, **client)
        self.gov = RedisGovernor(self.client, name, **options)
        self.agents: dict[str | None, Any] = {None: self.gov}
        self.permits: dict[int, Any] = {}
        self.events: list[str] = []
        self.waits: dict[str, Future[Any]] = {}
        self.gate = threading.Event()
        self.fails = False
        self.over = threading.Event()
        self.load: list[Future[None]] = []
        self.done: list[int] = []

    def agent(self, name: str, of: str | None = None, **limits: int) -> None:
        """Have an agent, to be named in what follows."""
        self.agents[name] = self.agents[of].agent(name, **limits)

    def acquire(self, kind: str = "tool", agent: str | None = None, timeout: float | None = None) -> int:
        """Have a permit, and return its fencing number."""
        return self._keep(self.agents[agent].acquire(kind, timeout))

    def try_acquire(self, kind: str = "tool", agent: str | None = None) -> int | None:
        permit = self.agents[agent].try_acquire(kind)
        return None if permit is None else self._keep(permit)

    def _keep(self, permit: Any) -> int:
        fence: int = permit.fence
        self.permits[fence] = permit
        return fence

    def release(self, fence: int | None = None) -> None:
        """Give one permit back, or all, and return when the server knows."""
        import redis

        for number in [fence] if fence is not None else list(self.permits):
            self.permits.pop(number).release()
        with suppress(redis.RedisError):
            self.gov.stats()  # whose answer comes after that one, for which nobody waits

    def lost(self) -> list[int]:
        """Return which permits are lost."""
        return [fence for fence, permit in self.permits.items() if permit.lost]

    def mine(self) -> list[int]:
        """Return the fencing numbers of all permits that are known by them."""
        return list(self.permits)

    def check(self, fence: int) -> None:
        self.permits[fence].check()

    def stand(
        self, name: str, kind: str = "tool", agent: str | None = None, timeout: float | None = None
    ) -> None:
        """Let a thread acquire a permit."""
        self.waits[name] = self._thread(partial(self.acquire, kind, agent, timeout))

    def request(self, name: str, kind: str = "tool", agent: str | None = None) -> None:
        """Let a future stand in line for a permit."""
        self.waits[name] = self.agents[agent].request(kind)

    def cancel(self, name: str) -> bool:
        return self.waits[name].cancel()

    def outcome(self, name: str, timeout: float = 10.0) -> Any:
        """Wait for what came of a thread or of a future; for a permit, return its fencing number."""
        result = self.waits[name].result(timeout)
        return result if result is None or isinstance(result, int) else self._keep(result)

    def waiting(self, name: str) -> bool:
        return not self.waits[name].done()

    def block(self, name: str, kind: str = "tool") -> None:
        """Let a thread hold a permit in a ``with`` block, until ``leave``."""
        inside: Future[None] = Future()

        def work() -> None:
            with self.gov.acquire(kind):
                inside.set_result(None)
                self.gate.wait()
                if self.fails:
                    raise ZeroDivisionError

        self.waits[name] = self._thread(work)
        inside.result(10)

    def leave(self, *, error: bool = False) -> None:
        """Let the blocks end, or fail."""
        self.fails = error
        self.gate.set()

    def listen(self) -> None:
        """Write down all events from now on."""
        self.gov.subscribe(lambda event: self.events.append(event.event))

    def heard(self) -> list[str]:
        return list(self.events)

    def stats(self) -> Any:
        return self.gov.stats()

    def holders(self) -> Any:
        return self.gov.holders()

    def resize(self, **limits: int) -> None:
        self.gov.resize(**limits)

    def close(self) -> None:
        self.gov.close()

    def drain(self, timeout: float) -> bool:
        return bool(self.gov.drain(timeout))

    # ------------------------------------------------------------------------ traffic

    def begin(
        self,
        history: str,
        threads: int,
        *,
        hold: float = 0.002,
        agent: str | None = None,
        kinds: tuple[str, ...] = ("tool", "stream"),
    ) -> None:
        """Let threads acquire and give back, and write that down, until ``end``."""
        log = History(history)
        for number in range(threads):
            kind = kinds[number % len(kinds)]
            self.done.append(0)
            self.load.append(self._thread(partial(self._work, log, number, kind, agent, hold)))

    def _work(self, log: History, number: int, kind: str, agent: str | None, hold: float) -> None:
        import redis

        gov = self.agents[agent]
        path = f"{kind}/{agent}/" if agent else f"{kind}/"
        while not self.over.is_set():
            try:
                permit = gov.acquire(kind, 30)
            except (redis.ConnectionError, redis.TimeoutError):
                sleep(0.01)  # as an application would, which has to do with a server that may be away
                continue
            log.grant(permit, path)
            sleep(hold)
            log.release(permit, path)
            permit.release()
            self.done[number] += 1

    def wind_down(self) -> None:
        """Let the traffic end, without waiting for that."""
        self.over.set()

    def end(self, timeout: float = 15.0) -> list[int]:
        """End the traffic. Returns how many turns each thread had."""
        self.over.set()
        for thread in self.load:
            thread.result(timeout)
        return self.turns()

    def turns(self) -> list[int]:
        return list(self.done)

    def at_work(self) -> int:
        """Return how many threads of the traffic are still at it."""
        return sum(not thread.done() for thread in self.load)

    def _thread(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    desk: Desk | None = None
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            os._exit(0)
        answer: Any = None
        error: BaseException | None = None
        try:
            if desk is None:
                desk = Desk(*message)
            else:
                method, args, options = message
                answer = getattr(desk, method)(*args, **options)
        except Exception as raised:
            raised.add_note("In the worker:\n" + "".join(traceback.format_exception(raised)))
            error = raised
        try:
            pipe.send((answer, error))
        except Exception as odd:  # what cannot be pickled is told in words
            pipe.send((None, RuntimeError(f"{answer!r} {error!r}: {odd}")))


if __name__ == "__main__":
    main()
