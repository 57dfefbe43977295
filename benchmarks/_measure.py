"""Measuring contenders interleaved, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = [
    "Broken", "Contender", "Effort", "Figures", "Gauge", "Row", "absent", "at_rest", "interleaved", "loop",
    "nothing", "rank",
]  # fmt: skip

PATIENCE = 60.0  # seconds until what does not end counts as broken
nothing = bool  # the cheapest to call, to no effect


class Broken(Exception):
    """A contender did not do its job: a limit was passed, or something was left undone."""


@dataclass
class Figures:
    """What one contender did in one round.

    Attributes:
        seconds: For one operation.
        fairness: Turns of the unluckiest thread over those of the luckiest.
        notes: Further figures; the name of each says its unit.
        samples: What a picture is drawn of.
    """

    seconds: float
    fairness: float | None = None
    notes: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)


@dataclass
class Row:
    """What one contender did in all rounds, beside the baseline of its table.

    Attributes:
        scenario: The table's name.
        case: Of which of the scenario's tables.
        contender: Who.
        ratio: Its seconds for one operation over the baseline's in the same round, the median.
        spread: The quartiles of that ratio.
        floor: The same median ratio, to the physical floor: what no implementation can go below.
        thousands: Operations per second, in thousands, the median.
        fairness: Turns of the unluckiest thread over those of the luckiest, the median.
        memory: The peak of what Python allocated in a round of its own, in kB, without threads' stacks.
        notes: Medians of further figures.
        samples: The last round's, for pictures.
        remark: What it does less than the others, or why there are no figures.
    """

    scenario: str
    case: str
    contender: str
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    floor: float | None = None
    thousands: float | None = None
    fairness: float | None = None
    memory: float | None = None
    notes: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    remark: str = ""


@dataclass
class Contender:
    """One of those that are compared.

    Attributes:
        run: Does one round.
        check: Raises :class:`Broken` if limits are not kept, or places were lost. Called after the rounds.
        remark: As in :class:`Row`.
    """

    run: Callable[[], Figures]
    check: Callable[[], None]
    remark: str = ""


@dataclass(frozen=True)
class Effort:
    """How much to do: all, or only as much as shows that everything works."""

    quick: bool = False

    def of(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def rounds(self, full: int) -> int:
        return self.of(full, 2)


def interleaved(
    scenario: str,
    case: str,
    contenders: dict[str, Contender],
    *,
    rounds: int,
    floor: str | None = None,
    warms: bool = True,
    weighs: bool = True,
) -> list[Row]:
    """Run each contender once a round; the first is the baseline of the others.

    One that is broken has no figures.

    Args:
        scenario: The name of the tables.
        case: The name of this table.
        contenders: By name.
        rounds: How many rounds count.
        floor: Which of them is the physical floor.
        warms: Whether a round that does not count comes first.
        weighs: Whether a round comes last that measures memory.
    """
    kinds = ["warm"] * warms + ["count"] * rounds + ["weigh"] * weighs
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    peaks: dict[str, float] = {}
    broken: dict[str, Broken] = {}
    for turn, kind in enumerate(kinds):
        for place, (name, contender) in enumerate(contenders.items()):
            _progress(f"{scenario}: {case}", (turn + place / len(contenders)) / len(kinds))
            if name in broken:
                continue
            gc.collect()
            try:
                if kind == "weigh":
                    peaks[name] = _peak(contender.run)
                else:
                    figures = contender.run()
                    if kind == "count":
                        found[name].append(figures)
                if turn + 1 == len(kinds):
                    contender.check()
            except Broken as error:
                broken[name] = error
    _progress("", 1.0)
    first = next(iter(contenders))
    rows = []
    for name, contender in contenders.items():
        row = Row(scenario, case, name, remark=contender.remark)
        rows.append(row)
        if name in broken:
            row.remark = f"broken: {broken[name]}"
            continue
        mine = found[name]
        row.thousands = statistics.median(1 / it.seconds for it in mine) / 1_000
        row.memory = peaks.get(name)
        row.samples = mine[-1].samples
        if mine[0].fairness is not None:
            row.fairness = statistics.median(it.fairness or 0.0 for it in mine)
        row.notes = {note: statistics.median(it.notes[note] for it in mine) for note in mine[0].notes}
        if first not in broken:
            ratios = _ratios(mine, found[first])
            low, row.ratio, high = statistics.quantiles(ratios * (1 + (rounds == 1)), n=4)
            row.spread = low, high
        if floor is not None and floor not in broken:
            row.floor = statistics.median(_ratios(mine, found[floor]))
    return rows


def absent(scenario: str, case: str, reasons: dict[str, str]) -> list[Row]:
    """Make rows of those that cannot take part."""
    return [Row(scenario, case, name, remark=reason) for name, reason in reasons.items()]


def loop(run: Callable[[int], object], operations: int) -> Callable[[], Figures]:
    """Make a round of something that does as many operations as it is told."""

    def timed() -> Figures:
        began = time.perf_counter()
        run(operations)
        return Figures((time.perf_counter() - began) / operations)

    return timed


def rank(samples: list[float], share: float) -> float:
    """Return the sample that this share of all are not above."""
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


class Gauge:
    """Counts who is inside, knowing nothing of any contender."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.inside = self.peak = self.entries = 0

    def __enter__(self) -> None:
        with self._lock:
            self.inside += 1
            self.entries += 1
            self.peak = max(self.peak, self.inside)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1


def at_rest() -> None:
    """Wait until nothing of this process runs: all who could go on have, and the rest wait."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return
    raise Broken("it never comes to rest")


def _ratios(mine: list[Figures], theirs: list[Figures]) -> list[float]:
    return [a.seconds / b.seconds for a, b in zip(mine, theirs, strict=True)]


def _peak(run: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        return (tracemalloc.get_traced_memory()[1] - before) / 1_000
    finally:
        tracemalloc.stop()


def _progress(what: str, done: float) -> None:
    if sys.stderr.isatty():
        bar = "#" * round(20 * done)
        line = f"[{bar:20}] {what}"[:78] if what else ""
        print(f"\r{line:78}\r", end="", file=sys.stderr, flush=True)
