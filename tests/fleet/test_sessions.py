"""What the processes of a fleet share: its limits, its line, its agents; and what each has alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from fleet.books import Books
from fleet.servers import Server
from fleet.workers import Worker
from threads import Crew, until

from governor import AcquireTimeout, ConcurrencyLimitExceeded, SemaphoreClosed
from governor.redis import RedisGovernor

pytestmark = pytest.mark.timeout(60)

Join = Callable[..., RedisGovernor]
Hire = Callable[..., Worker]

ONE = {"max_streams": 1, "max_tools": 1, "max_global": 1}


def limits(gov: Any) -> tuple[int, int, int]:
    stats = gov.stats()
    return stats.streams_max, stats.tools_max, stats.global_max


# ------------------------------------------------------------------------------ joining


def test_a_fleet_is_made_with_all_three_limits_or_not_at_all(join: Join, books: Books) -> None:
    for given in ({}, {"max_tools": 1}, {"max_tools": 1, "max_global": 1}):
        with pytest.raises(ValueError, match="max_streams"):
            join(lease=30, **given)
    assert books.state() == {}
    assert limits(join(max_streams=1, max_tools=2, max_global=3)) == (1, 2, 3)


def test_who_joins_gives_the_same_limits_or_none(join: Join) -> None:
    join(max_streams=1, max_tools=2, max_global=3, lease=20, max_queued=5)
    assert limits(join(max_tools=2, lease=20)) == (1, 2, 3)
    assert limits(join(lease=None)) == (1, 2, 3)
    assert limits(join(max_streams=1, max_tools=2, max_global=3, max_queued=5)) == (1, 2, 3)


@pytest.mark.parametrize("other", ["max_streams", "max_tools", "max_global", "lease", "max_queued"])
def test_who_joins_with_something_else_is_told_which(join: Join, books: Books, other: str) -> None:
    first = join(max_streams=2, max_tools=2, max_global=3, lease=20, max_queued=5)
    first.acquire_tool().release()
    with pytest.raises(ValueError, match=other):
        join(**{other: 9})
    assert limits(first) == (2, 2, 3)
    assert books.sessions == 1


@pytest.mark.parametrize(
    "bad", [{"max_tools": -1}, {"max_streams": -1}, {"max_global": -1}, {"lease": 0}, {"lease": -1}], ids=str
)
def test_a_bad_number_is_refused_by_name(join: Join, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        join(**{"max_streams": 1, "max_tools": 1, "max_global": 1, **bad})


def test_a_url_and_a_client_lead_to_the_same_fleet(join: Join, server: Server) -> None:
    client = server.client()
    one, other = join(client), join(server.url)
    with one.acquire_tool():
        assert other.stats().tools_in_use == 1
    one.close()
    assert client.ping()  # it is the caller's


def test_fleets_of_other_names_are_others(join: Join, fleet_name: str) -> None:
    for name in (f"{fleet_name}-b", f"{fleet_name}:state", f"{fleet_name}/ä%20"):
        with join(**ONE).acquire_tool(), join(name=name, **ONE).acquire_tool() as permit:
            assert permit.held


def test_a_server_on_a_unix_socket_will_do(join: Join) -> None:
    with Server(unix=True) as server:
        gov = join(server.url, **ONE)
        with gov.acquire_tool():
            assert gov.try_acquire_tool() is None
        gov.close()


@pytest.mark.parametrize("client", [{"protocol": 3}, {"protocol": 2}, {"decode_responses": True}], ids=str)
def test_any_sort_of_client_will_do(join: Join, hire: Hire, server: Server, client: dict[str, Any]) -> None:
    gov = join(server.client(**{"decode_responses": False, **client}), **ONE)
    other = hire(client=client, **ONE)
    gov.agent("coder", max_tools=1).acquire_tool().release()
    with gov.acquire_tool():
        other.stand("waiter")
        until(lambda: gov.stats().tools_waiting == 1, "one in line")
        assert str(os.getpid()) in str(gov.holders()[0].process)
    assert other.outcome("waiter") > 0
    other.release()


def test_a_new_fleet_settles_for_half_a_lease(join: Join, hire: Hire) -> None:
    gov = join(settling=True, **ONE, lease=2)
    assert gov.try_acquire_tool() is None  # as somebody may hold that place, whom the server forgot
    with pytest.raises(AcquireTimeout):
        gov.acquire_tool(timeout=0.01)
    other = hire(settling=True, lease=2)
    with gov.acquire_tool() as permit:
        assert permit.waited > 0.2
        assert other.try_acquire() is None
    assert other.acquire() > permit.fence
    other.release()


def test_who_waits_while_a_fleet_settles_goes_first_when_it_has(join: Join) -> None:
    gov = join(settling=True, **ONE, lease=1)
    request = gov.request_tool()
    early: list[Any] = []

    def over() -> bool:
        # As often as can be: one of these is the first call of all when the fleet has settled.
        if (permit := gov.try_acquire_tool()) is not None:
            early.append(permit)
        return bool(early) or request.done()

    until(over, "a permit")
    for permit in early:
        permit.release()
    request.result(5).release()
    assert early == []


# ---------------------------------------------------------------------- limits and the line


def test_limits_hold_over_all_processes(hire: Hire) -> None:
    one, other = hire(), hire()
    tools = [one.acquire("tool"), other.acquire("tool")]
    assert (one.try_acquire("tool"), other.try_acquire("tool")) == (None, None)
    stream = other.acquire("stream")
    assert (one.try_acquire("stream"), other.try_acquire("stream")) == (None, None)  # three in all
    assert len({*tools, stream}) == 3
    stats = one.stats()
    assert (stats.tools_in_use, stats.streams_in_use, stats.global_in_use) == (2, 1, 3)
    other.release(tools[1])
    assert one.acquire("stream") > stream
    one.release()
    other.release()
    assert one.stats().global_in_use == 0


def test_who_asked_first_goes_first_whichever_process_it_is_in(hire: Hire) -> None:
    workers = [hire(**ONE) for _ in range(3)]
    first = workers[0].acquire()
    expected = []
    for turn in range(9):
        who = workers[turn % 3]
        who.stand(str(turn), ("tool", "stream")[turn % 2])
        until(lambda: sum(in_line(workers[0])) == turn + 1, "one more in line")  # noqa: B023
        expected.append(turn)
    numbers = [first]
    workers[0].release()
    came = []
    for turn in expected:
        numbers.append(workers[turn % 3].outcome(str(turn)))
        came.append(turn)
        # All that came later are in line still, since there is one place.
        assert sum(in_line(workers[0])) == 8 - turn
        workers[turn % 3].release()
    assert came == expected
    assert numbers == sorted(set(numbers))


def in_line(worker: Worker) -> tuple[int, int]:
    stats = worker.stats()
    return stats.streams_waiting, stats.tools_waiting


def test_a_newcomer_takes_no_place_that_is_somebodys_turn(hire: Hire) -> None:
    one, other = hire(**ONE), hire(**ONE)
    one.acquire()
    other.stand("waiter")
    until(lambda: in_line(one) == (0, 1), "one in line")
    one.release()
    assert one.try_acquire() is None
    other.outcome("waiter")
    other.release()


def test_who_waits_for_a_full_kind_is_passed_by_the_other_kind(hire: Hire) -> None:
    one, other = hire(max_streams=1, max_tools=1, max_global=2), hire()
    one.acquire("tool")
    other.stand("tool")
    until(lambda: in_line(one) == (0, 1), "one in line")
    other.acquire("stream", timeout=5)
    one.release()
    other.outcome("tool")
    other.release()


def test_a_timeout_leaves_no_ghost_in_the_line(hire: Hire, books: Books) -> None:
    one, other = hire(**ONE), hire()
    one.acquire()
    with pytest.raises(AcquireTimeout, match="tools 1/1") as refusal:
        other.acquire(timeout=0.05)
    assert refusal.value.bound == 0.05
    assert in_line(one) == (0, 0)
    assert books.rows("line") == []
    one.release()
    other.acquire()
    other.release()
    until(books.empty, "nothing in the books")


def test_a_resize_holds_for_all_and_admits_in_line(hire: Hire) -> None:
    one, other, third = hire(**ONE), hire(), hire()
    one.acquire()
    other.stand("a")
    until(lambda: in_line(one) == (0, 1), "one in line")
    third.stand("b")
    until(lambda: in_line(one) == (0, 2), "two in line")
    one.resize(max_tools=2, max_global=2)
    other.outcome("a")
    assert third.waiting("b")
    third.resize(max_tools=3, max_global=3)
    third.outcome("b")
    assert [limits(it) for it in (one, other, third)] == [(1, 3, 3)] * 3
    other.resize(max_tools=1)
    stats = third.stats()
    assert (stats.tools_in_use, stats.tools_max) == (3, 1)  # it revokes nothing
    for worker in (one, other):
        worker.release()
        assert third.try_acquire() is None
    third.release()
    third.acquire()
    third.release()


def test_who_joins_after_a_resize_gives_the_limits_that_hold(join: Join) -> None:
    gov = join(**ONE)
    gov.resize(max_tools=5)
    assert limits(join(lease=None, max_tools=5)) == (1, 5, 1)
    with pytest.raises(ValueError, match="max_tools"):
        join(**ONE)


def test_a_layer_of_zero_is_paused_for_all(hire: Hire) -> None:
    one, other = hire(max_streams=1, max_tools=0, max_global=1), hire()
    assert other.try_acquire() is None
    other.stand("waiter")
    until(lambda: in_line(one) == (0, 1), "one in line")
    one.resize(max_tools=1)
    other.outcome("waiter")
    other.release()


def test_a_fence_is_greater_than_those_of_all_that_were_admitted_before(hire: Hire) -> None:
    one, other = hire(max_streams=1, max_tools=0, max_global=1), hire()
    one.stand("waiter")  # it asks first, and comes last
    until(lambda: in_line(other) == (0, 1), "one in line")
    fence = other.acquire("stream")
    other.release()
    other.resize(max_tools=1)
    assert one.outcome("waiter") > fence
    one.release()


def test_the_line_is_bounded_over_all_processes(hire: Hire) -> None:
    one, other = hire(**ONE, max_queued=2), hire()
    one.acquire()
    one.stand("a")
    until(lambda: in_line(one) == (0, 1), "one in line")
    other.stand("b")
    until(lambda: in_line(one) == (0, 2), "two in line")
    for worker in (one, other):
        with pytest.raises(ConcurrencyLimitExceeded, match="max_queued=2"):
            worker.acquire()
    other.stand("stream", "stream")  # the bound is for each kind
    until(lambda: in_line(one) == (1, 2), "three in line")
    one.release()
    one.outcome("a")
    one.release()
    other.outcome("b")
    other.release()
    other.outcome("stream")
    other.release()


# --------------------------------------------------------------------------------- agents


def test_an_agent_is_one_over_all_processes(hire: Hire) -> None:
    one, other = hire(max_streams=3, max_tools=3, max_global=3), hire()
    for worker in (one, other):
        worker.agent("coder", max_tools=1)
    one.acquire("tool", "coder")
    assert other.try_acquire("tool", "coder") is None
    other.stand("agent", "tool", "coder")
    until(lambda: in_line(one) == (0, 1), "one in line")
    other.acquire("tool")  # who waits for the agent's own limit keeps nobody else waiting
    one.release()
    other.outcome("agent")
    assert one.stats().tools_in_use == 2
    other.release()


def test_an_agent_that_has_other_limits_elsewhere_is_refused(hire: Hire) -> None:
    one, other, third = hire(), hire(), hire()
    one.agent("coder", max_tools=1)
    one.acquire("tool", "coder")
    with pytest.raises(ValueError, match=r"coder.*max_tools|max_tools.*coder"):
        other.agent("coder", max_tools=2)
        other.acquire("tool", "coder")
    third.agent("coder", max_tools=1)
    assert third.try_acquire("tool", "coder") is None
    one.release()
    other.acquire("tool", "coder")  # nobody uses the other one any more
    other.release()


def test_agents_of_agents_share_what_is_above_them(hire: Hire) -> None:
    one, other = hire(max_streams=4, max_tools=4, max_global=4), hire()
    for worker in (one, other):
        worker.agent("coder", max_tools=2)
        worker.agent("tester", max_tools=1, of="coder")
    one.acquire("tool", "tester")
    assert other.try_acquire("tool", "tester") is None
    other.acquire("tool", "coder")
    assert one.try_acquire("tool", "coder") is None
    one.acquire("tool")
    stats = one.stats()
    assert (stats.tools_in_use, stats.tools_max) == (3, 4)
    one.release()
    other.release()


# -------------------------------------------------------------------------------- looking


def test_holders_are_told_with_their_process(hire: Hire) -> None:
    one, other = hire(), hire()
    one.agent("coder", max_tools=1)
    one.acquire("tool", "coder")
    other.block("b", "stream")
    for worker in (one, other):
        first, second = worker.holders()
        assert (first.kind, second.kind) == ("tool", "stream")
        assert [it.process.rpartition(":")[2] for it in (first, second)] == [str(one.pid), str(other.pid)]
        assert first.seconds >= second.seconds >= 0
        assert "coder" in str(first.governor)
    other.leave()
    other.outcome("b")
    one.release()
    assert other.holders() == []


def test_a_process_hears_of_its_own_permits_only(hire: Hire) -> None:
    one, other = hire(**ONE), hire()
    for worker in (one, other):
        worker.listen()
    one.acquire()
    other.stand("waiter")
    until(lambda: in_line(one) == (0, 1), "one in line")
    one.release()
    other.outcome("waiter")
    other.release()
    until(lambda: len(other.heard()) >= 3, "three events")
    assert one.heard() == ["acquired", "released"]
    assert other.heard() == ["queued", "acquired", "released"]


# ------------------------------------------------------------------------------- requests


def test_a_request_stands_in_the_one_line(hire: Hire) -> None:
    one, other = hire(**ONE), hire()
    one.acquire()
    other.request("a")
    one.request("b")
    until(lambda: in_line(one) == (0, 2), "two in line")
    one.release()
    first = other.outcome("a")
    assert one.waiting("b")
    other.release()
    assert one.outcome("b") > first
    one.release()


def test_a_request_that_is_cancelled_leaves_the_line(hire: Hire, books: Books) -> None:
    one, other = hire(**ONE), hire()
    one.acquire()
    other.request("a")
    one.request("b")
    until(lambda: in_line(one) == (0, 2), "two in line")
    assert other.cancel("a")
    until(lambda: in_line(one) == (0, 1), "one in line")
    one.release()
    one.outcome("b")
    assert not one.cancel("b")  # it has its permit
    one.release()
    until(books.empty, "nothing in the books")


# ---------------------------------------------------------------------------------- the end


def test_closing_in_one_process_leaves_the_others_alone(hire: Hire) -> None:
    one, other = hire(**ONE), hire()
    fence = one.acquire()
    one.stand("mine")
    other.stand("theirs")
    until(lambda: in_line(other) == (0, 2), "two in line")
    one.close()
    with pytest.raises(SemaphoreClosed):
        one.outcome("mine")
    with pytest.raises(SemaphoreClosed):
        one.acquire()
    assert one.try_acquire() is None
    until(lambda: in_line(other) == (0, 1), "the other's waiter alone")
    assert other.waiting("theirs")
    assert other.stats().tools_in_use == 1  # what is held stays valid
    one.release(fence)
    other.outcome("theirs")
    other.release()


def test_the_session_of_a_closed_process_ends_with_its_last_permit(hire: Hire, books: Books) -> None:
    one, other = hire(), hire()
    fence = one.acquire()
    other.acquire()
    other.release()
    one.close()
    assert books.sessions == 2
    one.release(fence)
    until(lambda: books.sessions == 1, "the end of its session")
    assert other.stats().global_in_use == 0


def test_draining_waits_for_what_this_process_holds(hire: Hire) -> None:
    one, other = hire(), hire()
    other.acquire()
    fence = one.acquire()
    assert one.drain(0.05) is False
    one.release(fence)
    assert one.drain(5) is True
    assert other.stats().tools_in_use == 1
    other.release()


def test_a_process_that_ends_without_a_word_is_forgotten_within_its_lease(hire: Hire, books: Books) -> None:
    one, other = hire(**ONE, lease=1), hire()
    other.ready()
    one.acquire()
    one.kill()
    other.stand("waiter")
    other.outcome("waiter")
    assert books.sessions == 1
    other.release()
    until(books.empty, "nothing in the books")


# ------------------------------------------------------------------------------ odd numbers


@pytest.mark.parametrize("huge", [2**53 + 1, 2**63 - 1, 10**310])
def test_a_huge_limit_is_one_that_nobody_meets(huge: int, join: Join) -> None:
    gov = join(max_streams=huge, max_tools=huge, max_global=huge)
    agent = gov.agent("coder", max_tools=huge)
    with agent.acquire_tool(), agent.acquire_tool():
        assert agent.stats().tools_in_use == 2
    gov.resize(max_tools=huge, max_streams=huge)
    agent.resize(max_tools=huge)
    with agent.acquire_tool(), join().acquire_stream():
        assert gov.stats().global_in_use == 2


def test_a_lease_is_kept_to_the_millisecond(join: Join) -> None:
    join(**ONE, lease=10 / 3)
    join(**ONE, lease=10 / 3).acquire_tool().release()


def test_a_bad_url_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="client_or_url must be a redis"):
        RedisGovernor("localhost", "shop")


# ------------------------------------------------------------------------------ what nobody waits for


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_dropped_permit_serves_a_request_at_once(join: Join) -> None:
    gov = join(**ONE, lease=60)
    permit = gov.acquire_tool()
    request = gov.request_tool()
    del permit
    request.result(10).release()  # which no renewal comes in time for


def test_numbers_asked_for_by_another_thread_do_not_keep_a_request_waiting(join: Join) -> None:
    gov = join(**ONE, lease=60)
    for _ in range(20):
        permit = gov.acquire_tool()
        request = gov.request_tool()
        with Crew() as crew:
            crew.start(gov.stats)
            crew.start(gov.holders)
            permit.release()
        request.result(10).release()


def test_who_only_looks_on_many_threads_disturbs_nobody(server: Server, fleet_name: str, join: Join) -> None:
    join(**ONE)
    for _ in range(10):
        gov = join(**ONE)
        with Crew() as crew:
            for _ in range(3):
                crew.start(lambda gov=gov: [gov.stats() for _ in range(20)])
            crew.start(lambda gov=gov: gov.acquire_tool().release())
        gov.close()


def test_what_is_registered_by_no_session_is_nobodys(join: Join, books: Books) -> None:
    gov = join(**ONE)
    gov.acquire_tool().release()
    wire = gov._session.wire
    wire.call("leave")
    assert wire.call("register", 4711, "tool/", 1) == [b"lapsed"]
    assert books.empty()
