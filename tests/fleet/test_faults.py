"""What goes wrong between the processes and the server, or in it: no limit is passed, nothing is lost.

Each test ends with empty books, so that nothing has leaked either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from operator import gt
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from fleet.books import Books
from fleet.history import Verdict, check
from fleet.servers import Proxy, Server, redis
from fleet.workers import Worker
from redis.backoff import NoBackoff
from redis.retry import Retry
from threads import Crew, until

from governor import AcquireTimeout, ConcurrencyError
from governor.redis import RedisGovernor

pytestmark = pytest.mark.timeout(60)

Join = Callable[..., RedisGovernor]
Hire = Callable[..., Worker]

LIMITS = {"max_streams": 2, "max_tools": 3, "max_global": 4}
LAYERS = {"": 4, "stream/": 2, "tool/": 3}
ONE = {"max_streams": 1, "max_tools": 1, "max_global": 1}
LONG = 60.0  # a lease that no test outlives, so that no renewal mends what is to be seen

UNREACHABLE = (redis.ConnectionError, redis.TimeoutError)


def once(url: str, **options: Any) -> Any:
    """A client that tries once."""
    retry = Retry(NoBackoff(), 0)
    return redis.Redis.from_url(url, retry=retry, **{"socket_timeout": 5, **options})


def again(url: str, **options: Any) -> Any:
    """A client that tries three times more."""
    retry = Retry(NoBackoff(), 3)
    return redis.Redis.from_url(url, retry=retry, **{"socket_timeout": 5, **options})


class Traffic:
    """Workers that acquire and give back all the time, and what they have written down."""

    def __init__(self, hire: Hire, directory: Path) -> None:
        self._hire, self._directory = hire, directory
        self._numbers = count()
        self.workers: list[Worker] = []

    def add(self, number: int, where: str | None = None, **options: Any) -> list[Worker]:
        added = [self._hire(where, **{**LIMITS, **options}) for _ in range(number)]
        for worker in added:
            path = self._directory / str(next(self._numbers))
            worker.begin(str(path), 4)
        self.workers += added
        return added

    def goes_on(self, patience: float = 15.0) -> None:
        """Wait until each thread of each worker has had a turn that began after this."""
        before = self.turns()
        until(lambda: all(map(gt, self.turns(), before)), "one more turn of all", patience=patience)
        before = self.turns()  # what was under way at the beginning may have been one
        until(lambda: all(map(gt, self.turns(), before)), "one more turn of all", patience=patience)

    def turns(self) -> list[int]:
        return [turns for worker in self.workers for turns in worker.turns()]

    def end(self, layers: dict[str, int] = LAYERS) -> Verdict:
        """End it, and check that no limit was passed."""
        for worker in self.workers:
            worker.wind_down()
        for worker in self.workers:
            worker.end()
        verdict = check(self._directory.iterdir(), layers)
        assert verdict.violations == []
        assert verdict.unfinished == []
        return verdict


@pytest.fixture
def traffic(hire: Hire, tmp_path: Path) -> Traffic:
    return Traffic(hire, tmp_path)


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that a test may harm, and that keeps its data."""
    with Server(durable=True) as server:
        yield server


# ---------------------------------------------------------------------- a server that is slow


def test_a_pause_of_the_server_costs_time_and_nothing_else(
    traffic: Traffic, server: Server, books: Books
) -> None:
    traffic.add(3, lease=6)
    traffic.goes_on()
    books.client.client_pause(700, all=True)
    traffic.goes_on()
    assert traffic.end().lost == 0
    until(books.empty, "nothing in the books")


@pytest.mark.parametrize("patient", [True, False], ids=["patient", "impatient"])
def test_a_pause_longer_than_a_lease_lets_nobody_pass_a_limit(
    traffic: Traffic, server: Server, books: Books, patient: bool
) -> None:
    # The impatient have given up before what they asked for is carried out: nobody is there for it.
    traffic.add(3, lease=1, client={"socket_timeout": 10 if patient else 0.2})
    traffic.goes_on()
    books.client.client_pause(2500, all=True)
    traffic.goes_on()
    traffic.end()
    until(books.empty, "nothing in the books")


# --------------------------------------------------------------------------- connections


@pytest.mark.parametrize("which", ["normal", "pubsub"])
def test_connections_that_are_killed_all_the_time_cost_nothing(
    traffic: Traffic, books: Books, which: str
) -> None:
    traffic.add(3, lease=6)
    traffic.goes_on()
    for _ in range(25):
        books.client.client_kill_filter(_type=which, skipme=True)
        sleep(0.05)
    traffic.goes_on()
    assert traffic.end().lost == 0
    until(books.empty, "nothing in the books")


FAULTS: dict[str, Callable[[Proxy], object]] = {
    "cut": lambda proxy: proxy.cut(),
    "to_server": lambda proxy: proxy.lose(to_server=True),
    "to_client": lambda proxy: proxy.lose(to_client=True),
    "refused": lambda proxy: (setattr(proxy, "refusing", True), proxy.cut()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_who_is_cut_off_for_less_than_a_lease_loses_nothing(
    traffic: Traffic, proxy: Proxy, books: Books, fault: str
) -> None:
    traffic.add(2, proxy.url, lease=6, client={"socket_timeout": 0.3})
    traffic.add(1)
    traffic.goes_on()
    FAULTS[fault](proxy)
    sleep(0.8)
    proxy.restore()
    traffic.goes_on()
    assert traffic.end().lost == 0
    until(books.empty, "nothing in the books")


@pytest.mark.parametrize("fault", ["to_server", "to_client", "refused"])
def test_who_is_cut_off_for_longer_than_a_lease_leaves_its_places_to_the_others(
    traffic: Traffic, hire: Hire, proxy: Proxy, books: Books, fault: str
) -> None:
    cut_off = hire(proxy.url, **LIMITS, lease=1, client={"socket_timeout": 0.2})
    cut_off.listen()
    fence = cut_off.acquire("tool")
    traffic.add(2, proxy.url, lease=1, client={"socket_timeout": 0.2})
    traffic.add(1, lease=1)
    traffic.goes_on()
    FAULTS[fault](proxy)
    until(lambda: cut_off.lost() == [fence], "its loss")
    until(lambda: books.sessions == 1, "the end of the sessions of those who are cut off")
    (alone,) = traffic.workers[2:]
    before = sum(alone.turns())
    until(lambda: sum(alone.turns()) > before + 10, "turns of who is left")
    proxy.restore()
    until(lambda: cut_off.heard() == ["acquired", "lost"], "the event")
    traffic.goes_on()
    cut_off.release()
    traffic.end()
    until(books.empty, "nothing in the books")


def test_who_gets_its_answers_later_than_its_lease_ends_has_lost_what_they_granted(
    traffic: Traffic, proxy: Proxy, books: Books
) -> None:
    traffic.add(2, proxy.url, lease=1, client={"socket_timeout": 10})
    traffic.add(1, lease=1)
    traffic.goes_on()
    for _ in range(4):
        proxy.hold_back()
        until(lambda: books.sessions == 1, "the end of the sessions of those who wait for answers")
        proxy.restore()
        traffic.goes_on()
    traffic.end()
    until(books.empty, "nothing in the books")


def test_a_connection_that_was_cut_meanwhile_is_no_error(join: Join, proxy: Proxy, books: Books) -> None:
    gov = join(once(proxy.url), **LIMITS, lease=LONG)
    for _ in range(5):
        gov.acquire_tool().release()
        proxy.cut()
    until(books.empty, "nothing in the books")


def test_a_server_that_cannot_be_reached_is_an_error_and_never_a_permit(
    join: Join, proxy: Proxy, books: Books
) -> None:
    gov = join(once(proxy.url, socket_timeout=0.5), **LIMITS, lease=2)
    permit = gov.acquire_tool()
    proxy.refusing = True
    proxy.cut()
    for attempt in (gov.acquire_tool, gov.try_acquire_tool, gov.acquire_stream, gov.stats, gov.holders):
        with pytest.raises(UNREACHABLE):
            attempt()
    request = gov.request_tool()
    with pytest.raises(UNREACHABLE):
        request.result(10)
    permit.release()  # raises nothing
    assert not permit.held
    proxy.restore()
    until(books.empty, "what was given back meanwhile")
    with gov.acquire_tool(timeout=5):
        assert gov.stats().tools_in_use == 1


def test_who_cannot_be_reached_at_first_is_not_joined(join: Join, server: Server) -> None:
    with Proxy(server.address) as proxy:
        proxy.refusing = True
        with pytest.raises(UNREACHABLE):
            join(once(proxy.url), **LIMITS)


# -------------------------------------------------------------------------- lost answers


WAYS: dict[str, Callable[[RedisGovernor], Any]] = {
    "acquire": lambda gov: gov.acquire_tool(),
    "try": lambda gov: gov.try_acquire_tool(),
    "request": lambda gov: gov.request_tool().result(5),
    "agent": lambda gov: gov.agent("coder", max_tools=1).acquire_tool(),
}


@pytest.mark.parametrize("silently", [False, True], ids=["cut", "silent"])
@pytest.mark.parametrize("way", WAYS)
def test_a_permit_whose_answer_was_lost_is_granted_once(
    join: Join, proxy: Proxy, books: Books, way: str, silently: bool
) -> None:
    gov = join(again(proxy.url, socket_timeout=0.5), **LIMITS, lease=LONG)
    gov.acquire_tool().release()
    proxy.lose_answers(silently=silently)
    permit = WAYS[way](gov)
    assert proxy.lost_answers == 1
    assert len(books.rows("held")) == len(books.rows("ids")) == 1
    assert gov.stats().tools_in_use == 1
    permit.release()
    until(books.empty, "nothing in the books")


@pytest.mark.parametrize("way", WAYS)
def test_a_permit_that_nobody_heard_of_is_given_back(
    join: Join, proxy: Proxy, books: Books, way: str
) -> None:
    gov = join(once(proxy.url), **LIMITS, lease=1.5)
    gov.acquire_tool().release()
    proxy.lose_answers(1000)
    with pytest.raises(UNREACHABLE):
        WAYS[way](gov)
    assert proxy.lost_answers
    proxy.restore()
    until(books.empty, "its return")
    assert gov.stats().tools_in_use == 0
    gov.acquire_tool(timeout=5).release()


def test_a_release_whose_answer_was_lost_gives_back_once(join: Join, proxy: Proxy, books: Books) -> None:
    gov = join(again(proxy.url), **LIMITS, lease=LONG)
    first, second = gov.acquire_tool(), gov.acquire_tool()
    proxy.lose_answers()
    first.release()
    until(lambda: proxy.lost_answers == 1, "the loss")
    until(lambda: len(books.rows("held")) == 1, "the other one alone")
    assert gov.stats().tools_in_use == 1
    assert second.held
    second.release()
    until(books.empty, "nothing in the books")


def test_a_waiter_whose_answer_was_lost_stands_in_line_once(join: Join, proxy: Proxy, books: Books) -> None:
    gov, other = join(again(proxy.url), **ONE, lease=LONG), join()
    permit = other.acquire_tool()
    gov.stats()
    with Crew() as crew:
        proxy.lose_answers()
        crew.start(lambda: gov.acquire_tool().release())
        until(lambda: proxy.lost_answers == 1, "the loss")
        until(lambda: other.stats().tools_waiting == 1, "one in line")
        assert len(books.rows("line")) == 1
        permit.release()
    until(books.empty, "nothing in the books")


def test_a_waiter_that_times_out_leaves_even_if_no_answer_says_so(
    join: Join, proxy: Proxy, books: Books
) -> None:
    gov, other = join(again(proxy.url), **ONE, lease=LONG), join()
    permit = other.acquire_tool()
    with Crew() as crew:

        def leave() -> None:
            with pytest.raises(AcquireTimeout):
                gov.acquire_tool(timeout=0.5)

        crew.start(leave)
        until(lambda: other.stats().tools_waiting == 1, "one in line")
        proxy.lose_answers()
    assert proxy.lost_answers == 1
    assert books.rows("line") == []
    permit.release()
    until(books.empty, "nothing in the books")


def test_a_resize_whose_answer_was_lost_is_done(join: Join, proxy: Proxy) -> None:
    gov, other = join(again(proxy.url), **ONE, lease=LONG), join()
    gov.stats()
    proxy.lose_answers()
    gov.resize(max_tools=4)
    assert proxy.lost_answers == 1
    assert other.stats().tools_max == 4


def test_answers_that_are_lost_all_the_time_cost_nothing(
    traffic: Traffic, proxy: Proxy, books: Books
) -> None:
    traffic.add(2, proxy.url, lease=6)
    traffic.add(1)
    traffic.goes_on()
    for number in range(60):
        before = proxy.lost_answers
        proxy.lose_answers()
        until(lambda: proxy.lost_answers > before, f"loss {number}")  # noqa: B023
    proxy.restore()
    traffic.goes_on()
    assert traffic.end().lost == 0
    until(books.empty, "nothing in the books")


# -------------------------------------------------------------------------- lost messages


def test_who_is_not_told_of_its_turn_finds_out_at_the_next_renewal(
    join: Join, proxy: Proxy, books: Books
) -> None:
    gov, other = join(proxy.url, **ONE, lease=2), join()
    gov.acquire_tool().release()
    until(lambda: books.listeners == 1, "the one who listens")
    for _ in range(3):
        permit = other.acquire_tool(timeout=5)
        with Crew() as crew:
            crew.start(lambda: gov.acquire_tool(timeout=8).release())
            until(lambda: other.stats().tools_waiting == 1, "one in line")
            proxy.lose_messages()
            permit.release()
            until(lambda: proxy.lost_messages, "the loss")
        proxy.restore()
    until(books.empty, "nothing in the books")


def test_ten_times_out_of_ten_a_lost_subscription_keeps_nobody_waiting(
    traffic: Traffic, proxy: Proxy, books: Books
) -> None:
    traffic.add(2, proxy.url, lease=1.5)
    traffic.add(1)
    traffic.goes_on()
    proxy.lose_messages()
    until(lambda: proxy.lost_messages >= 10, "ten losses", patience=20)
    proxy.restore()
    traffic.goes_on()
    assert traffic.end().lost == 0
    until(books.empty, "nothing in the books")


# ----------------------------------------------------------------------------- lost scripts


def test_a_script_that_is_forgotten_all_the_time_is_sent_again(traffic: Traffic, books: Books) -> None:
    traffic.add(3, lease=6)
    traffic.goes_on()
    for _ in range(100):
        books.client.script_flush()
        sleep(0.01)
    traffic.goes_on()
    assert traffic.end().lost == 0
    until(books.empty, "nothing in the books")


# ------------------------------------------------------------------------------ lost state


def test_holders_register_again_when_all_was_forgotten(hire: Hire, books: Books) -> None:
    one, other, third = (hire(**LIMITS, lease=2, settling=True) for _ in range(3))
    one.stand("a")
    other.stand("b")
    fences = {one.outcome("a"), other.outcome("b")}
    other.stand("stream", "stream")
    other.outcome("stream")
    third.resize(max_tools=2)
    before = books.ends()
    until(
        lambda: all(end > before[it] for it, end in books.ends().items()), "a renewal of each"
    )  # so all know
    third.stand("waiter")
    until(lambda: third.stats().tools_waiting == 1, "one in line")
    books.client.flushall()
    # One place of three is free, but not for a newcomer.
    assert third.try_acquire() is None
    until(lambda: [row[:1] for row in books.rows("held")] == ["s", "t", "t"], "all of them in the books")
    until(lambda: len(books.rows("line")) == 1, "its return to the line")
    stats = third.stats()
    assert (stats.tools_in_use, stats.tools_max, stats.global_in_use, stats.global_max) == (2, 2, 3, 4)
    until(lambda: third.try_acquire("stream") is not None, "the end of the settling")
    assert third.waiting("waiter")  # its layer is full
    for worker in (one, other):
        assert worker.lost() == []
    one.release()
    assert third.outcome("waiter") > max(fences)
    for worker in (one, other, third):
        worker.release()
    until(books.empty, "nothing in the books")


def test_a_state_that_is_lost_all_the_time_lets_nobody_pass_a_limit(traffic: Traffic, books: Books) -> None:
    traffic.add(3, lease=1, settling=True)
    traffic.goes_on()
    for _ in range(5):
        books.client.flushall()
        traffic.goes_on()
    traffic.end()
    until(books.empty, "nothing in the books")


def test_numbers_grow_even_when_all_was_forgotten(hire: Hire, books: Books) -> None:
    worker = hire(**LIMITS, lease=1)
    fences = []
    for _ in range(3):
        fences.append(worker.acquire(timeout=10))
        worker.release()
        books.client.flushall()
    assert fences == sorted(set(fences))
    until(lambda: worker.stats().tools_max == 3, "the limits it knows")


@pytest.mark.parametrize("data", [True, False], ids=["with data", "without data"])
def test_a_server_that_crashes_and_returns_lets_nobody_pass_a_limit(
    traffic: Traffic, own: Server, fleet_name: str, data: bool
) -> None:
    traffic.add(3, own.url, lease=3, settling=True)
    traffic.goes_on()
    for _ in range(2):
        own.kill()
        if not data:
            own.forget()
        sleep(0.3)
        own.start()
        traffic.goes_on()
    traffic.end()
    until(Books(own.client(), fleet_name).empty, "nothing in the books")


def test_what_is_held_is_still_held_when_the_server_returns_with_its_data(
    hire: Hire, own: Server, fleet_name: str
) -> None:
    books = Books(own.client(), fleet_name)
    one, other = (hire(own.url, **ONE, lease=5) for _ in range(2))
    fence = one.acquire()
    other.stand("waiter")
    until(lambda: len(books.rows("line")) == 1, "one in line")
    own.restart(data=True)
    assert (len(books.rows("held")), len(books.rows("line"))) == (1, 1)
    assert other.try_acquire() is None
    one.check(fence)
    one.release()
    assert other.outcome("waiter") > fence
    other.release()
    until(books.empty, "nothing in the books")


# -------------------------------------------------------------------------------- failover


def test_a_replica_that_was_promoted_goes_on_with_the_books(hire: Hire, fleet_name: str) -> None:
    with Server() as primary, Server(replica_of=primary) as replica, Proxy(primary.address) as proxy:
        one, other = (hire(proxy.url, **ONE, lease=5) for _ in range(2))
        fence = one.acquire()
        other.stand("waiter")
        until(lambda: other.stats().tools_waiting == 1, "one in line")
        books = Books(replica.client(), fleet_name)
        until(lambda: len(books.rows("held")) + len(books.rows("line")) == 2, "the books at the replica")

        primary.kill()
        proxy.target = replica.address
        proxy.cut()
        # It cannot be written to yet.
        with suppress(redis.RedisError):
            assert one.try_acquire() is None
        one.release()  # raises nothing
        assert len(books.rows("held")) == 1
        books.client.replicaof("NO", "ONE")
        assert other.outcome("waiter") > fence
        other.release()
        until(books.empty, "nothing in the books")


def test_traffic_goes_on_at_the_replica(traffic: Traffic, fleet_name: str) -> None:
    with Server() as primary, Server(replica_of=primary) as replica, Proxy(primary.address) as proxy:
        traffic.add(3, proxy.url, lease=3)
        traffic.goes_on()
        admin, books = primary.client(), Books(replica.client(), fleet_name)
        # So that no write is lost, which would be the server's fault: see the protocol.
        admin.client_pause(10000, all=False)
        assert admin.wait(1, 5000) == 1
        primary.kill()
        books.client.replicaof("NO", "ONE")
        proxy.target = replica.address
        proxy.cut()
        traffic.goes_on()
        traffic.end()
        until(books.empty, "nothing in the books")


# ---------------------------------------------------------------------------------- memory


def test_without_memory_there_is_an_error_and_what_is_held_can_be_given_back(
    hire: Hire, own: Server, fleet_name: str
) -> None:
    admin = own.client()
    books = Books(admin, fleet_name)
    one, other = (hire(own.url, **{**ONE, "max_streams": 2, "max_global": 2}, lease=1) for _ in range(2))
    fence = one.acquire()
    other.stand("waiter")
    until(lambda: len(books.rows("line")) == 1, "one in line")
    admin.config_set("maxmemory-policy", "noeviction")
    admin.config_set("maxmemory", 1)
    for worker in (one, other):
        for attempt in (worker.acquire, worker.try_acquire):
            with pytest.raises(redis.exceptions.ResponseError, match=r"OOM|maxmemory"):
                attempt("stream")
    # For longer than a lease: it is renewed all the same.
    begin, seen = monotonic(), set(books.rows("held"))
    while monotonic() < begin + 2:
        seen |= set(books.rows("held"))
        sleep(0.05)
    assert len(seen) == 1
    assert one.lost() == other.lost() == []
    one.check(fence)
    one.release()
    assert other.outcome("waiter") > fence  # handed on, still without memory
    other.release()
    until(books.empty, "nothing in the books")
    admin.config_set("maxmemory", 0)
    one.acquire("stream")
    one.release()
    until(books.empty, "nothing in the books")


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "allkeys-lfu"])
def test_a_server_that_may_evict_the_books_is_refused(join: Join, policy: str) -> None:
    with Server(maxmemory="64mb", maxmemory_policy=policy) as server:
        with pytest.raises(ConcurrencyError, match=policy):
            join(server.url, **LIMITS)
        assert not server.client().keys("*:held")


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru", "volatile-ttl"])
def test_a_server_that_evicts_only_what_may_expire_will_do(join: Join, policy: str) -> None:
    with Server(maxmemory="64mb", maxmemory_policy=policy) as server:
        gov = join(server.url, **LIMITS)
        gov.acquire_tool().release()
        gov.close()


# ----------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize("hours", [1, -1], ids=["back", "ahead"])
def test_a_clock_that_jumps_ends_no_lease_and_makes_none_longer(hire: Hire, books: Books, hours: int) -> None:
    one, other, third = (hire(**ONE, lease=1) for _ in range(3))
    fence = one.acquire()
    other.stand("waiter")
    third.ready()
    until(lambda: third.stats().tools_waiting == 1, "one in line")
    # The server's time and this offset make up the fleet's: to change either comes to the same.
    books.client.hincrby(books.key("state"), "offset", -hours * 3_600_000)
    for _ in range(20):
        third.stats()
    one.check(fence)
    assert other.waiting("waiter")
    begin = monotonic()
    while monotonic() < begin + 1.5:  # longer than the lease
        assert third.stats().tools_in_use == 1
        sleep(0.05)
    assert one.lost() == []
    one.kill()  # and a lease still ends
    other.outcome("waiter")
    other.release()
    until(books.empty, "nothing in the books")
