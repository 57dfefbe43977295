"""What one sees while the demo runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

from governor._demo.regime import Level

__all__ = ["LiveScreen", "Moment", "PlainScreen", "Screen", "SilentScreen", "screen_for"]


@dataclass(frozen=True)
class Moment:
    """The state of a run, to be drawn.

    Attributes:
        elapsed: Seconds since it began.
        seconds: Seconds that it lasts in all.
        layers: The layers that all agents share.
        agents: Each agent's own layer of tools.
    """

    elapsed: float
    seconds: float
    layers: Sequence[Level]
    agents: Sequence[Level]


class Screen(Protocol):
    """Shows the moments of a run as they come, one every `every` seconds."""

    every: float

    def begin(self, title: str) -> None:
        """Prepare for a run, announced by its title."""
        ...

    def show(self, moment: Moment) -> None:
        """Show the state of the run."""
        ...


class SilentScreen:
    """Shows nothing, for ``--json``."""

    every = 0.5

    def begin(self, title: str) -> None:
        """Do nothing."""

    def show(self, moment: Moment) -> None:
        """Do nothing."""


class PlainScreen:
    """Prints a line for each moment: for files, pipes and logs."""

    every = 0.5

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def begin(self, title: str) -> None:
        """Print the title, which the lines of the run stand under."""
        print(title, file=self._out, flush=True)

    def show(self, moment: Moment) -> None:
        """Print the moment, at once: a log is read while it is written."""
        levels = " | ".join(_words(level) for level in (*moment.layers, *moment.agents))
        print(f"{moment.elapsed:6.1f} s | {levels}", file=self._out, flush=True)


class LiveScreen:
    """Draws each moment over the one before, on a terminal that knows ANSI sequences."""

    every = 0.1

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._height = 0

    def begin(self, title: str) -> None:
        """Print the title, and draw the moments below it."""
        self._height = 0
        print(title, file=self._out, flush=True)

    def show(self, moment: Moment) -> None:
        """Go up to where the last picture begins, and draw over it."""
        lines = draw(moment, shutil.get_terminal_size())
        up = f"\x1b[{self._height}F" if self._height else ""
        # Each line is cleared where the picture before may have been wider; so is what
        # lies below the last.
        body = "".join(f"{line}\x1b[K\n" for line in lines)
        print(f"{up}{body}\x1b[J", end="", file=self._out, flush=True)
        self._height = len(lines)


def screen_for(out: TextIO) -> Screen:
    """Return the screen that suits an output: live on a terminal, else plain."""
    return LiveScreen(out) if out.isatty() and _knows_ansi() else PlainScreen(out)


def _knows_ansi() -> bool:
    """Tell whether a terminal here draws by ANSI sequences: the old Windows console may not."""
    if sys.platform == "win32":
        return "WT_SESSION" in os.environ
    return os.environ.get("TERM", "dumb") != "dumb"


def draw(moment: Moment, size: os.terminal_size) -> list[str]:
    """Draw a moment as lines that fit a terminal of this size."""
    label = max(len(level.name) for level in (*moment.layers, *moment.agents))
    bar = max(10, min(40, size.columns - label - 34))  # 34 for the counts and the gaps
    lines = [
        f"  {moment.elapsed:.1f} of {moment.seconds:.1f} s",
        *(_line(level, label, bar) for level in moment.layers),
        "  tools of each agent:",
        *(_line(level, label, bar) for level in moment.agents),
    ]
    room = size.lines - 1  # the cursor stands below the picture
    if len(lines) > room:
        lines[room - 1 :] = [f"  and {len(lines) - room + 1} more, on a taller terminal"]
    return [line[: size.columns - 1] for line in lines]


def _line(level: Level, label: int, bar: int) -> str:
    """Draw a layer: its name, a bar that is full at the limit, the counts."""
    filled = min(bar, bar * level.in_use // level.limit)
    return (
        f"  {level.name:<{label}} [{'#' * filled}{'-' * (bar - filled)}]"
        f" {f'{level.in_use}/{level.limit}':>7}{_remark(level)}"
    )


def _words(level: Level) -> str:
    """Write a layer out: its name and its counts."""
    return f"{level.name} {level.in_use}/{level.limit}{_remark(level)}"


def _remark(level: Level) -> str:
    """Return what is out of the ordinary with a layer, if anything is."""
    if level.in_use > level.limit:
        return f"  {level.in_use - level.limit} over"
    return f"  {level.waiting} waiting" if level.waiting else ""
