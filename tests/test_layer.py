"""The layer: CPython's own semaphore tests, and what a layer can do beyond a semaphore."""

from __future__ import annotations

import threading
import unittest
from collections.abc import Callable
from time import monotonic

import pytest
from threads import Crew, until

from governor import Layer, SemaphoreClosed


def tower(*limits: int) -> list[Layer]:
    """Layers of these limits, each the parent of the one before it; the leaf comes first."""
    layers: list[Layer] = []
    for limit in reversed(limits):
        layers.insert(0, Layer(limit, parent=layers[0] if layers else None))
    return layers


OPEN = threading.Event()
OPEN.set()


def line_up(crew: Crew, layer: Layer, served: list[str], label: str, gate: threading.Event = OPEN) -> None:
    """Put one more in line. Once served, it notes its label, and gives back when the gate is open."""

    def work() -> None:
        with layer:
            served.append(label)
            gate.wait()

    before = layer.waiting
    crew.start(work, name=label)
    until(lambda: layer.waiting == before + 1, f"{label} in line")


def expect_closed(layer: Layer) -> None:
    with pytest.raises(SemaphoreClosed):
        layer.acquire()


# -------------------------------------------------------------------------- as a bounded semaphore


def under_a_roomy_parent(value: int = 1) -> Layer:
    return Layer(value, parent=Layer(1000))


def under_roomy_ancestors(value: int = 1) -> Layer:
    return tower(value, 1000, 1000, 1000)[0] if value >= 0 else Layer(value)


@pytest.mark.parametrize("semtype", [Layer, under_a_roomy_parent, under_roomy_ancestors])
def test_cpythons_own_tests_of_bounded_semaphores_pass(semtype: Callable[..., Layer]) -> None:
    why = "the tests of the stdlib are not installed"
    lock_tests = pytest.importorskip("test.lock_tests", reason=why)

    def test_repr(case: unittest.TestCase) -> None:
        layer = semtype(3)
        for used in range(3):
            assert repr(layer) == f"<governor.Layer 'layer' {used}/3 in use, 0 waiting at {id(layer):#x}>"
            layer.acquire()

    body = {"semtype": staticmethod(semtype), "test_repr": test_repr}
    cases = type("LayerTests", (lock_tests.BoundedSemaphoreTests,), body)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(cases).run(result)
    assert result.failures + result.errors == []
    assert result.testsRun >= 12


def test_a_layer_is_a_bounded_semaphore() -> None:
    assert isinstance(Layer(), threading.BoundedSemaphore)


def test_of_a_new_layer_one_can_be_had() -> None:
    layer = Layer()
    assert (layer.limit, layer.in_use, layer.available, layer.waiting, layer.closed) == (1, 0, 1, 0, False)


def test_a_block_holds_one_and_gives_it_back_when_it_fails() -> None:
    layer = Layer(2)
    with pytest.raises(ZeroDivisionError), layer as taken:
        assert taken is True
        assert (layer.in_use, layer.available) == (1, 1)
        raise ZeroDivisionError
    assert (layer.in_use, layer.available) == (0, 2)


def test_what_one_thread_took_another_may_give_back() -> None:
    layer = Layer()
    layer.acquire()
    with Crew() as crew:
        crew.start(layer.release)
    assert layer.available == 1


@pytest.mark.parametrize("n", [1, 3])
def test_giving_back_more_than_is_held_is_refused_and_gives_nothing_back(n: int) -> None:
    layer, root = tower(5, 9)
    for _ in range(n - 1):
        layer.acquire()
    with pytest.raises(ValueError, match="released too many times"):
        layer.release(n)
    assert layer.in_use == root.in_use == n - 1
    for _ in range(n - 1):
        layer.release()
    assert layer.in_use == root.in_use == 0


@pytest.mark.parametrize("n", [0, -1])
def test_giving_back_less_than_one_is_refused(n: int) -> None:
    layer = Layer()
    with layer:
        with pytest.raises(ValueError, match="one or more"):
            layer.release(n)
        assert layer.in_use == 1


def test_a_child_does_not_give_back_what_its_parent_took() -> None:
    child, parent = tower(1, 1)
    parent.acquire()
    with pytest.raises(ValueError, match="released too many times"):
        child.release()
    assert parent.in_use == 1


@pytest.mark.parametrize("timeout", [0, 1e-9, 0.05])
def test_a_timeout_ends_the_wait_not_before_its_time_and_leaves_no_trace(timeout: float) -> None:
    layer = Layer()
    with layer:
        began = monotonic()
        assert layer.acquire(timeout=timeout) is False
        assert monotonic() - began >= timeout
        assert (layer.in_use, layer.waiting) == (1, 0)


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e300, threading.TIMEOUT_MAX * 2, 10**400])
def test_a_timeout_without_end_waits_until_it_is_served(timeout: float | None) -> None:
    layer = Layer()
    layer.acquire()
    with Crew() as crew:
        crew.start(layer.acquire, True, timeout)
        until(lambda: layer.waiting == 1, "one in line")
        layer.release()
    assert layer.in_use == 1


def test_a_place_given_back_goes_to_who_waits_not_to_who_comes() -> None:
    layer, served, gate = Layer(), [], threading.Event()
    layer.acquire()
    with Crew() as crew:
        line_up(crew, layer, served, "first", gate)
        layer.release()
        assert layer.acquire(blocking=False) is False
        gate.set()
    assert served == ["first"]


# --------------------------------------------------------------------------------- under a parent

TOWERS = [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("limits", TOWERS)
def test_one_of_a_layer_is_one_of_every_layer_above_it(limits: tuple[int, ...]) -> None:
    layers = tower(*limits)
    with layers[0]:
        assert [it.in_use for it in layers] == [1] * len(layers)
    assert [it.available for it in layers] == list(limits)


@pytest.mark.parametrize(("limits", "full"), [(it, full) for it in TOWERS for full in range(len(it))])
@pytest.mark.parametrize("timeout", [None, 0, 0.001])
def test_where_one_layer_is_full_none_is_taken(
    limits: tuple[int, ...], full: int, timeout: float | None
) -> None:
    layers = tower(*limits)
    for _ in range(limits[full]):
        layers[full].acquire()
    before = [it.in_use for it in layers]
    assert layers[0].acquire(timeout is not None, timeout) is False
    assert [it.in_use for it in layers] == before
    assert [it.waiting for it in layers] == [0] * len(layers)


@pytest.mark.parametrize("limits", TOWERS[1:])
def test_who_waits_for_the_root_is_counted_in_line_and_holds_nothing(limits: tuple[int, ...]) -> None:
    layers, served = tower(*limits), []
    *below, root = layers
    for _ in range(limits[-1]):
        root.acquire()
    with Crew() as crew:
        line_up(crew, layers[0], served, "waiter")
        assert [it.in_use for it in below] == [0] * len(below)
        assert [it.waiting for it in layers] == [1] * len(layers)
        root.release()
    assert served == ["waiter"]


def test_a_full_layer_leaves_its_sibling_the_rest_of_the_parent() -> None:
    parent = Layer(3)
    full, free = Layer(1, parent=parent), Layer(5, parent=parent)
    with Crew() as crew, full:
        line_up(crew, full, [], "waiter")
        assert [free.acquire(blocking=False) for _ in range(3)] == [True, True, False]
        free.release(2)


def test_siblings_are_served_in_the_order_of_their_coming() -> None:
    parent, served = Layer(1), []
    left, right = Layer(1, parent=parent), Layer(1, parent=parent)
    parent.acquire()
    with Crew() as crew:
        for number, layer in enumerate([left, right, parent, right, left]):
            line_up(crew, layer, served, str(number))
        parent.release()
    assert served == ["0", "1", "2", "3", "4"]


# ----------------------------------------------------------------------------------------- resize


def test_growing_admits_at_once_as_many_as_there_is_room_for_the_first_first() -> None:
    layer, served, gate = Layer(1), [], threading.Event()
    layer.acquire()
    with Crew() as crew:
        for number in range(4):
            line_up(crew, layer, served, str(number), gate)
        layer.resize(3)
        assert (layer.in_use, layer.waiting, layer.limit) == (3, 2, 3)
        until(lambda: len(served) == 2, "two served")
        assert sorted(served) == ["0", "1"]
        gate.set()
        layer.release()


def test_shrinking_revokes_nothing_and_holds_as_places_come_back() -> None:
    layer = Layer(3)
    for _ in range(3):
        layer.acquire()
    layer.resize(1)
    assert (layer.in_use, layer.available, layer.limit) == (3, 0, 1)
    layer.release(2)
    assert (layer.in_use, layer.available) == (1, 0)
    assert layer.acquire(blocking=False) is False
    layer.release()
    assert layer.acquire(blocking=False) is True


def test_a_layer_at_zero_is_paused_until_it_grows() -> None:
    layer, served = Layer(0), []
    assert layer.acquire(blocking=False) is False
    with Crew() as crew:
        line_up(crew, layer, served, "waiter")
        layer.resize(1)
    assert served == ["waiter"]


def test_growing_a_parent_admits_who_waits_below_it() -> None:
    child, parent = tower(2, 0)
    with Crew() as crew:
        line_up(crew, child, [], "waiter")
        parent.resize(1)


# ------------------------------------------------------------------------------------------ close


@pytest.mark.parametrize(("limits", "closed"), [(it, which) for it in TOWERS for which in range(len(it))])
def test_closing_wakes_every_waiter_below_and_refuses_newcomers(limits: tuple[int, ...], closed: int) -> None:
    layers = tower(*limits)
    leaf = layers[0]
    leaf.acquire()
    with Crew() as crew:
        for _ in range(3):
            crew.start(expect_closed, leaf)
        until(lambda: leaf.waiting == 3, "three in line")
        layers[closed].close()
    assert leaf.closed
    expect_closed(leaf)
    assert leaf.acquire(blocking=False) is False
    assert leaf.waiting == 0
    leaf.release()
    expect_closed(leaf)
    assert leaf.acquire(blocking=False) is False
    assert [it.in_use for it in layers] == [0] * len(layers)
    assert [it.closed for it in layers] == [number <= closed for number in range(len(layers))]


def test_closing_a_layer_stops_neither_its_parent_nor_its_sibling() -> None:
    parent = Layer(2)
    left, right = Layer(1, parent=parent), Layer(1, parent=parent)
    left.close()
    left.close()
    assert (left.closed, right.closed, parent.closed) == (True, False, False)
    with right, parent:
        assert parent.in_use == 2


def test_closing_lets_the_waiters_of_a_sibling_pass() -> None:
    parent, served = Layer(1), []
    left, right = Layer(1, parent=parent), Layer(1, parent=parent)
    parent.acquire()
    with Crew() as crew:
        crew.start(expect_closed, left)
        until(lambda: left.waiting == 1, "the left in line")
        line_up(crew, right, served, "right")
        left.close()
        parent.release()
    assert served == ["right"]


def test_a_layer_under_a_closed_parent_is_closed() -> None:
    parent = Layer()
    parent.close()
    child = Layer(parent=parent)
    assert child.closed
    expect_closed(child)


def test_a_closed_layer_stays_closed_when_it_is_resized() -> None:
    layer = Layer()
    layer.close()
    layer.resize(5)
    expect_closed(layer)


def test_the_refusal_of_a_closed_layer_names_it() -> None:
    layer = Layer(name="gpu")
    layer.close()
    with pytest.raises(SemaphoreClosed, match=r"^no place in 'gpu': closed$"):
        layer.acquire()


# ---------------------------------------------------------------------------------------- the rest


def test_its_repr_tells_what_it_is_called_and_how_full_it_is() -> None:
    layer = Layer(4, name="gpu")
    layer.acquire()
    layer.close()
    assert repr(layer).startswith("<governor.Layer 'gpu' 1/4 in use, 0 waiting closed at 0x")


@pytest.mark.parametrize("value", [2**63 - 1, 10**30])
def test_a_huge_limit_is_a_limit(value: int) -> None:
    layer = Layer(value, parent=Layer(value))
    with layer:
        assert (layer.limit, layer.available, layer.in_use) == (value, value - 1, 1)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), *((it, TypeError) for it in (True, 1.0, float("nan"), "1", None, [], 1j))],
)
def test_a_bad_limit_is_refused_and_changes_nothing(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"value must be an integer >= 0, not "):
        Layer(value)  # type: ignore[arg-type]
    layer = Layer(2)
    with pytest.raises(error, match=r"limit must be an integer >= 0, not "):
        layer.resize(value)  # type: ignore[arg-type]
    assert layer.limit == 2


@pytest.mark.parametrize(
    ("timeout", "error"),
    [*((it, ValueError) for it in (-1, float("nan"), float("-inf"))), (True, TypeError), ("1", TypeError)],
)
def test_a_bad_timeout_is_refused_and_takes_nothing(timeout: object, error: type[Exception]) -> None:
    layer = Layer()
    with pytest.raises(error, match="timeout must be a number of seconds >= 0 or None, not "):
        layer.acquire(timeout=timeout)  # type: ignore[arg-type]
    assert layer.in_use == 0


@pytest.mark.parametrize("parent", [1, "root", threading.BoundedSemaphore()])
def test_only_a_layer_can_be_a_parent(parent: object) -> None:
    with pytest.raises(TypeError, match="parent must be a Layer or None, not "):
        Layer(parent=parent)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "error"), [("", ValueError), (5, TypeError), (b"gpu", TypeError)])
def test_a_bad_name_is_refused(name: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="name must be a string that is not empty, not "):
        Layer(name=name)  # type: ignore[arg-type]
