"""Random histories of a governor and its agents, held against a model in plain Python.

The model is one list of operations, oldest first, and counts taken by walking it. It is played twice:
by hand, without threads, which takes thousands of steps and sees the order of the grants; and by real
threads, through the public API alone. After every step all books, all operations and all agents are
compared.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from threads import Crew, until

import governor._tree
from governor import (
    AcquireTimeout,
    ConcurrencyError,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    GovernorStats,
    SemaphoreClosed,
)
from governor._tree import OUT, Ticket

# The states of an operation.
ASKING, HELD, AWAY, RESUMING, OVER = "asking", "held", "away", "resuming", "over"

# How an operation asks, beside a timeout of None or 0: with `try_acquire`, with a timeout that ends
# by itself, and with one that ends when the history says so.
TRY, SHORT, LONG = "try", 0.001, 3600.0

KINDS = ("stream", "tool")


class Refused(Exception):
    """`try_acquire` returned None."""


# ------------------------------------------------------------------------------------- the model


class Layer:
    def __init__(self, limit: int | None, parent: Layer | None = None) -> None:
        self.limit, self.parent, self.closed = limit, parent, False

    def path(self) -> Iterator[Layer]:
        yield self
        if self.parent is not None:
            yield from self.parent.path()


class Member:
    """The governor, or one of its agents. ``real`` is None once the history has dropped it."""

    def __init__(
        self, name: str, parent: Member | None, layers: dict[str, Layer], made_with: tuple[int | None, int]
    ) -> None:
        self.name, self.parent, self.layers, self.made_with = name, parent, layers, made_with
        self.depth = 0 if parent is None else parent.depth + 1
        self.own = [layers["global"]] if parent is None else [layers[kind] for kind in KINDS]
        self.real: Any = None
        self.weak: Callable[[], ConcurrencyGovernor | None] = lambda: None

    def is_closed(self, *, above: bool = False) -> bool:
        layers = [*self.layers["tool"].path()] if above else self.own
        return any(layer.closed for layer in layers)

    def is_played_by(self, real: ConcurrencyGovernor) -> None:
        self.real, self.weak = real, weakref.ref(real)

    def __repr__(self) -> str:
        return self.name


class Operation:
    """``how`` is the timeout of the wait it is in, or the next; ``end`` the error that ended it."""

    def __init__(self, number: int, member: Member, kind: str, how: Any) -> None:
        self.number, self.member, self.kind, self.how = number, member, kind, how
        self.path = [*member.layers[kind].path()]
        self.state = ASKING
        self.end: type[Exception] | None = None
        self.player: Any = None

    def over(self, end: type[Exception] | None = None) -> None:
        self.state, self.end = OVER, end

    def __repr__(self) -> str:
        return f"operation {self.number}"


class Model:
    def __init__(self, streams: int, tools: int, everything: int, max_queued: int | None) -> None:
        root = Layer(everything)
        layers = {"global": root, "stream": Layer(streams, root), "tool": Layer(tools, root)}
        self.root = Member("governor", None, layers, (streams, tools))
        self.members = [self.root]
        self.operations: list[Operation] = []  # oldest first, and so is the line
        self.max_queued = max_queued

    def count(self, layer: Layer, *states: str) -> int:
        return sum(it.state in states and layer in it.path for it in self.operations)

    def has_room(self, operation: Operation) -> bool:
        return all(it.limit is None or self.count(it, HELD) < it.limit for it in operation.path)

    def ask(self, operation: Operation) -> None:
        """Let it in, or put it in line: a newcomer at the end, who resumes where it was."""
        newcomer, waiting = operation.state is ASKING, (ASKING, RESUMING)
        kind = self.root.layers[operation.kind]
        if newcomer and any(layer.closed for layer in operation.path):
            operation.over(Refused if operation.how is TRY else SemaphoreClosed)
        elif self.has_room(operation):
            operation.state = HELD
        elif operation.how is TRY:
            operation.over(Refused)
        elif operation.how == 0:
            operation.over(AcquireTimeout)
        elif newcomer and self.max_queued is not None and self.count(kind, *waiting) >= self.max_queued:
            operation.over(ConcurrencyLimitExceeded)
        elif operation.how is SHORT:
            operation.over(AcquireTimeout)
        if newcomer:
            self.operations.append(operation)

    def hand_on(self) -> list[Operation]:
        """Turn out whom a closed layer refuses, then let in, oldest first, who has room."""
        admitted = []
        for operation in self.operations:
            if operation.state is ASKING and any(layer.closed for layer in operation.path):
                operation.over(SemaphoreClosed)
            if operation.state in (ASKING, RESUMING) and self.has_room(operation):
                operation.state = HELD
                admitted.append(operation)
        return admitted

    def lives(self, member: Member) -> bool:
        """Whether anybody still has use of it: the history, an operation, an agent of its own."""
        return (
            member.real is not None
            or any(it.member is member and it.state is not OVER for it in self.operations)
            or any(it.parent is member and self.lives(it) for it in self.members)
        )

    def books(self, member: Member) -> dict[str, int]:
        books = {}
        for kind, word in (("stream", "streams"), ("tool", "tools"), ("global", "global")):
            layer = member.layers[kind]
            if kind in KINDS:
                books[f"{word}_waiting"] = self.count(layer, ASKING, RESUMING)
            # Where an agent has no limit of its own, it is told of the one that it meets.
            limited = next(it for it in layer.path() if it.limit is not None)
            used, limit = self.count(limited, HELD), limited.limit or 0
            books |= {
                f"{word}_in_use": used,
                f"{word}_max": limit,
                f"{word}_available": max(0, limit - used),
            }
        return books


# ----------------------------------------------------------------------------------- the players


class Hand:
    """Plays an operation without a thread: takes the steps of a wait, but does not sleep between."""

    def __init__(self, stage: ByHand, real: ConcurrencyGovernor, kind: Any, how: Any) -> None:
        self.stage, self.state, self.end = stage, ASKING, None
        self.suspension: Any = None
        self.permit: Any = real.try_acquire(kind)
        if self.permit is not None:
            self.enter()
        elif how is TRY:
            self.over(Refused)
        else:
            self.permit = object.__new__(ConcurrencyPermit)
            self.permit._ticket = ticket = object.__new__(Ticket)
            ticket.leaf, ticket.source, ticket.state, ticket.owner = real._leaf(kind), real, OUT, None
            self.stand_in_line(how)

    def stand_in_line(self, how: Any) -> None:
        ticket = self.permit._ticket
        ticket.gate = Gate(self)
        ticket.waiter = None
        refusal = ticket.leaf.tree.stand(ticket, at_once=how == 0, resumes=ticket.state == "suspended")
        if isinstance(refusal, tuple):
            self.over(refusal.error)
        elif self.permit.held:
            self.enter()
        elif how is SHORT:
            self.wake()

    def wake(self) -> None:
        if self.state is OVER:
            return  # its own leaving the line opens the gate too
        ticket = self.permit._ticket
        refusal = None if self.permit.held else ticket.leaf.tree.withdraw(ticket)
        if self.permit.held:
            self.enter()
        else:
            self.over(refusal and refusal.error)

    lapse = wake

    def enter(self) -> None:
        if self.state is ASKING:
            self.permit.__enter__()
        self.state = HELD

    def over(self, end: type[Exception] | None) -> None:
        self.state, self.end, self.permit = OVER, end, None

    def suspend(self, how: Any) -> None:
        self.how = how
        self.suspension = self.permit.suspended(how)
        self.suspension.__enter__()
        self.state = AWAY

    def resume(self) -> None:
        self.state = RESUMING
        suspension, self.suspension = self.suspension, None
        if self.how != 0:
            return self.stand_in_line(self.how)
        try:
            suspension.__exit__(None, None, None)  # does not sleep
        except AcquireTimeout as error:
            return self.over(type(error))
        self.enter()

    def leave(self, *, in_person: bool) -> None:
        state, self.suspension = self.state, None
        if in_person:
            self.permit.__exit__(None, None, None)
        else:
            self.permit.release()
        if state is not RESUMING:  # else it is woken, and finds itself out
            self.over(None)


class Gate:
    def __init__(self, hand: Hand) -> None:
        self.hand = hand

    def release(self) -> None:
        self.hand.stage.woken.append(self.hand)


class ByHand:
    """Where all is done once a step returns."""

    play = Hand

    def __init__(self) -> None:
        self.woken: list[Hand] = []

    def settle(self, same: Callable[[], bool]) -> list[Hand]:
        """Return who was let in, in the order of their waking."""
        woken, self.woken = self.woken, []
        admitted = [hand for hand in woken if hand.permit is not None and hand.permit.held]
        for hand in woken:
            hand.wake()
        return admitted

    def drain(self, real: ConcurrencyGovernor) -> bool:
        try:
            return real.drain(timeout=0)
        except RuntimeError:
            return False  # this thread has entered all that is held

    def end(self) -> None:
        pass


class Actor:
    """Plays an operation in a thread of its own, as a program would."""

    def __init__(self, stage: ByThread, real: ConcurrencyGovernor, kind: Any, how: Any) -> None:
        self.stage, self.state, self.end = stage, ASKING, None
        self.permit: ConcurrencyPermit | None = None
        self.orders: SimpleQueue[Any] = SimpleQueue()
        self.thread = stage.crew.start(self.act, real, kind, how)

    def act(self, real: ConcurrencyGovernor, kind: Any, how: Any) -> None:
        try:
            permit = real.try_acquire(kind) if how is TRY else real.acquire(kind, how)
            if permit is None:
                raise Refused
            with permit:
                self.permit = permit
                while permit.held:
                    self.state = HELD
                    order = self.orders.get()
                    if order == "leave":
                        break
                    with permit.suspended(order):
                        self.state = AWAY
                        self.orders.get()
        except (ConcurrencyError, Refused) as error:
            self.end = type(error)
        self.permit = None
        self.state = OVER

    def lapse(self) -> None:
        gates = self.stage.gates
        until(lambda: self.thread.ident in gates, "the waiter's falling asleep")
        gates[self.thread.ident].release()

    def suspend(self, how: Any) -> None:
        self.orders.put(how)

    def resume(self) -> None:
        self.state = RESUMING
        self.orders.put("resume")

    def leave(self, *, in_person: bool) -> None:
        if self.state is AWAY or self.state is RESUMING or not in_person:
            self.permit.release()
        self.orders.put("leave")


class ByThread:
    """Where a step is done when its threads have got so far; time is up when the history says so."""

    play = Actor

    def __init__(self) -> None:
        self.crew = Crew()
        self.gates: dict[int | None, Any] = {}
        self.patch = pytest.MonkeyPatch()
        asleep = governor._tree._opens

        def sleep(gate: Any, timeout: float | None) -> None:
            self.gates[threading.get_ident()] = gate  # to open it without a grant is to end the time
            asleep(gate, timeout)
            del self.gates[threading.get_ident()]

        self.patch.setattr(governor._tree, "_opens", sleep)

    def settle(self, same: Callable[[], bool]) -> None:
        try:
            until(same, "the model's state", patience=5)
        except pytest.fail.Exception:
            pass  # the comparison that follows says what differs

    def drain(self, real: ConcurrencyGovernor) -> bool:
        return real.drain(timeout=0)

    def end(self) -> None:
        self.crew.join()
        self.patch.undo()


# ----------------------------------------------------------------------------------- the histories

limits = st.integers(0, 3)
or_none = st.none() | limits
some = st.integers(0, 11)  # which one of those that there are
names = st.sampled_from("ab")
agents = st.tuples(some, names, st.none() | st.integers(1, 2), st.integers(1, 3))
# Mostly such as wait: without a line there is no order to see.
waits = [None, LONG, None, LONG, None, LONG, TRY, 0, SHORT]
asks = st.tuples(some, st.sampled_from(KINDS), st.sampled_from(waits))
# What becomes of an operation in which state. Coming back in spite of a line is where order is hard.
TURNS = [
    ("release", HELD),
    ("suspend", HELD),
    ("resume", AWAY),
    ("resume", AWAY),
    ("release", HELD),
    ("run_out_of_time", ASKING),
    ("suspend", HELD),
    ("release", AWAY),
    ("release", RESUMING),
    ("run_out_of_time", RESUMING),
]
turns = st.tuples(some, st.sampled_from(TURNS), st.sampled_from([None, LONG, None, LONG, 0, SHORT]))


class Histories(RuleBasedStateMachine):
    stage_type: type[ByHand] | type[ByThread] = ByHand
    most = 12  # operations at once
    with_agents = True

    @initialize(
        streams=st.integers(1, 2),
        tools=st.integers(1, 2),
        everything=st.integers(1, 3),
        queued=st.sampled_from([None, None, None, 0, 2, 4]),
        agents=st.lists(agents, max_size=4),
    )
    def make(self, streams: int, tools: int, everything: int, queued: int | None, agents: Any) -> None:
        self.model = Model(streams, tools, everything, queued)
        self.model.root.is_played_by(ConcurrencyGovernor(streams, tools, everything, max_queued=queued))
        self.stage = self.stage_type()
        self.begun = 0
        for agent in agents if self.with_agents else ():
            self.agent(*agent)

    def operations(self, *states: str) -> list[Operation]:
        return [operation for operation in self.model.operations if operation.state in states]

    def members(self) -> list[Member]:
        return [member for member in self.model.members if member.real is not None]

    def member(self, which: int) -> Member:
        members = self.members()
        return members[which % len(members)]

    # Operations.

    # Several to a step, else the limits and the agents would change more than the operations do.
    @rule(moves=st.lists(asks | turns, min_size=8, max_size=24))
    def operations_move(self, moves: list[Any]) -> None:
        for which, move, how in moves:
            if move in KINDS:
                if len(self.model.operations) < self.most:
                    self.begin(self.member(which), move, how)
            elif found := self.operations(move[1]):
                getattr(self, move[0])(found[which % len(found)], how)
            self.all_is_as_in_the_model()

    def begin(self, member: Member, kind: str, how: Any) -> None:
        self.begun += 1
        operation = Operation(self.begun, member, kind, how)
        self.model.ask(operation)
        operation.player = self.stage.play(self.stage, member.real, kind, how)

    def run_out_of_time(self, operation: Operation, _: Any) -> None:
        if operation.how is LONG:
            operation.over(AcquireTimeout)
            operation.player.lapse()

    def release(self, operation: Operation, how: Any = LONG) -> None:
        operation.over()
        operation.player.leave(in_person=how is not None)

    def suspend(self, operation: Operation, how: Any) -> None:
        operation.state, operation.how = AWAY, how
        operation.player.suspend(how)

    def resume(self, operation: Operation, _: Any) -> None:
        operation.state = RESUMING
        self.model.ask(operation)
        operation.player.resume()

    # Limits.

    @rule(which=some, streams=or_none, tools=or_none, everything=or_none | st.just(5))
    def resize(self, which: int, streams: int | None, tools: int | None, everything: int | None) -> None:
        member = self.member(which)
        if member.parent is not None:
            everything = None
        sizes = {"stream": streams, "tool": tools, "global": everything}
        layers = {member.layers[kind]: size for kind, size in sizes.items() if size is not None}
        try:
            member.real.resize(max_streams=streams, max_tools=tools, max_global=everything)
        except ValueError:
            assert any(layer.limit is None for layer in layers)
            return
        for layer, size in layers.items():
            assert layer.limit is not None
            layer.limit = size

    # Agents, and the end.

    @precondition(lambda self: self.with_agents)
    @rule(which=some, name=names, streams=or_none, tools=limits)
    def agent(self, which: int, name: str, streams: int | None, tools: int) -> None:
        parent = self.member(which)
        if parent.depth == 3:
            return
        name = f"{parent}/{name}"
        there = [
            it for it in self.model.members if it.name == name and it.parent is parent and not it.is_closed()
        ]
        try:
            real = parent.real.agent(name[-1], max_tools=tools, max_streams=streams)
        except ValueError:
            assert there
            assert there[0].made_with != (streams, tools)
            return
        if there:
            assert there[0].made_with == (streams, tools)
            assert there[0].weak() is real
            there[0].is_played_by(real)
            return
        above = parent.layers
        layers = above | {"stream": Layer(streams, above["stream"]), "tool": Layer(tools, above["tool"])}
        self.model.members.append(Member(name, parent, layers, (streams, tools)))
        self.model.members[-1].is_played_by(real)

    @precondition(lambda self: len(self.members()) > 1)
    @rule(which=some, close=st.sampled_from([True, False, False]))
    def an_agent_ends(self, which: int, close: bool) -> None:
        agents = self.members()[1:]
        agent = agents[which % len(agents)]
        if close:
            self.close(agent)
        else:
            agent.real = None

    @precondition(lambda self: self.begun > 30)
    @rule()
    def close_the_governor(self) -> None:
        self.close(self.model.root)

    def close(self, member: Member) -> None:
        for layer in member.own:
            layer.closed = True
        used = any(self.model.count(layer, HELD, AWAY, RESUMING) for layer in member.own)
        member.real.close()
        assert self.stage.drain(member.real) is not used

    # What holds after every step.

    @invariant()
    def all_is_as_in_the_model(self) -> None:
        admitted = self.model.hand_on()
        expected = self.expected()
        order = self.stage.settle(lambda: self.seen() == expected)
        assert self.seen() == expected
        if order is not None:
            assert order == [operation.player for operation in admitted]
        self.model.operations = self.operations(ASKING, HELD, AWAY, RESUMING)
        self.model.members = [member for member in self.model.members if self.model.lives(member)]

    def expected(self) -> dict[str, Any]:
        return {
            "books": {f"{it}": self.model.books(it) for it in self.members()},
            "closed": {f"{it}": it.is_closed(above=True) for it in self.members()},
            "operations": {f"{it}": (it.state, it.end) for it in self.model.operations},
            "lives": {f"{it}": self.model.lives(it) for it in self.model.members},
        }

    def seen(self) -> dict[str, Any]:
        return {
            "books": {f"{it}": books(it.real.stats()) for it in self.members()},
            "closed": {f"{it}": it.real.closed for it in self.members()},
            "operations": {f"{it}": (it.player.state, it.player.end) for it in self.model.operations},
            "lives": {f"{it}": it.weak() is not None for it in self.model.members},
        }

    def teardown(self) -> None:
        """Close, let everyone go, and find that all is back."""
        if not hasattr(self, "stage"):
            return
        self.close(self.model.root)
        self.all_is_as_in_the_model()
        for operation in self.operations(HELD, AWAY, RESUMING):
            self.release(operation)
            self.all_is_as_in_the_model()
        self.stage.end()
        root = self.model.root.real
        assert root.drain(timeout=0)
        tree = root._global.tree
        assert [*tree.held, *tree.line, *tree.away, *tree.after] == []


def books(stats: GovernorStats) -> dict[str, int]:
    in_use = ("streams_in_use", "tools_in_use", "global_in_use")
    return {name: getattr(stats, name) for name in (*(it.name for it in fields(stats)), *in_use)}


class LoneHistories(Histories):
    """Where all meet at the same few layers, and order is tried hardest."""

    with_agents = False


class ThreadHistories(Histories):
    stage_type = ByThread
    most = 8


ALIKE = settings(
    deadline=None,
    print_blob=True,
    derandomize="CI" in os.environ,
    suppress_health_check=list(HealthCheck),  # long steps are meant
)

TestByHand = pytest.mark.timeout(150)(Histories.TestCase)
TestByHandAlone = pytest.mark.timeout(150)(LoneHistories.TestCase)
TestByHand.settings = TestByHandAlone.settings = settings(ALIKE, max_examples=200, stateful_step_count=15)

# A failure that is only seen when time is up would take minutes to shrink.
TestByThread = pytest.mark.timeout(150)(ThreadHistories.TestCase)
TestByThread.settings = settings(
    ALIKE,
    max_examples=80,
    stateful_step_count=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
