"""Measuring contenders interleaved, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass
class Row:
    """What one contender did, beside the baseline of its scenario."""

    scenario: str
    contender: str
    seconds: float  # for one operation, the median
    ratio: float  # to the baseline of the same round, the median
    spread: tuple[float, float]  # the quartiles of that ratio
    notes: dict[str, float] = field(default_factory=dict)


def interleaved(
    scenario: str, contenders: dict[str, Callable[[int], None]], *, operations: int, rounds: int = 15
) -> list[Row]:
    """Time each contender once a round; the first is the baseline of the others.

    Args:
        scenario: The name to report.
        contenders: Functions that do as many operations as they are told.
        operations: How many a round.
        rounds: How many rounds; one more before them warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            gc.collect()
            began = time.perf_counter()
            run(operations)
            took = time.perf_counter() - began
            if turn:
                times[name].append(took / operations)
    return rows(scenario, times)


def rows(scenario: str, times: dict[str, list[float]]) -> list[Row]:
    """Make rows of the seconds per operation of each contender, round by round."""
    baseline = next(iter(times.values()))
    found = []
    for name, took in times.items():
        ratios = [mine / theirs for mine, theirs in zip(took, baseline, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found.append(Row(scenario, name, statistics.median(took), statistics.median(ratios), (low, high)))
    return found


def crowd(threads: int, turns: int, use: Callable[[], None]) -> tuple[float, float]:
    """Let threads compete until one of them has had ``turns`` turns.

    Returns:
        Turns in all per second, and the unluckiest thread's turns over the luckiest's.
    """
    counts = [0] * threads
    ready, over = threading.Barrier(threads + 1), threading.Event()

    def compete(me: int) -> None:
        ready.wait()
        while not over.is_set():
            use()
            counts[me] += 1
            if counts[me] >= turns:
                over.set()

    crew = [threading.Thread(target=compete, args=(me,), daemon=True) for me in range(threads)]
    for thread in crew:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    over.wait()
    took = time.perf_counter() - began
    counted = list(counts)
    for thread in crew:
        thread.join()
    return sum(counted) / took, min(counted) / max(counted)


def table(found: Iterable[Row]) -> str:
    """Draw the rows, a scenario a block."""
    lines, before = [], None
    for row in found:
        if row.scenario != before:
            lines += ["", row.scenario]
            before = row.scenario
        notes = "  ".join(f"{name} {value:,.2f}" for name, value in row.notes.items())
        low, high = row.spread
        lines.append(
            f"  {row.contender:<38} {row.seconds * 1e6:>10.2f} us {row.ratio:>7.2f}"
            f"  ({low:.2f} to {high:.2f})  {notes}".rstrip()
        )
    return "\n".join(lines).lstrip("\n")
