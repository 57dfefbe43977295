"""The governor: its making, its agents, its numbers, its end."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import re
import sys
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
from governors import books, expect, give_back, limits, race, take, waiting
from threads import Crew, until

from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    GovernorStats,
    SemaphoreClosed,
    _tree,
)

pytestmark = pytest.mark.every_governor

INF, NAN = float("inf"), float("nan")
KINDS = ["stream", "tool"]

NO_COUNTS = [(-1, ValueError), *((it, TypeError) for it in (True, 1.0, NAN, INF, "1", [], 1j))]
NO_TIMEOUTS = [
    *((it, ValueError) for it in (-1, -0.001, NAN, -INF)),
    *((it, TypeError) for it in (True, "1", [], 1j)),
]
NO_NAMES = [("", ValueError), (5, TypeError), (b"crew", TypeError)]

Make = Callable[..., ConcurrencyGovernor]


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=2, max_tools=3, max_global=4)


@pytest.fixture
def narrow() -> ConcurrencyGovernor:
    """One operation at a time."""
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=1)


OPEN = threading.Event()
OPEN.set()


def line_up(
    crew: Crew,
    gov: ConcurrencyGovernor,
    kind: str,
    served: list[str],
    label: str,
    gate: threading.Event = OPEN,
) -> None:
    """Put one more in line. Once served, it notes its label, and gives back when the gate is open."""

    def work() -> None:
        with gov.acquire(kind):
            served.append(label)
            gate.wait()

    before = waiting(gov)
    crew.start(work, name=label)
    until(lambda: waiting(gov) == before + 1, f"{label} in line")


# ------------------------------------------------------------------------------------- construction


def test_a_new_governor_is_open_and_all_its_places_are_free() -> None:
    gov = ConcurrencyGovernor(1, 2, 3)
    assert limits(gov) == (1, 2, 3)
    assert books(gov) == (0, 0, 0)
    assert (gov.closed, gov.name) == (False, None)
    assert ConcurrencyGovernor(0, 0, 0, max_queued=0, name="crew").name == "crew"


# How a value gets to each argument that takes a count, where there is a governor and where not yet.
COUNTS: dict[str, Callable[[ConcurrencyGovernor, Any], object]] = {
    "max_streams": lambda gov, bad: ConcurrencyGovernor(bad, 1, 1),
    "max_tools": lambda gov, bad: ConcurrencyGovernor(1, bad, 1),
    "max_global": lambda gov, bad: ConcurrencyGovernor(1, 1, bad),
    "max_queued": lambda gov, bad: ConcurrencyGovernor(1, 1, 1, max_queued=bad),
    "shared's max_streams": lambda gov, bad: ConcurrencyGovernor.shared("none yet", max_streams=bad),
    "shared's max_tools": lambda gov, bad: ConcurrencyGovernor.shared("none yet", max_tools=bad),
    "shared's max_global": lambda gov, bad: ConcurrencyGovernor.shared("none yet", max_global=bad),
    "agent's max_streams": lambda gov, bad: gov.agent("coder", max_tools=1, max_streams=bad),
    "agent's max_tools": lambda gov, bad: gov.agent("coder", max_tools=bad),
    "resize's max_streams": lambda gov, bad: gov.resize(max_streams=bad, max_tools=1, max_global=1),
    "resize's max_tools": lambda gov, bad: gov.resize(max_streams=1, max_tools=bad, max_global=1),
    "resize's max_global": lambda gov, bad: gov.resize(max_streams=1, max_tools=1, max_global=bad),
}


@pytest.mark.in_process_only
@pytest.mark.parametrize(("bad", "error"), NO_COUNTS)
@pytest.mark.parametrize("argument", COUNTS)
def test_a_bad_limit_is_refused_by_name_and_changes_nothing(
    gov: ConcurrencyGovernor, argument: str, bad: object, error: type[Exception]
) -> None:
    saying = re.escape(f"{argument.split()[-1]} must be an integer >= 0, not {bad!r}")
    with pytest.raises(error, match=saying):
        COUNTS[argument](gov, bad)
    assert limits(gov) == (2, 3, 4)


@pytest.mark.in_process_only
@pytest.mark.parametrize("argument", ["max_streams", "max_tools", "max_global", "agent's max_tools"])
def test_a_limit_that_must_be_given_cannot_be_none(gov: ConcurrencyGovernor, argument: str) -> None:
    with pytest.raises(TypeError, match="must be an integer >= 0, not None"):
        COUNTS[argument](gov, None)


WAITS: dict[str, Callable[[ConcurrencyGovernor, Any], object]] = {
    "acquire_stream": lambda gov, timeout: gov.acquire_stream(timeout),
    "acquire_tool": lambda gov, timeout: gov.acquire_tool(timeout=timeout),
    "acquire": lambda gov, timeout: gov.acquire("tool", timeout),
    "drain": lambda gov, timeout: gov.drain(timeout),
}


@pytest.mark.parametrize(("bad", "error"), NO_TIMEOUTS)
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_bad_timeout_is_refused_and_changes_nothing(
    gov: ConcurrencyGovernor, wait: Callable[..., object], bad: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"timeout must be a number of seconds >= 0 or None, not "):
        wait(gov, bad)
    assert (books(gov), gov.closed) == ((0, 0, 0), False)


@pytest.mark.in_process_only
@pytest.mark.parametrize(("bad", "error"), NO_NAMES)
def test_a_bad_name_is_refused(gov: ConcurrencyGovernor, bad: Any, error: type[Exception]) -> None:
    for use in (
        lambda: ConcurrencyGovernor(1, 1, 1, name=bad),
        lambda: ConcurrencyGovernor.shared(bad),
        lambda: gov.agent(bad, max_tools=1),
    ):
        with pytest.raises(error, match="name must be a string that is not empty"):
            use()


# ------------------------------------------------------------------------------------------- permits


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_three_names_for_one_thing(narrow: ConcurrencyGovernor, kind: str) -> None:
    def named(way: str) -> Callable[..., ConcurrencyPermit]:
        return getattr(narrow, f"{way}_{kind}")

    for acquire in (named("acquire"), lambda: narrow.acquire(kind)):
        with acquire() as permit:
            assert permit.kind == kind
            assert named("try_acquire")() is narrow.try_acquire(kind) is None
            assert books(narrow) == (kind == "stream", kind == "tool", 1)
    for try_acquire in (named("try_acquire"), lambda: narrow.try_acquire(kind)):
        with try_acquire() as permit:
            assert permit.kind == kind
    assert books(narrow) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["toll", "", "TOOL", "tools", None, 1, b"tool", ["tool"]])
def test_there_are_two_kinds(gov: ConcurrencyGovernor, kind: Any) -> None:
    for call in (gov.acquire, gov.try_acquire):
        with pytest.raises(ValueError, match=re.escape(f"kind must be 'stream' or 'tool', not {kind!r}")):
            call(kind)
    assert books(gov) == (0, 0, 0)


@pytest.mark.parametrize("wait", list(WAITS.values())[:3], ids=list(WAITS)[:3])
@pytest.mark.parametrize("timeout", [0, 1e-9, 0.02])
def test_a_timeout_ends_the_wait_not_before_its_time_and_leaves_no_trace(
    narrow: ConcurrencyGovernor, wait: Callable[..., object], timeout: float
) -> None:
    with narrow.acquire_tool():
        began = monotonic()
        with pytest.raises(AcquireTimeout):
            wait(narrow, timeout)
        assert monotonic() - began >= timeout
        assert waiting(narrow) == 0
        assert books(narrow) == (0, 1, 1)


@pytest.mark.parametrize("timeout", [None, INF, 1e300, threading.TIMEOUT_MAX * 2, 10**400, 60])
def test_a_timeout_that_does_not_run_out_does_not_matter(
    narrow: ConcurrencyGovernor, timeout: float | None
) -> None:
    first = narrow.acquire_tool(timeout)
    with Crew() as crew:
        crew.start(lambda: narrow.acquire_tool(timeout).release())
        until(lambda: waiting(narrow) == 1, "one in line")
        first.release()
    assert books(narrow) == (0, 0, 0)


def test_who_has_room_need_not_wait_to_be_served(gov: ConcurrencyGovernor) -> None:
    with gov.acquire_tool(timeout=0), gov.acquire_stream(0):
        assert books(gov) == (1, 1, 2)


def test_a_timeout_tells_what_is_in_use_and_who_is_ahead() -> None:
    gov = ConcurrencyGovernor(4, 8, 16)
    permits = take(gov, "stream", *["tool"] * 8)
    with Crew() as crew:
        for number in range(3):
            line_up(crew, gov, "tool", [], str(number))
        with pytest.raises(AcquireTimeout) as caught:
            gov.acquire_tool(timeout=0.01)
        now = pytest.raises(AcquireTimeout, match=r"^no tool permit at once: tools 8/8 in use, .* 3 waiting")
        with now:
            gov.acquire_tool(timeout=0)
        give_back(permits)
    assert str(caught.value) == (
        "no tool permit within 0.01 s: tools 8/8 in use, global 9/16, 3 waiting ahead"
    )
    assert (caught.value.what, caught.value.bound, caught.value.waiting) == ("tool permit", 0.01, 3)
    assert caught.value.layers == (("tools", 8, 8), ("global", 9, 16))


def test_those_who_came_later_are_not_ahead(
    narrow: ConcurrencyGovernor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with pytest.raises(AcquireTimeout) as caught:
            narrow.acquire_tool(timeout=60)
        ahead.append(caught.value.waiting)

    def stopped_clock(gate: Any, timeout: float | None) -> None:
        sleep(gate, None) if timeout is None else time_is_up.wait()

    ahead: list[int] = []
    time_is_up, sleep = threading.Event(), _tree._opens
    monkeypatch.setattr(_tree, "_opens", stopped_clock)
    with Crew() as crew, narrow.acquire_stream():
        line_up(crew, narrow, "tool", [], "ahead")
        line_up(crew, narrow, "stream", [], "of the other kind")
        crew.start(work)
        until(lambda: waiting(narrow) == 3, "the impatient one in line")
        line_up(crew, narrow, "tool", [], "behind")
        time_is_up.set()
        until(lambda: ahead == [1], "the timeout, with one ahead")


def test_a_refusal_names_the_governor_the_agent_and_its_limits() -> None:
    agent = ConcurrencyGovernor(1, 1, 1, name="crew").agent("lead", max_tools=1).agent("coder", max_tools=1)
    with agent.acquire_tool() as permit:
        with pytest.raises(AcquireTimeout) as tool:
            agent.acquire_tool(0)
        with pytest.raises(AcquireTimeout) as stream:
            agent.acquire_stream(0)
    assert tool.value.governor == agent.name == "crew/lead/coder"
    assert [use.name for use in tool.value.layers] == [
        "tools of 'crew/lead/coder'",
        "tools of 'crew/lead'",
        "tools",
        "global",
    ]
    assert [use.name for use in stream.value.layers] == ["streams", "global"], "limits that it does not have"
    assert not permit.held


# ----------------------------------------------------------------------------------------- max_queued


def test_a_full_line_refuses_a_further_acquire_at_once() -> None:
    gov = ConcurrencyGovernor(1, 1, 16, max_queued=2)
    permits = take(gov, "tool", "stream")
    with Crew() as crew:
        for number in range(2):
            line_up(crew, gov, "tool", [], str(number))
        with pytest.raises(ConcurrencyLimitExceeded) as caught:
            gov.acquire_tool(timeout=5)
        assert gov.try_acquire_tool() is None
        line_up(crew, gov, "stream", [], "in a line of its own")
        give_back(permits)
    assert str(caught.value) == (
        "no tool permit as the line is full (max_queued=2): tools 1/1 in use, global 2/16, "
        "2 waiting: raise max_queued, or submit less at once"
    )
    assert (caught.value.bound, caught.value.waiting) == (2, 2)
    assert books(gov) == (0, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_of_zero_never_waits(kind: str) -> None:
    gov = ConcurrencyGovernor(1, 1, 1, max_queued=0)
    with gov.acquire(kind):
        for timeout in (5, None):
            with pytest.raises(ConcurrencyLimitExceeded, match=r"\(max_queued=0\): .*, 0 waiting: "):
                gov.acquire(kind, timeout)
    with gov.acquire(kind):
        pass


def test_agents_waiters_stand_in_the_same_line() -> None:
    gov = ConcurrencyGovernor(1, 1, 1, max_queued=2)
    lead = gov.agent("lead", max_tools=5)
    coder = lead.agent("coder", max_tools=5)
    with Crew() as crew, gov.acquire_stream():
        line_up(crew, lead, "tool", [], "lead")
        line_up(crew, coder, "tool", [], "coder")
        for full in (gov, lead, coder):
            expect(ConcurrencyLimitExceeded, full.acquire_tool, 5)
    with coder.acquire_tool():
        pass


def test_a_place_in_line_that_was_left_can_be_taken() -> None:
    gov = ConcurrencyGovernor(1, 1, 1, max_queued=1)
    with Crew() as crew, gov.acquire_tool():
        for _ in range(3):
            expect(AcquireTimeout, gov.acquire_tool, 0.001)
        line_up(crew, gov, "tool", [], "next")


# ------------------------------------------------------------------------------------------- agents


def test_an_agents_limits_hold_under_those_above_it(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=2, max_streams=1)
    permits = take(agent, "tool", "tool", "stream")
    assert agent.try_acquire_tool() is agent.try_acquire_stream() is None
    assert books(agent) == books(gov) == (1, 2, 3)
    permits += take(gov, "tool")
    assert books(agent) == (1, 2, 4), "its own streams and tools, and all that is global"
    assert gov.try_acquire_stream() is None
    permits.pop(0).release()
    permits += take(gov, "stream")
    assert agent.try_acquire_tool() is None
    give_back(permits)
    assert books(agent) == books(gov) == (0, 0, 0)


def test_agents_do_not_multiply_the_limits_they_share(gov: ConcurrencyGovernor) -> None:
    permits = [gov.agent(f"agent {number}", max_tools=3).try_acquire_tool() for number in range(5)]
    taken = [it for it in permits if it is not None]
    assert len(taken) == 3
    give_back(taken)


def test_an_agent_without_a_stream_limit_shares_its_parents(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("lead", max_tools=1).agent("coder", max_tools=1)
    assert limits(agent) == (2, 1, 4)
    permits = take(agent, "stream", "stream")
    assert gov.try_acquire_stream() is None
    assert books(agent) == books(gov) == (2, 0, 2)
    give_back(permits)


def test_agents_have_agents_of_their_own() -> None:
    gov = ConcurrencyGovernor(9, 9, 9)
    agents = [gov]
    for depth in range(5, 0, -1):
        agents.append(agents[-1].agent("deeper", max_tools=depth, max_streams=depth))
    permits = take(agents[-1], "tool", "stream")
    assert agents[-1].try_acquire_tool() is agents[-1].try_acquire_stream() is None
    assert [books(it) for it in agents] == [(1, 1, 2)] * 6
    assert [it.name for it in agents[:3]] == [None, "deeper", "deeper/deeper"]
    permits += take(agents[-2], "tool")
    assert [books(it)[1] for it in agents] == [2, 2, 2, 2, 2, 1]
    give_back(permits)
    assert [books(it) for it in agents] == [(0, 0, 0)] * 6


def test_the_same_name_is_the_same_agent_of_the_same_parent(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=2)
    assert gov.agent("coder", max_tools=2) is agent
    assert gov.agent("writer", max_tools=2) is not agent
    assert agent.agent("coder", max_tools=2) is not agent


def test_threads_that_ask_at_once_get_one_agent(gov: ConcurrencyGovernor) -> None:
    assert len(race(lambda: gov.agent("coder", max_tools=1))) == 1


@pytest.mark.parametrize("asked", [{"max_tools": 1}, {"max_tools": 2}, {"max_tools": 1, "max_streams": 2}])
def test_an_agent_asked_for_with_other_limits_is_refused(
    gov: ConcurrencyGovernor, asked: dict[str, int]
) -> None:
    agent = gov.agent("coder", max_tools=1, max_streams=1)
    agent.resize(max_tools=2)
    with pytest.raises(ValueError, match="agent 'coder' exists with max_streams=1, max_tools=1: "):
        gov.agent("coder", **asked)
    assert gov.agent("coder", max_tools=1, max_streams=1) is agent


def test_a_name_is_kept_while_a_permit_is_out_and_so_are_its_limits(gov: ConcurrencyGovernor) -> None:
    permit = gov.agent("coder", max_tools=1).acquire_tool()
    gc.collect()
    assert gov.agent("coder", max_tools=1).try_acquire_tool() is None
    with pytest.raises(ValueError, match="agent 'coder' exists with "):
        gov.agent("coder", max_tools=2)
    with permit, permit.suspended():
        gc.collect()
        with pytest.raises(ValueError, match="agent 'coder' exists with "):
            gov.agent("coder", max_tools=2)
    del permit
    gc.collect()
    with gov.agent("coder", max_tools=2).acquire_tool():
        pass


def test_a_name_is_kept_while_someone_waits_for_it(narrow: ConcurrencyGovernor) -> None:
    with Crew() as crew, narrow.acquire_stream():
        crew.start(lambda: narrow.agent("coder", max_tools=1).acquire_tool().release())
        until(lambda: waiting(narrow) == 1, "one in line")
        expect(ValueError, lambda: narrow.agent("coder", max_tools=2))


def test_an_agents_name_has_no_slash(gov: ConcurrencyGovernor) -> None:
    """Else two agents might have the same path."""
    with pytest.raises(ValueError, match=r"name must have no '/', .*: 'a/b'"):
        gov.agent("a/b", max_tools=1)


@pytest.mark.in_process_only  # in a fleet, its limits are kept while its permits are out
def test_closing_an_agent_stops_only_it_and_frees_its_name(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=1)
    other, below = gov.agent("writer", max_tools=1), agent.agent("helper", max_tools=1)
    permit = agent.acquire_tool()
    with Crew() as crew:
        crew.start(expect, SemaphoreClosed, agent.acquire_tool)
        crew.start(expect, SemaphoreClosed, below.acquire_tool)
        until(lambda: waiting(gov) == 2, "two in line")
        agent.close()
    assert [it.closed for it in (agent, below, other, gov)] == [True, True, False, False]
    assert permit.held
    new = gov.agent("coder", max_tools=2)
    agent.close()
    assert gov.agent("coder", max_tools=2) is new
    permits = take(new, "tool", "tool")
    assert other.try_acquire_tool() is None, "a permit of the closed one still counts above it"
    give_back([permit, *permits])
    assert books(gov) == (0, 0, 0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_agent_of_a_closed_governor_is_closed(gov: ConcurrencyGovernor, depth: int) -> None:
    def descend(agent: ConcurrencyGovernor) -> ConcurrencyGovernor:
        for _ in range(depth):
            agent = agent.agent("deeper", max_tools=1)
        return agent

    agent = descend(gov)
    permit = agent.acquire_tool()
    gov.close()
    for it in (agent, descend(gov)):
        assert it.closed
        expect(SemaphoreClosed, it.acquire_tool)
        expect(SemaphoreClosed, it.acquire_stream, 0)
        assert it.try_acquire_tool() is None
    assert permit.held
    permit.release()


@pytest.mark.parametrize("shared", ["max_global", "max_streams"])
def test_an_agent_cannot_resize_what_it_shares(gov: ConcurrencyGovernor, shared: str) -> None:
    agent = gov.agent("coder", max_tools=1)
    with pytest.raises(ValueError, match=f"{shared}=9: agent 'coder' shares this limit"):
        agent.resize(max_tools=2, **{shared: 9})
    assert limits(agent) == (2, 1, 4)
    agent.resize(max_tools=2)
    assert limits(agent) == (2, 2, 4)


def test_an_agent_leaves_nothing_behind(gov: ConcurrencyGovernor) -> None:
    def nodes() -> int:
        gc.collect()
        return sum(type(it) in (_tree.Node, _tree.Ticket) for it in gc.get_objects())

    def come_and_go(number: int) -> weakref.ref[ConcurrencyGovernor]:
        agent = gov.agent(f"agent {number}", max_tools=1)
        with agent.agent("helper", max_tools=1).acquire_tool() as permit, agent.acquire_stream():
            expect(AcquireTimeout, agent.acquire_tool, 1e-9)
            with permit.suspended():
                pass
        if number % 2:
            agent.close()
        return weakref.ref(agent)

    before = nodes()
    agents = [come_and_go(number) for number in range(20)]
    assert nodes() == before
    assert [it() for it in agents] == [None] * 20


# -------------------------------------------------------------------------------------------- stats


def test_stats_tell_what_is_free_what_may_be_and_who_waits(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=1)
    permits = take(gov, "stream", "stream") + take(agent, "tool")
    with Crew() as crew:
        line_up(crew, gov, "stream", [], "a stream")
        line_up(crew, agent, "tool", [], "an agent's tool")
        line_up(crew, agent, "tool", [], "another")
        stats, of_agent = gov.stats(), agent.stats()
        give_back(permits)
    assert dataclasses.asdict(stats) == {
        "streams_available": 0,
        "streams_max": 2,
        "tools_available": 2,
        "tools_max": 3,
        "global_available": 1,
        "global_max": 4,
        "streams_waiting": 1,
        "tools_waiting": 2,
    }
    assert (stats.streams_in_use, stats.tools_in_use, stats.global_in_use) == (2, 1, 3)
    assert (of_agent.streams_waiting, of_agent.tools_waiting) == (0, 2)
    assert waiting(gov) == 0


def test_after_shrinking_nothing_is_free_and_all_in_use_is_told(gov: ConcurrencyGovernor) -> None:
    permits = take(gov, "stream", "stream", "tool", "tool")
    gov.resize(max_streams=1, max_tools=0, max_global=2)
    stats = gov.stats()
    assert (stats.streams_available, stats.tools_available, stats.global_available) == (0, 0, 0)
    assert limits(gov) == (1, 0, 2)
    assert books(gov) == (2, 2, 4)
    give_back(permits)
    assert (gov.stats().global_available, books(gov)) == (2, (0, 0, 0))


def test_stats_are_a_snapshot_that_nobody_can_change(gov: ConcurrencyGovernor) -> None:
    stats = gov.stats()
    with gov.acquire_tool():
        assert stats.tools_available == 3
        assert stats != gov.stats()
    assert stats == gov.stats()
    assert pickle.loads(pickle.dumps(stats)) == stats
    for name in ("tools_max", "tools_in_use"):
        with pytest.raises(AttributeError):
            setattr(stats, name, 9)
    assert GovernorStats(1, 2, 3, 4, 5, 6, 7, 8).global_in_use == 1


# ------------------------------------------------------------------------------------------- resize


def test_growing_admits_at_once_as_many_as_there_is_room_for_the_first_first(
    narrow: ConcurrencyGovernor,
) -> None:
    permits, served, gate = take(narrow, "tool"), [], threading.Event()
    with Crew() as crew:
        for number in range(4):
            line_up(crew, narrow, "tool", served, str(number), gate)
        narrow.resize(max_tools=3, max_global=3)
        assert (books(narrow), waiting(narrow)) == ((0, 3, 3), 2)
        until(lambda: len(served) == 2, "two served")
        assert sorted(served) == ["0", "1"]
        gate.set()
        give_back(permits)


def test_shrinking_revokes_nothing_and_holds_as_permits_come_back(gov: ConcurrencyGovernor) -> None:
    permits = take(gov, "tool", "tool", "tool")
    gov.resize(max_tools=1)
    assert all(it.held for it in permits)
    for _ in range(2):
        permits.pop().release()
        assert gov.try_acquire_tool() is None
    give_back(permits)
    permits = take(gov, "tool")
    assert gov.try_acquire_tool() is None
    give_back(permits)


@pytest.mark.parametrize("layer", ["max_tools", "max_global"])
def test_a_layer_at_zero_is_paused_until_it_grows(gov: ConcurrencyGovernor, layer: str) -> None:
    served: list[str] = []
    gov.resize(**{layer: 0})
    assert gov.try_acquire_tool() is None
    with Crew() as crew:
        line_up(crew, gov, "tool", served, "the paused")
        if layer == "max_tools":
            with gov.acquire_stream():
                pass
        gov.resize(**{layer: 1})
    assert served == ["the paused"]


def test_limits_that_are_changed_together_hold_together(narrow: ConcurrencyGovernor) -> None:
    permits, served = take(narrow, "tool"), []
    narrow.resize(max_tools=2)
    with Crew() as crew:
        line_up(crew, narrow, "tool", served, "the paused")
        narrow.resize(max_global=2, max_tools=0)
        assert (books(narrow), served) == ((0, 1, 1), []), "admitted by half of a change"
        narrow.resize(max_tools=2)
        give_back(permits)


def test_limits_not_given_stay(gov: ConcurrencyGovernor) -> None:
    gov.resize()
    gov.resize(max_streams=7)
    assert limits(gov) == (7, 3, 4)


def test_resizing_reopens_nothing(gov: ConcurrencyGovernor) -> None:
    gov.close()
    gov.resize(max_tools=9)
    assert gov.closed
    expect(SemaphoreClosed, gov.acquire_tool)


# -------------------------------------------------------------------------------------------- close


def test_closing_wakes_every_waiter_and_leaves_the_held_alone(narrow: ConcurrencyGovernor) -> None:
    permits = take(narrow, "tool")
    agent = narrow.agent("lead", max_tools=5).agent("coder", max_tools=5)
    with Crew() as crew:
        for gov in (narrow, agent):
            for kind in KINDS:
                for _ in range(3):
                    crew.start(expect, SemaphoreClosed, gov.acquire, kind)
        until(lambda: waiting(narrow) == 12, "twelve in line")
        narrow.close()
        assert waiting(narrow) == 0
    narrow.close()
    assert permits[0].held
    assert books(narrow) == (0, 1, 1)
    give_back(permits)
    assert books(narrow) == (0, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_governor_refuses_newcomers(gov: ConcurrencyGovernor, kind: str) -> None:
    gov.close()
    assert gov.closed
    for timeout in (None, 0, 5):
        with pytest.raises(SemaphoreClosed, match=f"^no {kind} permit: closed$"):
            gov.acquire(kind, timeout)
    assert gov.try_acquire(kind) is None
    assert books(gov) == (0, 0, 0)


def test_the_refusal_of_a_closed_governor_names_it() -> None:
    with ConcurrencyGovernor(1, 1, 1, name="crew") as gov:
        pass
    with pytest.raises(SemaphoreClosed, match="'crew'") as caught:
        gov.acquire_tool()
    assert (caught.value.what, caught.value.governor) == ("tool permit", "crew")


class Door:
    """A lock that lets a thread named "late" in only after all that the test does first."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.reached, self.open = threading.Event(), threading.Event()

    def acquire(self, *how: Any) -> bool:
        if threading.current_thread().name == "late":
            self.reached.set()
            self.open.wait()
        return self._lock.acquire(*how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whose", ["governor", "agent", "agent's agent"])
def test_once_it_is_drained_even_who_was_at_the_door_is_refused(
    gov: ConcurrencyGovernor, whose: str, kind: str
) -> None:
    agent = gov.agent("lead", max_tools=1, max_streams=1)
    helper = agent.agent("helper", max_tools=1, max_streams=1)
    closing = {"governor": gov, "agent": agent, "agent's agent": helper}[whose]
    door = gov._global.tree.lock = Door(gov._global.tree.lock)
    with Crew() as crew:
        crew.start(expect, SemaphoreClosed, closing.acquire, kind, name="late")
        assert door.reached.wait(5)
        assert closing.drain() is True
        assert books(closing) == (0, 0, 0)
        door.open.set()


def test_a_governors_block_closes_it_at_its_end() -> None:
    with pytest.raises(ZeroDivisionError), ConcurrencyGovernor(1, 1, 1) as gov:
        assert not gov.closed
        raise ZeroDivisionError
    assert gov.closed


# -------------------------------------------------------------------------------------------- drain


def test_draining_an_idle_governor_closes_it_and_ends_at_once(gov: ConcurrencyGovernor) -> None:
    assert gov.drain() is True
    assert gov.closed
    assert gov.drain(timeout=0) is True


@pytest.mark.parametrize("timeout", [0, 1e-9, 0.02])
def test_a_drain_that_times_out_tells_so_and_leaves_it_closed(
    gov: ConcurrencyGovernor, timeout: float
) -> None:
    permits = take(gov, "tool")
    began = monotonic()
    assert gov.drain(timeout) is False
    assert monotonic() - began >= timeout
    assert gov.closed
    assert permits[0].held
    give_back(permits)
    assert gov.drain(timeout) is True


def start_drain(crew: Crew, gov: ConcurrencyGovernor, ends: list[bool], *timeout: float | None) -> None:
    drains = gov._global.tree.drains  # what waits there shows nowhere in public
    before = len(drains)
    crew.start(lambda: ends.append(gov.drain(*timeout)))
    until(lambda: len(drains) == before + 1, "the drain's wait")


@pytest.mark.parametrize("timeout", [None, INF, threading.TIMEOUT_MAX * 2, 60])
def test_a_drain_ends_with_the_last_permit_agents_too(
    gov: ConcurrencyGovernor, timeout: float | None
) -> None:
    permits = take(gov, "stream", "tool") + take(gov.agent("coder", max_tools=1), "tool")
    ends: list[bool] = []
    with Crew() as crew:
        for _ in range(2):
            start_drain(crew, gov, ends, timeout)
        while permits:
            assert ends == []
            permits.pop().release()
    assert ends == [True, True]


@pytest.mark.parametrize("way_back", ["resumed", "released"])
def test_a_drain_waits_for_the_suspended_too(narrow: ConcurrencyGovernor, way_back: str) -> None:
    def work() -> None:
        with narrow.acquire_tool() as permit, permit.suspended():
            permits.append(permit)
            gate.wait()

    permits: list[ConcurrencyPermit] = []
    ends: list[bool] = []
    gate = threading.Event()
    with Crew() as crew:
        crew.start(work)
        until(lambda: permits, "the suspension")
        start_drain(crew, narrow, ends)
        assert narrow.drain(timeout=0) is False
        if way_back == "released":
            permits[0].release()
            until(lambda: ends, "the drain's end")
        gate.set()
    assert ends == [True]


def test_draining_an_agent_waits_for_its_own_permits_only(gov: ConcurrencyGovernor) -> None:
    agent = gov.agent("coder", max_tools=1)
    helper = agent.agent("helper", max_tools=1)
    with gov.acquire_tool(), gov.acquire_stream():
        permits = take(helper, "tool")
        assert agent.drain(timeout=0) is False
        give_back(permits)
        assert agent.drain(timeout=0) is True
    assert not gov.closed


@pytest.mark.parametrize("of", ["it", "its agent"])
def test_a_drain_by_who_is_inside_a_permit_is_refused_and_closes_nothing(
    gov: ConcurrencyGovernor, of: str
) -> None:
    refused = pytest.raises(RuntimeError, match="inside a permit would wait for itself")
    inside = gov if of == "it" else gov.agent("lead", max_tools=1).agent("coder", max_tools=1)
    with inside.acquire_tool() as permit:
        with refused:
            gov.drain()
        with permit.suspended(), refused:
            gov.drain()
        assert permit.held
        assert not gov.closed
    assert gov.drain() is True


def test_a_drain_sleeps_until_it_is_woken(
    narrow: ConcurrencyGovernor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []

    class Gate:
        def __init__(self) -> None:
            self._lock = threading.Lock()
            self.release = self._lock.release

        def acquire(self, *how: Any) -> bool:
            looks.append(how)
            return self._lock.acquire(*how)

    ends: list[bool] = []
    permits = take(narrow, "tool")
    with Crew() as crew:
        monkeypatch.setattr(_tree, "Lock", Gate)
        start_drain(crew, narrow, ends)
        until(lambda: len(looks) == 2, "the drain asleep")
        give_back(permits)
    assert ends == [True]
    assert len(looks) == 2, "once to shut the gate, once to sleep before it"


# ----------------------------------------------------------------------------- copies and appearance


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda gov: copy.deepcopy({"deep": [gov]})["deep"][0]]
)
def test_a_copy_of_a_governor_is_the_governor(
    gov: ConcurrencyGovernor, twin: Callable[[ConcurrencyGovernor], ConcurrencyGovernor]
) -> None:
    for it in (gov, gov.agent("coder", max_tools=1)):
        assert twin(it) is it


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_governor_is_not_pickled_and_says_what_to_do(gov: ConcurrencyGovernor, protocol: int) -> None:
    for it in (gov, gov.agent("coder", max_tools=1)):
        with pytest.raises(TypeError, match=r"cannot be pickled, .*: make one in each process"):
            pickle.dumps(it, protocol)


@pytest.mark.in_process_only
def test_its_repr_tells_its_name_its_state_and_how_full_it_is() -> None:
    gov = ConcurrencyGovernor(1, 2, 3, name="crew")
    with gov.acquire_tool():
        assert repr(gov) == "<ConcurrencyGovernor 'crew' streams 0/1 tools 1/2 global 1/3>"
        agent = gov.agent("coder", max_tools=1)
        assert repr(agent) == "<ConcurrencyGovernor 'crew/coder' streams 0/1 tools 0/1 global 1/3>"
        gov.close()
    assert repr(gov) == "<ConcurrencyGovernor 'crew' closed streams 0/1 tools 0/2 global 0/3>"
    assert repr(ConcurrencyGovernor(1, 1, 1)) == "<ConcurrencyGovernor streams 0/1 tools 0/1 global 0/1>"


def test_a_refusal_leaves_no_cycle_behind_that_would_keep_the_agent(gov: ConcurrencyGovernor) -> None:
    gc.collect()
    gc.disable()
    try:
        agent = gov.agent("brief", max_tools=0)
        gone = weakref.ref(agent)
        with pytest.raises(AcquireTimeout):
            agent.acquire_tool(timeout=0)
        del agent
        if getattr(sys, "_is_gil_enabled", lambda: True)():  # elsewhere a reference may be let go later
            assert gone() is None
    finally:
        gc.enable()
