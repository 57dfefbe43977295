"""A budget that several processes share, kept by a server: beside the least that one could do there."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks._measure import (
    PATIENCE,
    Broken,
    Contender,
    Effort,
    Figures,
    Gauge,
    Row,
    absent,
    interleaved,
    loop,
    nothing,
)
from benchmarks._peers import Body, Governed, Peer, installed
from benchmarks._server import Server, binary
from governor import AcquireTimeout

__all__ = ["fleet"]

THREADS = 32
ONE, MANY = "one thread, room for all", f"{THREADS} threads, room for all"
HANDED = {1: "one place, 2 processes of 1 thread", 4: "one place, 2 processes of 4 threads"}
GRANT, GRANT_OF = "a grant", "a grant, 1,000 waiting requests"


def fleet(effort: Effort) -> list[Row]:
    """Turns of one thread and of many, hand-overs between processes, and grants from a long line."""
    lengths, crews = (100, effort.of(10_000, 500)), (1, 10, 100)
    cases: dict[str, dict[str, Callable[[str], Any]]] = {
        ONE: {it.name: partial(it, tools=8) for it in (RoundTrip, Fleet, Counter, OneProcess)},
        MANY: {it.name: partial(it, tools=THREADS) for it in (CounterOfEach, Fleet)},
    }
    for threads, case in HANDED.items():
        cases[case] = {name: partial(Processes, name, threads=threads) for name in TAKERS}
    cases[GRANT] = {f"{length:,} waiting requests": partial(Waiting, length=length) for length in lengths}
    cases[GRANT_OF] = {
        f"{agents} agent{'s' * (agents > 1)}": partial(Waiting, length=effort.of(1_000, 200), agents=agents)
        for agents in crews
    }
    reason = _missing()
    found = []
    if reason:
        for case, makers in cases.items():
            found += absent("fleet", case, dict.fromkeys(makers, reason))
        return found
    with Server() as server:
        _settle()
        for case, makers in cases.items():
            made = {name: make(server) for name, make in makers.items()}
            try:
                contenders = {
                    name: Contender(_round(case, it, effort), it.check) for name, it in made.items()
                }
                found += interleaved("fleet", case, contenders, rounds=effort.rounds(15), weighs=case == ONE)
            finally:
                for it in made.values():
                    it.close()
    return found


def _round(case: str, it: Any, effort: Effort) -> Callable[[], Figures]:
    if case == ONE:
        return loop(partial(it.run, "tool", body=nothing), effort.of(500, 50))
    if case in (GRANT, GRANT_OF):
        return partial(it.round, effort.of(200, 20))
    seconds = 0.1 if effort.quick else 0.5
    return partial(_compete, it, seconds) if case == MANY else partial(it.round, seconds)


def _missing() -> str | None:
    if installed("redis") is None:
        return "not installed"
    return None if binary() else "needs a server: valkey-server or redis-server"


def _settle() -> None:
    """Let new fleets begin at once. They wait for those that hold something, and here nobody does yet."""
    from governor.redis import _session

    _session.SETTLING = 0.0


def _client(server: str) -> Any:
    from redis import Redis

    return Redis(unix_socket_path=server)


def _governor(server: str, name: str, *, tools: int) -> Any:
    from governor.redis import RedisGovernor

    return RedisGovernor(_client(server), name, max_streams=1, max_tools=tools, max_global=tools)


# A turn that does not wait


class Shared(Peer):
    """One whose limit all processes share, if it has any."""

    layers = 1
    names = 0  # so that each has books of its own

    def __init__(self, server: str, tools: int) -> None:
        Shared.names += 1
        self.key = f"{type(self).__name__}-{Shared.names}"
        self.server, self.client = server, _client(server)
        super().__init__(1, tools, tools)

    def turn(self) -> Callable[[Body], object]:
        """Return what one thread calls for each turn."""
        return lambda body: self.run("tool", 1, body)


class RoundTrip(Shared):
    """The least that there is: one short script. Bounds nothing."""

    name = "redis-py, one round trip"

    def build(self, limits: Mapping[str, int]) -> None:
        self.done = 0
        self.sha = self.client.script_load("return redis.call('HINCRBY', KEYS[1], 'done', ARGV[1])")

    def run(self, kind: str, n: int, body: Body) -> None:
        call, sha, key = self.client.evalsha, self.sha, self.key
        for _ in range(n):
            call(sha, 1, key, 1)
            body()
        self.done += n

    def check(self) -> None:
        done = int(self.client.hget(self.key, "done"))
        if done != self.done:
            raise Broken(f"{done} of {self.done} round trips were made")


TAKE = """\
if tonumber(redis.call('HGET', KEYS[1], 'held') or 0) >= tonumber(ARGV[1]) then
    return 0
end
return redis.call('HINCRBY', KEYS[1], 'held', 1)
"""
GIVE = "return redis.call('HINCRBY', KEYS[1], 'held', -1)"


class Counter(Shared):
    """What one writes if nobody has to wait: a counter, and a script that looks at it. Knows no holders."""

    name = "redis-py, a counter"

    def build(self, limits: Mapping[str, int]) -> None:
        self.take, self.give = (self.client.script_load(script) for script in (TAKE, GIVE))

    def turn(self, client: Any = None) -> Callable[[Body], object]:
        call, key, take, give, limit = (
            (client or self.client).evalsha, self.key, self.take, self.give, self.limits["tool"]
        )  # fmt: skip

        def turn(body: Body) -> None:
            if not call(take, 1, key, limit):
                raise Broken("it is full where there is room for all")
            try:
                body()
            finally:
                call(give, 1, key)

        return turn

    def run(self, kind: str, n: int, body: Body) -> None:
        turn = self.turn()
        for _ in range(n):
            turn(body)

    def check(self) -> None:
        limit = self.limits["tool"]
        got = [bool(self.client.evalsha(self.take, 1, self.key, limit)) for _ in range(limit + 1)]
        for _ in range(sum(got)):
            self.client.evalsha(self.give, 1, self.key)
        held = int(self.client.hget(self.key, "held"))
        if sum(got) != limit or got[-1] or held:
            raise Broken(f"{sum(got)} places of {limit}, and {held} held in the end")


class CounterOfEach(Counter):
    """The same, with a client and a connection for each thread."""

    name = f"redis-py, a counter, {THREADS} connections"

    def turn(self, client: Any = None) -> Callable[[Body], object]:
        mine = client or _client(self.server)
        mine.ping()
        return super().turn(mine)


class Fleet(Shared, Governed):
    name = "RedisGovernor"
    layers = 2

    def build(self, limits: Mapping[str, int]) -> None:
        self.governor = _governor(self.server, self.key, tools=limits["tool"])
        self.acquire = {"tool": self.governor.acquire_tool, "stream": self.governor.acquire_stream}

    def turn(self) -> Callable[[Body], object]:
        acquire = self.governor.acquire_tool

        def turn(body: Body) -> None:
            with acquire():
                body()

        return turn

    def close(self) -> None:
        self.governor.close()


class OneProcess(Shared, Governed):
    """To tell what the fleet costs."""

    name = "ConcurrencyGovernor, for one process"
    layers = 2


def _compete(peer: Shared, seconds: float) -> Figures:
    """Let threads have turns for so long."""
    counts = [0] * THREADS
    errors: list[BaseException] = []
    gauge, over, began = Gauge(), threading.Event(), threading.Barrier(THREADS + 1)

    def body() -> None:
        with gauge:
            pass

    def work(me: int) -> None:
        try:
            turn = peer.turn()
            began.wait(PATIENCE)
            while not over.is_set():
                turn(body)
                counts[me] += 1
        except BaseException as error:
            errors.append(error)
            began.abort()

    crew = [threading.Thread(target=work, args=(me,), daemon=True) for me in range(THREADS)]
    for thread in crew:
        thread.start()
    try:
        began.wait(PATIENCE)
    except threading.BrokenBarrierError:
        raise Broken(f"a thread does not begin: {errors[:1]}") from None
    at = time.perf_counter()
    time.sleep(seconds)
    counted, took = list(counts), time.perf_counter() - at
    over.set()
    for thread in crew:
        thread.join(PATIENCE)
    if errors or gauge.entries != sum(counts) or any(thread.is_alive() for thread in crew):
        raise Broken(f"{gauge.entries} turns of {sum(counts)}; {errors[:1]}")
    return Figures(took / max(1, sum(counted)), fairness=min(counted) / max(1, *counted))


# A hand-over between processes


class Taker:
    """Takes the only place, in one of several processes, and gives it back."""

    def __init__(self, server: str, key: str) -> None:
        raise NotImplementedError

    def take(self, timeout: float = PATIENCE) -> Any:
        """Return what is to be given back, None if there was no place for so long."""
        raise NotImplementedError

    def give(self, taken: Any) -> None:
        raise NotImplementedError

    def left(self) -> tuple[int, int]:
        """Return how many places there are, and how many stand in line, when all are done."""
        raise NotImplementedError

    def close(self) -> None:
        """End what it began."""


class Token(Taker):
    """A token in a list: who pops it may run, and pushes it back. It is lost with the process that has it."""

    def __init__(self, server: str, key: str) -> None:
        self.client, self.key = _client(server), key
        self.client.set(f"{key}-made", 1, nx=True) and self.client.rpush(key, "token")

    def take(self, timeout: float = PATIENCE) -> Any:
        return self.client.blpop(self.key, timeout=timeout)

    def give(self, taken: Any) -> None:
        self.client.rpush(*taken)

    def left(self) -> tuple[int, int]:
        return self.client.llen(self.key), 0


class Permit(Taker):
    def __init__(self, server: str, key: str) -> None:
        _settle()
        self.governor = _governor(server, key, tools=1)

    def take(self, timeout: float = PATIENCE) -> Any:
        try:
            return self.governor.acquire_tool(timeout=timeout)
        except AcquireTimeout:
            return None

    def give(self, taken: Any) -> None:
        taken.release()

    def left(self) -> tuple[int, int]:
        stats = self.governor.stats()
        return stats.global_available, stats.tools_waiting

    def close(self) -> None:
        self.governor.close()


TAKERS: dict[str, type[Taker]] = {"redis-py, a token in a list": Token, Fleet.name: Permit}


class Processes:
    """Two processes that want the only place, with some threads each, for as long as each round lasts."""

    def __init__(self, name: str, server: str, threads: int) -> None:
        self.threads = threads
        spawning = multiprocessing.get_context("spawn")
        # Who has the place, who had it before, and how often two had it.
        self.seen = spawning.RawArray("i", 3)
        self.ends: list[Connection] = []
        self.crew: list[Any] = []
        for number in range(2):
            mine, its = spawning.Pipe()
            threads_of_it = range(number * threads + 1, (number + 1) * threads + 1)
            process = spawning.Process(
                target=_work,
                args=(its, TAKERS[name], server, f"{name}-{threads}", self.seen, threads_of_it),
                daemon=True,
            )
            process.start()
            its.close()  # so that this one learns of that one's end
            self.ends.append(mine)
            self.crew.append(process)

    def round(self, seconds: float) -> Figures:
        for end in self.ends:
            self._ask(end, "ready")
        began = time.monotonic() + 0.05
        for end in self.ends:
            end.send(("turns", began, began + seconds))
        counts: list[int] = []
        changes = between = 0
        for end in self.ends:
            its_counts, its_changes, its_between = self._hear(end)
            counts += its_counts
            changes += its_changes
            between += its_between
        if self.seen[2]:
            raise Broken(f"{self.seen[2]} times two had the only place")
        if not changes:  # that somebody had none, as on a busy machine, the fairness tells
            raise Broken(f"nobody handed over: {counts}")
        return Figures(
            seconds / changes,
            fairness=min(counts) / max(counts),
            notes={"between processes, %": 100 * between / changes},
        )

    def check(self) -> None:
        one, other = self.ends
        first, second = self._ask(one, "take", PATIENCE), self._ask(other, "take", 0.1)
        self._ask(one, "give")
        third = self._ask(other, "take", PATIENCE)
        self._ask(other, "give")
        # To give back does not wait for the server, which may hear of it after the next question.
        deadline = time.monotonic() + PATIENCE
        while (left := self._ask(one, "left")) != (1, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if (first, second, third, left) != (True, False, True, (1, 0)):
            raise Broken(f"whether one was let in, and others: {first}, {second}, {third}; left: {left}")

    def close(self) -> None:
        for end in self.ends:
            end.close()
        for process in self.crew:
            process.join(PATIENCE / 6)
            if process.is_alive():
                process.kill()
                process.join()

    def _ask(self, end: Connection, *order: object) -> Any:
        end.send(order)
        return self._hear(end)

    def _hear(self, end: Connection) -> Any:
        try:
            if not end.poll(PATIENCE):
                raise Broken("a process says nothing")
            said = end.recv()
        except EOFError:
            raise Broken("a process ended") from None
        if isinstance(said, str):
            raise Broken(said)
        return said


def _work(end: Connection, kind: type[Taker], server: str, key: str, seen: Any, threads: range) -> None:
    """Do as the other end says, for as long as it is there."""
    taken = None
    try:
        taker = kind(server, key)
        while True:
            match end.recv():
                case ("turns", began, over):
                    end.send(_take_turns(taker, seen, threads, began, over))
                case ("take", timeout):
                    got = taker.take(timeout)
                    taken = got or taken
                    end.send(bool(got))
                case ("give",):
                    end.send(taker.give(taken))
                case ("left",):
                    end.send(taker.left())
                case _:
                    end.send(None)
    except EOFError:
        taker.close()
    except Exception as error:
        end.send(f"{type(error).__name__}: {error}")


def _take_turns(
    taker: Taker, seen: Any, threads: range, began: float, over: float
) -> tuple[list[int], int, int]:
    """Return how many turns each thread had, how many after another's, and after another process's."""
    found: list[tuple[int, int, int]] = []

    def work(me: int) -> None:
        turns = changes = between = 0
        time.sleep(max(0.0, began - time.monotonic()))
        while time.monotonic() < over:
            taken = taker.take()
            there, before, _ = seen
            seen[0], seen[1] = me, me
            turns += 1
            changes += before != me
            between += before not in threads
            # The place itself guards these, or else they tell that it does not.
            seen[2] += bool(there or seen[0] != me)
            seen[0] = 0
            taker.give(taken)
        found.append((turns, changes, between))

    with ThreadPoolExecutor(len(threads)) as crew:
        for it in [crew.submit(work, me) for me in threads]:
            it.result(PATIENCE)
    turns, changes, between = zip(*found, strict=True)
    return [*turns], sum(changes), sum(between)


# A grant


class Waiting:
    """A line for the only place that is as long after each grant as before it."""

    made = 0

    def __init__(self, server: str, length: int, agents: int = 0) -> None:
        Waiting.made += 1
        self.length = length
        self.governor = _governor(server, f"Waiting-{Waiting.made}", tools=1)
        crew = [self.governor.agent(f"agent {n}", max_tools=1) for n in range(agents)]
        self.askers = itertools.cycle(crew or [self.governor])
        self.held = self.governor.acquire_tool()
        self.line = deque(self._ask() for _ in range(length))

    def _ask(self) -> Future[Any]:
        return next(self.askers).request_tool()

    def round(self, grants: int) -> Figures:
        took = 0.0
        for _ in range(grants):
            at = time.perf_counter()
            self.held.release()
            self.held = self.line.popleft().result(PATIENCE)
            took += time.perf_counter() - at
            self.line.append(self._ask())
        return Figures(took / grants)

    def check(self) -> None:
        stats = self.governor.stats()
        early = sum(it.done() for it in self.line)
        if (stats.global_in_use, stats.tools_waiting, early) != (1, self.length, 0):
            raise Broken(f"{early} of {self.length} were granted what somebody has: {stats}")

    def close(self) -> None:
        self.governor.close()
        self.held.release()
