"""Signals that arrive just before a chosen instruction, so that each place to be interrupted is tried."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType, SimpleNamespace
from typing import Any, Self

from governor import ConcurrencyError
from governor._tree import Ticket

__all__ = ["Gate", "Injector", "Interrupted", "every_point", "interrupt"]

Act = Callable[[], object]
Point = tuple[CodeType, int]


class Interrupted(BaseException):
    """What signal handlers raise here. Like KeyboardInterrupt, no Exception."""


def interrupt() -> None:
    raise Interrupted


class Injector:
    """Makes SIGINT arrive just before a chosen instruction of the package, or of a scenario.

    From the arrival to the point where CPython handles the signal no Python code of the injector's
    runs, or it would be that code that is interrupted.

    Attributes:
        trail: The instructions run since the last signal, or since the start.
        points: Where signals were handled, or by which call of something that is not counted.
        missed: Whether one met the known hole, the first instruction of a dropped permit's finalizer.
    """

    def __init__(self) -> None:
        self.codes = {*package_codes()}
        assert len(self.codes) > 100
        self.main = threading.get_ident()
        self.trail: list[Point] = []
        self.points: list[Point] = []
        self.missed = False
        self._plan: list[int] = []
        self._strike: Act = interrupt
        self._running = False

    def run(self, act: FunctionType, *plan: int, strike: Act = interrupt) -> BaseException | None:
        """Call ``act``; a signal arrives when as many instructions as ``plan`` begins with have run.

        Each further number counts from the signal before. The handler calls ``strike``. Returns the
        interrupt, or the error of the package's, that ended ``act``.
        """
        self.trail, self.points, self.missed = [], [], False
        self._plan, self._strike, self._running = [*plan], strike, True
        for code in codes_in(act.__code__):
            self.codes.add(code)
            self.watch(code)
        try:
            try:
                self.count()
                act()
            finally:
                self._running = False
                self.rest()
        except (Interrupted, ConcurrencyError) as error:
            # Without this very frame, which would keep the error, and all permits, in a cycle.
            return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        return None

    @property
    def pending(self) -> bool:
        """Whether ``act`` ended too early for a signal."""
        return bool(self._plan)

    def handle(self, frame: FrameType) -> None:
        """Be the signal handler, once counting has ended."""
        finalizer = Ticket.__call__.__code__
        self.missed |= frame.f_code is finalizer and frame.f_lineno == finalizer.co_firstlineno
        while frame.f_code not in self.codes and frame.f_back is not None:
            frame = frame.f_back  # out of what is not counted
        self.points.append((frame.f_code, frame.f_lasti))
        del self._plan[0]
        if self._plan or len(self.points) == 1:
            self.trail = []
            self.count()
        self._strike()

    def due(self, point: Point) -> bool:
        """Note which instruction comes next. Returns whether a signal is due after it."""
        self.trail.append(point)
        return bool(self._plan) and len(self.trail) >= self._plan[0]

    def watch(self, code: CodeType) -> None:
        """Have the instructions of ``code``, which is one of ``codes``, counted from now on."""

    def count(self) -> None:
        """Begin, or go on, to count, and have the signal sent when it is due; but after the end of a run."""
        if self._running:
            self._count()

    def _count(self) -> None:
        raise NotImplementedError

    def rest(self) -> None:
        """Stop counting."""
        raise NotImplementedError


class Monitoring(Injector):
    """By ``sys.monitoring``, whose callback may be C: PyErr_SetInterrupt itself."""

    def __enter__(self) -> Self:
        self.tool, self.event = 4, sys.monitoring.events.INSTRUCTION
        sys.monitoring.use_tool_id(self.tool, "interrupts")
        self.send, self.sent = c_function("PyErr_SetInterrupt", NOTHING, NOTHING), False
        for code in self.codes:
            self.watch(code)
        self.former = signal.signal(signal.SIGINT, self.on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.former)
        for code in self.codes:
            sys.monitoring.set_local_events(self.tool, code, 0)
        sys.monitoring.free_tool_id(self.tool)

    def watch(self, code: CodeType) -> None:
        sys.monitoring.set_local_events(self.tool, code, self.event)

    def _count(self) -> None:
        sys.monitoring.register_callback(self.tool, self.event, self.on_instruction)

    def rest(self) -> None:
        sys.monitoring.register_callback(self.tool, self.event, None)

    def on_instruction(self, code: CodeType, offset: int) -> None:
        if threading.get_ident() == self.main and self.due((code, offset)):
            self.sent = True
            sys.monitoring.register_callback(self.tool, self.event, self.send)

    def on_signal(self, _number: int, frame: Any) -> None:
        if self.sent:  # or else another thread has just met the callback, and sent it once more
            self.sent = False
            self.rest()
            self.handle(frame)


class Tracing(Injector):
    """By ``sys.settrace``: when a signal is due, PyErr_SetInterrupt becomes the C trace function."""

    def __enter__(self) -> Self:
        self.trace = c_function("PyEval_SetTrace", ctypes.c_void_p, ctypes.c_void_p)
        self.send = ctypes.cast(ctypes.pythonapi.PyErr_SetInterrupt, ctypes.c_void_p)
        # The handler must end the tracing before its own first instruction, which would be traced:
        # so it is PyEval_SetTrace(NULL, NULL), and only what looks at its result is Python.
        on_signal = c_function("PyEval_SetTrace", NOTHING, NOTHING)
        on_signal.errcheck = lambda _result, _function, args: self.handle(args[1])
        self.former = signal.signal(signal.SIGINT, on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.former)

    def _count(self) -> None:
        sys.settrace(self.on_call)

    def rest(self) -> None:
        self.trace(None, None)

    def on_call(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if frame.f_code not in self.codes:
            return None
        frame.f_trace_opcodes = True
        return self.on_event

    def on_event(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "opcode" and self.due((frame.f_code, frame.f_lasti)):
            self.trace(self.send, None)
        return self.on_event


# As the type of an argument of a C function: whatever is passed, it gets NULL.
NOTHING = SimpleNamespace(from_param={}.get)


def c_function(name: str, *arguments: Any) -> Any:
    """Return a function of CPython's own API."""
    function = ctypes.PYFUNCTYPE(None)((name, ctypes.pythonapi))
    function.argtypes = arguments
    return function


def codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def package_codes() -> Iterator[CodeType]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "governor":
            for it in vars(module).values():
                for member in (it, *vars(it).values()) if isinstance(it, type) else (it,):
                    function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
                    # What is imported from elsewhere may be left with a lock taken.
                    if isinstance(function, FunctionType) and function.__module__ == name:
                        yield from codes_in(function.__code__)


def every_point(injector: Injector, run: Callable[..., object]) -> Iterator[int]:
    """Call ``run(n)`` for each n for which the signal is handled somewhere else, and yield n.

    ``run()`` goes without that signal. A signal is handled at the first point that looks for one:
    those sent between that point and the one before are all the same.
    """
    run()
    trail, n = injector.trail, 1
    while n < len(trail):
        run(n)
        yield n
        n = n + 1 if injector.pending else past(injector.points[-1], trail, n)


def past(point: Point, trail: list[Point], n: int) -> int:
    """Return the first number after n whose signal may be handled at another point than this."""
    same = [number for number, (code, _) in enumerate(trail) if code is point[0]]
    earlier, later = [it for it in same if it < n], [it for it in same if it >= n]
    if earlier and trail[earlier[-1]] == point:  # a call, under way: handled when it is over
        return max(later[0], n + 1) if later else len(trail)
    if point in trail:
        later = [it + 1 for it in later if trail[it] == point]
    # A function's first instruction is not listed, but looks for signals; nor is what comes in the end.
    return max(later[0], n + 1) if later else len(trail) if not same else n + 1


class Gate:
    """A lock before which, where it would wait, something happens elsewhere."""

    def __init__(self, meanwhile: Act) -> None:
        self._lock = threading.Lock()
        self._meanwhile: Act | None = meanwhile

    def acquire(self, *args: Any) -> bool:
        if self._lock.locked() and self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        return self._lock.acquire(*args)

    def release(self) -> None:
        self._lock.release()
