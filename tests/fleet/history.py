"""What many processes had, and when: written down by each, and checked as one.

Each process writes lines into a file of its own. A grant is written after the permit is had, and a
release before it is given back, by the one clock of the host: so an interval is never longer than
the true one, and where too many of them overlap, a limit was passed for certain.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from time import monotonic_ns
from typing import Any

__all__ = ["History", "Verdict", "check"]


class History:
    """A file to which one process appends what happens to its permits.

    A line is a time in nanoseconds, an event, a fencing number, the path of the permit and the
    process's id, with ``-`` for what does not apply. The events:

    - ``grant``, ``release``: the interval.
    - ``lost``: the permit was lost; it was good when this was last known, by ``grant`` or ``held``.
    - ``held``: it was not lost at that time.
    - ``killed``: the process has nothing from then on, whatever it writes; written by another one.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def grant(self, permit: Any, path: str) -> None:
        """Write, after a permit is had, that it is."""
        self._write(monotonic_ns(), "grant", permit.fence, path, os.getpid())

    def release(self, permit: Any, path: str) -> bool:
        """Write, before a permit is given back, that it is, or that it was lost. Returns which."""
        now = monotonic_ns()
        lost: bool = permit.lost  # if it is not by now, it was good at the time above
        self._write(now, "lost" if lost else "release", permit.fence, path, os.getpid())
        return lost

    def killed(self, pid: int) -> None:
        """Write, before a process is killed or stopped, that it is."""
        self._write(monotonic_ns(), "killed", "-", "-", pid)

    def _write(self, *words: object) -> None:
        # One write each, so that no kill leaves a part, and threads need no lock.
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


@dataclass
class _Interval:
    fence: int
    path: str
    pid: int
    begin: int
    known: int
    end: int | None = None


@dataclass
class Verdict:
    """What the histories come to.

    Attributes:
        violations: What was against the rules, a sentence each. Empty when all is well.
        grants: How many permits each process had.
        lost: How many were lost.
        unfinished: The fencing numbers of those that were neither given back, lost, nor of a process
            that was killed.
        peaks: The most that were held at once, by layer.
    """

    violations: list[str] = field(default_factory=list)
    grants: Counter[int] = field(default_factory=Counter)
    lost: int = 0
    unfinished: list[int] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Grants of the unluckiest process for each of the luckiest one's."""
        return min(self.grants.values()) / max(self.grants.values())


def check(
    files: Iterable[str | Path], limits: Mapping[str, int], *, ordered: Collection[str] = ()
) -> Verdict:
    """Check what the processes of one fleet have written down.

    Args:
        files: Their histories.
        limits: The limit of each layer, by its key as in the protocol: ``{"": 4, "tool/": 3}``.
        ordered: Layers whose permits must have come in the order of their fencing numbers: those
            with a limit of 1, where nobody can be skipped.
    """
    verdict = Verdict()
    intervals = _intervals(files, verdict)
    for layer, limit in limits.items():
        _sweep(layer, limit, [it for it in intervals if it.path.startswith(layer)], verdict)
    for layer in ordered:
        inside = sorted((it for it in intervals if it.path.startswith(layer)), key=lambda it: it.begin)
        for one, next_one in pairwise(inside):
            if one.fence > next_one.fence:
                verdict.violations.append(f"layer {layer!r}: {one.fence} came before {next_one.fence}")
    return verdict


def _intervals(files: Iterable[str | Path], verdict: Verdict) -> list[_Interval]:
    lines = [line for path in files for line in _lines(path)]
    lines.sort(key=lambda line: line[0])
    killed: dict[int, int] = {}
    intervals: dict[int, _Interval] = {}
    again = count(1)
    for now, event, word, path, pid in lines:
        if event == "killed":
            killed.setdefault(pid, now)
            continue
        fence = int(word)
        interval = intervals.get(fence)
        if event == "grant":
            verdict.grants[pid] += 1
            if interval is not None:
                verdict.violations.append(f"{fence} was granted to {interval.pid}, and again to {pid}")
                intervals[-next(again)] = interval
            intervals[fence] = _Interval(fence, path, pid, now, now)
        elif interval is None or interval.pid != pid or interval.end is not None:
            verdict.violations.append(f"{event} by {pid} of {fence}, which it did not have")
        elif event == "held":
            interval.known = now
        elif event == "release":
            interval.end = now
        elif event == "lost":
            verdict.lost += 1
            interval.end = interval.known
        else:
            raise ValueError(f"no such event: {event}")
    last = lines[-1][0] if lines else 0
    for interval in intervals.values():
        if interval.pid in killed:
            stop = killed[interval.pid]
            interval.end = stop if interval.end is None else min(stop, interval.end)
        elif interval.end is None:
            verdict.unfinished.append(interval.fence)
            interval.end = last + 1
    return list(intervals.values())


def _lines(path: str | Path) -> Iterable[tuple[int, str, str, str, int]]:
    for line in Path(path).read_text().splitlines():
        now, event, fence, layer, pid = line.split()
        yield int(now), event, fence, layer, int(pid)


def _sweep(layer: str, limit: int, intervals: list[_Interval], verdict: Verdict) -> None:
    """Go through all beginnings and ends in time: at equal times the ends, as intervals are the least."""
    points: list[tuple[int, int, _Interval]] = []
    for it in intervals:
        assert it.end is not None
        if it.end > it.begin:
            points += [(it.begin, 1, it), (it.end, 0, it)]
    points.sort(key=lambda point: point[:2])
    inside: dict[int, _Interval] = {}
    peak = 0
    worst = ""
    for now, begins, it in points:
        if not begins:
            del inside[id(it)]
            continue
        inside[id(it)] = it
        if len(inside) > peak:
            peak = len(inside)
            who = ", ".join(f"{it.fence} of {it.pid}" for it in inside.values())
            worst = f"layer {layer!r}: {peak} held of {limit}, at {now}: {who}"
    verdict.peaks[layer] = peak
    if peak > limit:
        verdict.violations.append(worst)
