"""When a wait can never end: who owns what, who waits for what, and the circle that they close."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Hashable, Mapping
from types import CodeType, FrameType
from typing import TypeVar

__all__ = ["find_circle", "is_inside"]

T = TypeVar("T", bound=Hashable)  # a thread
L = TypeVar("L", bound=Hashable)  # a layer


def find_circle(
    me: T,
    waits: Mapping[T, Collection[L]],
    owns: Mapping[T, Mapping[L, int]],
    limits: Mapping[L, int],
) -> list[T] | None:
    """Return the threads of a circle of waits that includes ``me``, with ``me`` first, or None.

    It is the test for a deadlock among resources of several units each: whoever could go on is
    taken to give back all it has, and who is left then waits for ever (E. G. Coffman, M. J. Elphick
    and A. Shoshani, "System Deadlocks", Computing Surveys 3 (1971)). A layer whose limit is 0 is
    paused, and nobody is stuck on it.

    Args:
        me: The thread whose wait may close a circle.
        waits: The layers that each thread waits for, all of which it needs; threads that wait
            without a timeout only.
        owns: How much of each layer a thread alone can give back.
        limits: The limit of each layer.
    """
    stuck = _stuck(waits, owns, limits)
    if me not in stuck:
        return None
    others = {thread: layers for thread, layers in waits.items() if thread != me}
    if _full(waits[me], _stuck(others, owns, limits), owns, limits):
        return None  # it waits for a circle that others are in
    circle, queue = [me], deque([me])
    while queue:
        full = {*_full(waits[queue.popleft()], stuck, owns, limits)}
        for thread in stuck.difference(circle):
            if not full.isdisjoint(owns.get(thread, ())):
                circle.append(thread)
                queue.append(thread)
    return circle


def _stuck(
    waits: Mapping[T, Collection[L]], owns: Mapping[T, Mapping[L, int]], limits: Mapping[L, int]
) -> set[T]:
    """Return the threads whose waits can never end: the greatest set of which each waits for the rest."""
    stuck = set(waits)
    while gone := {thread for thread in stuck if not _full(waits[thread], stuck, owns, limits)}:
        stuck -= gone
    return stuck


def _full(
    layers: Collection[L], threads: Collection[T], owns: Mapping[T, Mapping[L, int]], limits: Mapping[L, int]
) -> list[L]:
    """Return which of these layers stay full unless one of these threads gives something back."""
    kept: Counter[L] = Counter()
    for thread in threads:
        kept.update(owns.get(thread, {}))
    return [layer for layer in layers if 0 < limits[layer] <= kept[layer]]


def is_inside(number: int, entry: int, frame: FrameType | None) -> bool:
    """Whether a thread is inside the ``with`` block that it entered in a certain frame.

    As long as the block is not left, its frame is on the stack of a thread, or that of a generator
    that has moved on, and is alive. So the frame's hash, which is its address, tells it from others.
    What was entered by a mere call of ``__enter__``, as an ExitStack does, proves nothing.

    Args:
        number: The hash of the frame.
        entry: The instruction that the frame was at when it entered.
        frame: The thread's innermost frame.
    """
    while frame is not None:
        if hash(frame) == number:
            return _is_with(frame.f_code, entry)
        frame = frame.f_back
    return False


def _is_with(code: CodeType, offset: int) -> bool:
    import dis  # seldom needed, and slow to load

    before = ""
    for instruction in dis.get_instructions(code):
        if instruction.offset == offset:
            name = instruction.opname
            return name == "BEFORE_WITH" or (name == "CALL" and before == "LOAD_SPECIAL")
        if instruction.opname != "CACHE":
            before = instruction.opname
    return False
