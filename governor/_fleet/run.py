"""``governor fleet run``: a command under a permit, as flock(1) has one under a lock."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from governor import AcquireTimeout, ConcurrencyLimitExceeded, GovernorEvent
from governor._fleet.member import Failure, member

__all__ = ["run"]

# EX_TEMPFAIL of sysexits.h: try again later.
_NO_PERMIT = 75
# What shells return.
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127

# Those there are: Windows has few of them.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
# A terminal sends these to all processes in its foreground, so to the child as well.
_OF_TERMINALS = {"SIGHUP", "SIGINT", "SIGQUIT"}


def run(arguments: argparse.Namespace) -> int:
    """Run the command under a permit, and return its exit status."""
    status, ran = 1, False
    with _Relay() as relay:
        try:
            with member(arguments) as fleet:
                gov = fleet
                if arguments.agent is not None:
                    gov = fleet.agent(
                        arguments.agent, max_tools=arguments.max_tools, max_streams=arguments.max_streams
                    )
                fleet.subscribe(_tell_of_loss)
                try:
                    permit = gov.acquire(arguments.kind, arguments.timeout)
                except (AcquireTimeout, ConcurrencyLimitExceeded) as refusal:
                    _say(str(refusal))
                    return _NO_PERMIT
                try:
                    ran = True
                    status = relay.run(arguments.program)
                finally:
                    permit.release()  # the end of a with block would fail where it is lost
        except Failure as failure:
            if not ran:
                raise
            _say(str(failure))  # but the command has run, and that is what was asked for
    return status


def _tell_of_loss(event: GovernorEvent) -> None:
    """Say it when the permit is lost. Whether the command may be stopped halfway only the user knows."""
    if event.event == "lost":
        _say("the permit is lost, and others may be granted the place; the command goes on")


def _say(message: str) -> None:
    print(f"governor fleet run: {message}", file=sys.stderr, flush=True)


class _Relay:
    """Runs a child, to which it passes on this process's signals. Before and after, they end the block."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            # What is ignored, by nohup for example, stays so, for the child too.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Run a command, and return the status that a shell would."""
        self._early = []  # from here on there may be a child that must not be left alone
        try:
            self._child = child = subprocess.Popen(command)
        except OSError as error:
            self._early = None
            _say(f"{command[0]}: {error.strerror}")
            return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        for number in self._early:
            self._pass_on(child, number)
        status = child.wait()
        self._child = self._early = None
        return 128 - status if status < 0 else status

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._child is not None:
            self._pass_on(self._child, number)
        elif self._early is not None:
            self._early.append(number)
        else:
            raise SystemExit(128 + number)

    @staticmethod
    def _pass_on(child: subprocess.Popen[bytes], number: int) -> None:
        if os.name == "nt" or (signal.Signals(number).name in _OF_TERMINALS and _is_in_foreground()):
            return  # the child has it already, and would take a second one for impatience
        child.send_signal(number)


def _is_in_foreground() -> bool:
    """Tell whether this process, and so its child, is what the terminal's keys send signals to."""
    if sys.platform == "win32":
        return True
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
