"""Interruptible: what an exception from a signal handler leaves behind, wherever it arrives.

First the exhaustive tests: each scenario is run once for each point at which CPython looks for
signals, and so, in effect, with an interrupt before each of its instructions (see ``injector``).
Then the storms: timers, real signals, and other threads in the way.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from threads import Crew, until

import governor
from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    ConcurrencyPermit,
    DeadlockError,
    Layer,
    SemaphoreClosed,
    _in_process,
    _tree,
)

pytest.importorskip("ctypes", reason="signals are set just before an instruction by way of ctypes")

from stress.injector import Gate, Injector, every_point, interrupt

# Permits that an interrupt leaves to their finalizer are a part of the promise.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("finalizers_may_be_interrupted"),
]

Act = Callable[[], object]

# Two in a row are many pairs: in these scenarios, for every ninth point of the first interrupt.
TWICE = {"a_block", "a_suspension", "grants_to_three_waiters", "a_wait_that_times_out"}
SAMPLE = 9


# ------------------------------------------------------------------------------------- the stage


class Stage:
    """A governor, the threads that use it beside this one, and all permits that can be reached."""

    def __init__(self, tools: int = 2, everything: int = 3, max_queued: int | None = None) -> None:
        self.limits = {"max_streams": 1, "max_tools": tools, "max_global": everything}
        self.gov = ConcurrencyGovernor(**self.limits, max_queued=max_queued)
        self.tree = self.gov._global.tree
        self.agents: list[ConcurrencyGovernor] = []
        self.layers: list[Layer] = []
        self.permits: list[ConcurrencyPermit] = []
        self.waiters = 0
        self.through: list[object] = []
        self.meanwhile: Act | None = None  # happens just before this thread would wait
        self._crew = Crew()
        self._curtain = threading.Event()

    def agent(self, name: str = "agent", *, of: ConcurrencyGovernor | None = None) -> ConcurrencyGovernor:
        self.agents.append((of or self.gov).agent(name, max_tools=2))
        return self.agents[-1]

    def layer(self, limit: int, parent: Layer | None = None) -> Layer:
        """Make a layer; it is its tree that is looked at from now on."""
        self.layers.append(Layer(limit, parent=parent))
        self.tree = self.layers[-1]._node.tree
        return self.layers[-1]

    def hold(self, count: int) -> list[ConcurrencyPermit]:
        """Fill places with permits that are reachable from here."""
        self.permits += [self.gov.acquire_tool() for _ in range(count)]
        return self.permits

    def line_up(self, count: int, take: Callable[[], Any] | None = None) -> None:
        """Put threads in line that keep what they get until the curtain falls."""
        self.waiters += count
        length = len(self.tree.line) + count
        for _ in range(count):
            self._crew.start(self._wait, take or self.gov.acquire_tool)
        until(lambda: len(self.tree.line) == length, f"{length} in line")

    def _wait(self, take: Callable[[], Any]) -> None:
        try:
            got = take()
        except (SemaphoreClosed, DeadlockError) as error:
            self.through.append(error)
        else:
            self.through.append(got)
            self._curtain.wait()
            if isinstance(got, ConcurrencyPermit):
                got.release()

    def dismiss(self) -> None:
        """Have those who were in line give back what they get, and end."""
        self._curtain.set()
        self._crew.join()

    # ---- what is promised

    def check(self, error: BaseException | None) -> None:
        """Hold the books to what can be seen to be held, before any further operation."""
        tree = self.tree
        for it in (tree, _in_process._registry.tree):
            elsewhere(partial(assert_sound, it))
        awake = f"all that are out of the line to be awake: {self.waiters} less {len(tree.line)}"
        until(lambda: len(self.through) + len(tree.line) == self.waiters, awake)
        until(lambda: not tree.after, "all that was left for later to be done")
        assert not tree.drains
        assert not (tree.calm and (tree.line or tree.closed))

        held = set(map(id, tree.held.values()))
        assert held == set(map(id, self.tickets(error))), "a permit lost, or one too many"
        assert len(tree.line) == self.waiters - len(self.through), "a ghost in the line"
        for node in self.nodes():
            assert node.room == node.limit - entries(tree.held, node)
            assert node.waiting == entries(tree.line, node)
        for ticket in tree.line.values():
            assert any(it.room <= 0 for it in _tree.path(ticket.leaf)), "asleep beside a free permit"

    def look(self) -> object:
        return self.layers[-1].in_use if self.layers else self.gov.stats()

    def tickets(self, error: BaseException | None) -> list[_tree.Ticket]:
        """What can be reached and is held."""
        at_hand = [*self.permits, *self.through, *locals_of(error)]
        tickets = [getattr(it, "_ticket", None) for it in at_hand if isinstance(it, ConcurrencyPermit)]
        held = [it for it in tickets if it and it.state is _tree.HELD and it.leaf.tree is self.tree]
        return held + [ticket for layer in self.layers for ticket in layer._tickets]

    def mend(self, error: BaseException | None) -> None:
        """Give back what fell into the known holes: a finalizer's beginning, and a bare layer."""
        until(lambda: len(self.through) + len(self.tree.line) == self.waiters, "all to be awake")
        reachable = set(map(id, self.tickets(error)))
        for ticket in list(self.tree.held.values()):
            if id(ticket) not in reachable:
                self.tree.after.append(ticket)
                self.tree.serve()

    def finish(self) -> None:
        """Let everybody go: then all is back."""
        self.gov.resize(**self.limits)
        for permit in self.permits:
            permit.release()
        self.empty_the_layers()
        self.dismiss()
        self.empty_the_layers()
        tree = self.tree
        assert not any((tree.held, tree.line, tree.away, tree.after, tree.drains))
        for node in self.nodes():
            assert node.room == node.limit
        for gov in (self.gov, *self.agents):
            stats = gov.stats()
            assert stats.global_available == self.limits["max_global"]
            assert stats.streams_in_use == stats.tools_in_use == 0
            assert stats.streams_waiting == stats.tools_waiting == 0

    def empty_the_layers(self) -> None:
        for layer in self.layers:
            while layer._tickets:
                layer.release()
            with pytest.raises(ValueError, match="too many"):
                layer.release()

    def nodes(self) -> set[_tree.Node]:
        leaves = [leaf for gov in (self.gov, *self.agents) for leaf in (gov._streams, gov._tools)]
        leaves += [layer._node for layer in self.layers]
        return {node for leaf in leaves for node in _tree.path(leaf) if node.tree is self.tree}


def entries(book: dict[int, _tree.Ticket], node: _tree.Node) -> int:
    return sum(node in _tree.path(ticket.leaf) for ticket in book.values())


def locals_of(error: BaseException | None) -> list[object]:
    """What the frames that an error went through still have at hand."""
    found: list[object] = []
    trace = None if error is None else error.__traceback__
    while trace is not None:
        found += trace.tb_frame.f_locals.values()
        trace = trace.tb_next
    return found


def assert_sound(tree: _tree.Tree) -> None:
    assert tree.lock.acquire(timeout=5), "the lock was left taken"
    try:
        assert tree.dirty is None, "the books were not repaired"
    finally:
        tree.lock.release()


def elsewhere(work: Act) -> None:
    """Do some work in another thread, to its end."""
    with Crew() as crew:
        crew.start(work)


# --------------------------------------------------------------------------------- the scenarios

SCENARIOS: list[Any] = []


def scenario(**limits: Any) -> Callable[[Callable[[Stage], Act]], Callable[[Stage], Act]]:
    """Add a scenario: it gets a stage with these limits ready, and returns what is to be interrupted."""

    def add(prepare: Callable[[Stage], Act]) -> Callable[[Stage], Act]:
        SCENARIOS.append(pytest.param(lambda: staged(prepare, limits), id=prepare.__name__))
        return prepare

    return add


def staged(prepare: Callable[[Stage], Act], limits: dict[str, Any]) -> tuple[Stage, Act]:
    stage = Stage(**limits)
    return stage, prepare(stage)


@scenario()
def a_block(stage: Stage) -> Act:
    def act() -> None:
        with stage.gov.acquire_tool() as permit:
            assert permit.held

    return act


@scenario()
def a_block_that_is_listened_to(stage: Stage) -> Act:
    stage.gov.subscribe(Counter[object]().update)

    def act() -> None:
        with stage.gov.acquire_tool() as permit, permit.suspended():
            assert not permit.held

    return act


@scenario(tools=1)
def a_wait_that_is_listened_to(stage: Stage) -> Act:
    stage.hold(1)
    stage.gov.subscribe(Counter[object]().update)

    def act() -> None:
        with pytest.raises(AcquireTimeout):
            stage.gov.acquire_tool(timeout=0.001)

    return act


@scenario()
def a_block_through_an_agent(stage: Stage) -> Act:
    agent = stage.agent()

    def act() -> None:
        with agent.acquire_tool() as permit:
            assert permit.held

    return act


@scenario()
def a_block_through_nested_agents(stage: Stage) -> Act:
    agent = stage.agent("inner", of=stage.agent())

    def act() -> None:
        with agent.acquire_tool() as permit:
            assert permit.held

    return act


@scenario()
def a_block_beside_a_line(stage: Stage) -> Act:
    stage.hold(2)
    stage.line_up(1)

    def act() -> None:
        with stage.gov.acquire_stream() as permit:
            assert permit.held

    return act


@scenario()
def a_try(stage: Stage) -> Act:
    def act() -> None:
        permit = stage.gov.try_acquire_tool()
        if permit is not None:
            permit.release()

    return act


@scenario()
def a_try_in_vain(stage: Stage) -> Act:
    stage.hold(2)

    def act() -> None:
        stage.gov.try_acquire_tool()

    return act


@scenario()
def a_permit_that_is_dropped(stage: Stage) -> Act:
    def act() -> None:
        stage.gov.acquire_tool()

    return act


@scenario(tools=1)
def a_dropped_permit_that_goes_to_a_waiter(stage: Stage) -> Act:
    only = stage.hold(1)
    stage.line_up(1)

    def act() -> None:
        only.pop()

    return act


@scenario(tools=3)
def grants_to_three_waiters(stage: Stage) -> Act:
    permits = stage.hold(3)
    stage.line_up(3)

    def act() -> None:
        for permit in permits:
            permit.release()

    return act


@scenario(tools=2, everything=2)
def a_grant_to_the_other_kind(stage: Stage) -> Act:
    first, _ = stage.hold(2)
    stage.line_up(1, stage.gov.acquire_stream)
    stage.line_up(1)

    def act() -> None:
        first.release()

    return act


@scenario(tools=2)
def a_grant_to_an_agent(stage: Stage) -> Act:
    first, _ = stage.hold(2)
    stage.line_up(2, stage.agent("inner", of=stage.agent()).acquire_tool)

    def act() -> None:
        first.release()

    return act


@scenario(tools=1)
def a_wait_that_is_granted(stage: Stage) -> Act:
    (permit,) = stage.hold(1)
    stage.meanwhile = lambda: elsewhere(permit.release)

    def act() -> None:
        with stage.gov.acquire_tool() as permit:
            assert permit.held

    return act


@scenario(tools=1)
def a_wait_that_times_out(stage: Stage) -> Act:
    stage.hold(1)

    def act() -> None:
        try:
            stage.gov.acquire_tool(timeout=0.0001)
        except AcquireTimeout:
            pass

    return act


@scenario(tools=1)
def a_wait_that_times_out_before_others(stage: Stage) -> Act:
    stage.hold(1)
    stage.meanwhile = lambda: stage.line_up(1)

    def act() -> None:
        try:
            stage.gov.acquire_tool(timeout=0.0001)
        except AcquireTimeout:
            pass

    return act


@scenario(tools=1)
def no_wait_at_all(stage: Stage) -> Act:
    stage.hold(1)

    def act() -> None:
        try:
            stage.gov.acquire_tool(timeout=0)
        except AcquireTimeout:
            pass

    return act


@scenario(tools=1, max_queued=1)
def a_full_line(stage: Stage) -> Act:
    stage.hold(1)
    stage.line_up(1)

    def act() -> None:
        try:
            stage.gov.acquire_tool()
        except ConcurrencyLimitExceeded:
            pass

    return act


@scenario()
def a_suspension(stage: Stage) -> Act:
    def act() -> None:
        with stage.gov.acquire_tool() as permit, permit.suspended():
            assert not permit.held

    return act


@scenario(tools=1)
def a_suspension_that_others_use(stage: Stage) -> Act:
    (permit,) = stage.hold(1)
    stage.line_up(1)
    stage.meanwhile = stage.dismiss

    def act() -> None:
        with permit, permit.suspended():
            assert not permit.held

    return act


@scenario(tools=1)
def a_resumption_that_times_out(stage: Stage) -> Act:
    (permit,) = stage.hold(1)
    stage.line_up(1)

    def act() -> None:
        try:
            with permit, permit.suspended(timeout=0.0001):
                assert not permit.held
        except AcquireTimeout:
            pass

    return act


@scenario()
def a_suspension_of_all(stage: Stage) -> Act:
    def act() -> None:
        with stage.gov.acquire_tool() as tool, stage.gov.acquire_stream() as stream, governor.suspended():
            assert (tool.held, stream.held) == (False, False)

    return act


@scenario(tools=1)
def a_wait_that_closes_a_circle(stage: Stage) -> Act:
    def act() -> None:
        with stage.gov.acquire_tool() as permit:
            try:
                stage.gov.acquire_tool()
            except DeadlockError:
                assert permit.held

    return act


@scenario(tools=3)
def a_resize_that_closes_a_circle(stage: Stage) -> Act:
    def take() -> object:
        with stage.gov.acquire_tool() as first:
            stage.permits.append(first)
            return stage.gov.acquire_tool()

    stage.hold(2)
    stage.line_up(1, take)
    return lambda: stage.gov.resize(max_tools=1)


@scenario(tools=1)
def resizing_up_and_down(stage: Stage) -> Act:
    stage.hold(1)
    stage.line_up(3)

    def act() -> None:
        stage.gov.resize(max_tools=3, max_global=2)
        stage.gov.resize(max_global=4)
        stage.gov.resize(max_tools=1)

    return act


@scenario(tools=1)
def closing_before_a_line(stage: Stage) -> Act:
    stage.hold(1)
    stage.line_up(2)
    return lambda: stage.gov.close()


@scenario()
def draining(stage: Stage) -> Act:
    (permit,) = stage.hold(1)
    stage.meanwhile = lambda: elsewhere(permit.release)
    return lambda: stage.gov.drain()


@scenario()
def draining_in_vain(stage: Stage) -> Act:
    stage.hold(1)
    return lambda: stage.gov.drain(timeout=0.0001)


@scenario()
def looking(stage: Stage) -> Act:
    stage.hold(1)
    return lambda: (stage.gov.stats(), stage.gov.closed, repr(stage.gov))


@scenario()
def an_agent_that_comes_and_goes(stage: Stage) -> Act:
    def act() -> None:
        agent = stage.gov.agent("brief", max_tools=1)
        with agent.acquire_tool():
            stage.gov.agent("brief", max_tools=1)
        agent.close()

    return act


@scenario()
def a_shared_governor_that_comes_and_goes(stage: Stage) -> Act:
    shared = ConcurrencyGovernor.shared
    shared("brief", max_tools=1).close()

    def act() -> None:
        with shared("brief", max_tools=1) as gov, gov.acquire_tool():
            shared("brief", max_tools=1)

    return act


@scenario()
def a_layer(stage: Stage) -> Act:
    layer = stage.layer(1)

    def act() -> None:
        with layer:
            assert layer.in_use == 1

    return act


@scenario()
def layers_below_layers(stage: Stage) -> Act:
    layer = stage.layer(2, parent=stage.layer(2, parent=stage.layer(2)))

    def act() -> None:
        layer.acquire()
        layer.acquire(timeout=1)
        layer.acquire(blocking=False)
        layer.release(2)

    return act


@scenario()
def a_layer_that_others_wait_for(stage: Stage) -> Act:
    layer = stage.layer(1)
    layer.acquire()
    stage.line_up(1, lambda: layer.acquire() and layer)

    def act() -> None:
        layer.release()

    return act


# ----------------------------------------------------------------------- at each and every point


def perform(
    injector: Injector, build: Any, *plan: int, handler: Callable[[Stage], Act] | None = None
) -> tuple[Stage, BaseException | None]:
    """Play a scenario to its end, with signals that arrive according to plan."""
    stage, act = build()
    strike = interrupt if handler is None else handler(stage)

    def happens() -> None:
        injector.rest()
        if stage.meanwhile is not None:
            stage.meanwhile()
        injector.count()

    def lock() -> Any:
        here = threading.get_ident() == injector.main
        return Gate(happens) if here and stage.meanwhile else threading.Lock()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tree, "Lock", lock)
        # The error in no variable, as its frames lead back to this one: that would be a cycle.
        return stage, injector.run(act, *plan, strike=strike)


@pytest.mark.parametrize("build", SCENARIOS)
def test_an_interrupt_anywhere_is_repaired_at_once(injector: Injector, build: Any) -> None:
    def run(*plan: int) -> None:
        stage, error = perform(injector, build, *plan)
        if injector.missed or stage.layers:
            stage.mend(error)
        stage.check(error)
        del error
        stage.finish()

    points = [injector.points[-1] for _ in every_point(injector, run)]
    print(f"{len(points)} points")


@pytest.mark.parametrize(
    "build",
    [
        it
        for it in SCENARIOS
        if it.id in ("a_block", "a_suspension", "grants_to_three_waiters", "a_wait_that_times_out")
    ],
)
def test_a_second_interrupt_anywhere_is_repaired_by_the_next_operation(
    injector: Injector, build: Any
) -> None:
    def run(*plan: int) -> None:
        stage, error = perform(injector, build, *plan)
        elsewhere(stage.look)
        if injector.missed or stage.layers:
            stage.mend(error)
        stage.check(error)
        del error
        stage.finish()

    def first(*plan: int) -> None:
        stage, error = perform(injector, build, *plan)
        if injector.missed or stage.layers:
            stage.mend(error)
        del error
        stage.finish()

    pairs = 0
    for n in list(every_point(injector, first))[::SAMPLE]:
        pairs += sum(1 for _ in every_point(injector, partial(run, n)))
    print(f"{pairs} pairs")
