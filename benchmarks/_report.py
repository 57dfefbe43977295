"""Tables: of what was just measured, and of the results that were kept, for the documentation."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks._measure import Row

__all__ = ["DETAIL", "RESULTS", "ROOT", "results", "table", "write_docs"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/design.md", "docs/metrics.md", "docs/thread-pools.md")
DETAIL = "3.14"  # of which all columns are shown, and pictures drawn

Results = dict[str, dict[tuple[str, str], list[Row]]]  # by build, and by scenario and case


def table(found: Iterable[Row]) -> str:
    """Draw rows for a terminal, a case a block."""
    lines: list[str] = []
    before = None
    for row in found:
        if (row.scenario, row.case) != before:
            before = row.scenario, row.case
            head = f"{'ratio':>8}{'spread':>16}{'1000/s':>10}{'fairness':>9}{'peak kB':>9}{'x floor':>9}"
            lines += ["", f"{row.scenario}: {row.case}", f"  {'':38}{head}"]
        low, high = row.spread or (None, None)
        spread = "" if low is None else f"{low:.2f} to {high:.2f}"
        cells = [
            f"{_number(row.ratio):>8}{spread:>16}{_number(row.thousands):>10}{_number(row.fairness):>9}"
            f"{_number(row.memory):>9}{_number(row.floor):>9}"
        ]
        cells += [f"{name} {_number(value)}" for name, value in row.notes.items()]
        cells += [row.remark] if row.remark else []
        if row.ratio is None and not row.notes:
            cells = [row.remark]
        lines.append(f"  {row.contender:<38}{'  '.join(cells)}".rstrip())
    return "\n".join(lines).lstrip("\n")


def results() -> Results:
    """Return what was kept, oldest build first."""
    found = {}
    for file in sorted(RESULTS.glob("*.json"), key=lambda file: int(file.stem.strip("t").split(".")[1])):
        cases: dict[tuple[str, str], list[Row]] = {}
        for fields in json.loads(file.read_text("utf-8"))["rows"]:
            row = Row(**fields)
            cases.setdefault((row.scenario, row.case), []).append(row)
        found[file.stem] = cases
    return found


def write_docs(*, check: bool = False) -> int:
    """Write each table between the markers that name it. Returns 1 if that changed a page."""
    kept = results()
    stale = []
    for name in PAGES:
        page = (ROOT / name).read_text("utf-8")
        written = MARKED.sub(
            lambda match: f"{match['begin']}\n{_block(match['name'], kept)}{match['end']}", page
        )
        if written != page:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(written, "utf-8")
    if stale:
        print(f"{'not what the results say' if check else 'written'}: {', '.join(stale)}", file=sys.stderr)
    return int(check and bool(stale))


MARKED = re.compile(
    r"(?P<begin><!-- benchmark: (?P<name>.+?) -->)\n(?s:.*?)(?P<end><!-- end of benchmark -->)"
)


def _block(name: str, kept: Results) -> str:
    if name in SUMMARIES:
        lines = [*PREFACES.get(name, ()), *_summary(SUMMARIES[name], kept)]
    elif name == "versions":
        lines = [*_versions()]
    else:
        lines = [*_scenario(name, kept)]
    return "\n" + "\n".join(lines) + "\n\n"


def _scenario(scenario: str, kept: Results) -> Iterator[str]:
    """Make a table of each case: a row a contender, a column a build."""
    cases = dict.fromkeys(key for cases in kept.values() for key in cases if key[0] == scenario)
    show, legend = CELLS.get(scenario, (_ratio, "ratio"))
    for number, key in enumerate(cases):
        rows = {build: {row.contender: row for row in found.get(key, [])} for build, found in kept.items()}
        detail = rows.get(DETAIL, {})
        extra = {
            f"1000/s on {DETAIL}": {it: _number(row.thousands) for it, row in detail.items()},
            f"peak kB on {DETAIL}": {it: _number(row.memory) for it, row in detail.items()},
            f"x floor on {DETAIL}": {it: _number(row.floor) for it, row in detail.items()},
        }
        extra = {head: cells for head, cells in extra.items() if any(cells.values())}
        yield from [""] * bool(number)
        yield from (f"**{key[1][0].upper()}{key[1][1:]}**: {legend}", "")
        heads = [*kept, *extra]
        yield f"| | {' | '.join(heads)} |"
        yield f"| --- |{' --- |' * len(heads)}"
        apart = []
        for contender in dict.fromkeys(it for found in rows.values() for it in found):
            mine = {build: found.get(contender) for build, found in rows.items()}
            said = {row.remark for row in mine.values() if row}
            remark = said.pop() if len(said) == 1 else ""
            if remark and not any(show(row) for row in mine.values() if row):
                apart.append(f"{contender} ({remark})")
                continue
            name = contender + (f" ({remark})" if remark else "")
            cells = [_cell(row, show, remark) for row in mine.values()]
            cells += [column.get(contender, "") for column in extra.values()]
            yield f"| {name} | {' | '.join(cells)} |"
        if apart:
            yield from ("", f"Not in it: {'; '.join(apart)}.")


def _cell(row: Row | None, show: Callable[[Row], str], remark: str) -> str:
    return "" if row is None else show(row) or ("" if remark else row.remark)


def _ratio(row: Row) -> str:
    return _number(row.ratio)


def _spread(row: Row) -> str:
    if row.ratio is None or row.spread is None:
        return ""
    return f"{row.ratio:.2f} ({row.spread[0]:.2f} to {row.spread[1]:.2f})"


def _fair(row: Row) -> str:
    return "" if row.ratio is None else f"{_number(row.ratio)}; {_number(row.fairness)}"


def _micros(row: Row) -> str:
    return _number(1_000 / row.thousands) if row.thousands else ""


def _notes(*names: str) -> Callable[[Row], str]:
    return lambda row: "; ".join(_number(row.notes[it]) for it in names if it in row.notes)


CELLS: dict[str, tuple[Callable[[Row], str], str]] = {
    "uncontended": (_spread, "ratio (quartiles)"),
    "contended": (_fair, "ratio; fairness"),
    "burst": (_notes("median wait, ms", "longest, ms"), "a stream's median wait; its longest, in ms"),
    "latency": (_notes("median, us", "95 %, us"), "median; 95 % are below, in µs"),
    "memory": (_notes("bytes"), "bytes"),
    "fleet": (_spread, "ratio (quartiles)"),
}


class Line(NamedTuple):
    """A row of a summary: one figure of one contender, build by build."""

    what: str
    beside: str
    scenario: str
    case: str
    contender: str
    show: Callable[[Row], str] = _ratio


def _summary(lines: list[Line], kept: Results) -> Iterator[str]:
    yield f"| what | beside | {' | '.join(kept)} |"
    yield f"| --- | --- |{' --- |' * len(kept)}"
    for line in lines:
        cells = []
        for build in kept.values():
            rows = [row for row in build.get(line[2:4], []) if row.contender == line.contender]
            cells.append(line.show(rows[0]) if rows else "")
        yield f"| {line.what} | {line.beside} | {' | '.join(cells)} |"


def _versions() -> Iterator[str]:
    yield "| build | CPython | on | packages |"
    yield "| --- | --- | --- | --- |"
    for build in results():
        kept = json.loads((RESULTS / f"{build}.json").read_text("utf-8"))
        packages = ", ".join(f"{name} {it or '(not installed)'}" for name, it in kept["packages"].items())
        packages += f"; {kept['server']}" if kept.get("server") else ""
        yield f"| {build} | {kept['python']} | {kept['system']} | {packages} |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


TOOL = Line(
    "an uncontended `with gov.acquire_tool(): ...`", "two nested `BoundedSemaphore`s",
    "uncontended", "a tool, two layers", "governor",
)  # fmt: skip
AGENT = Line(
    "the same through an agent", "three nested ones",
    "uncontended", "a tool of an agent, three layers", "governor",
)  # fmt: skip
LISTENER = Line(
    "an uncontended permit, with a listener", "two nested `BoundedSemaphore`s",
    "uncontended", "a tool, two layers", "governor, with a listener",
)  # fmt: skip
TURN = Line(
    "a turn of 32 threads on 2 permits, each held for a millisecond", "two nested `BoundedSemaphore`s",
    "contended", "32 threads, 2 permits, held 1 ms", "governor",
)  # fmt: skip
SHORT = TURN._replace(what="the same, held for 0.1 ms", case="32 threads, 2 permits, held 0.1 ms")
FAIR = TURN._replace(
    what="turns of the unluckiest of the 32",
    beside="the luckiest one's",
    show=lambda row: _number(row.fairness),
)
UNFAIR = FAIR._replace(what="the same with the semaphores", contender="nested BoundedSemaphores")
JOB = Line(
    "an empty job of a `GovernedExecutor`, 16 workers, 16 permits", "a `BoundedSemaphore` around `submit`",
    "jobs", "10,000 jobs, 16 permits, 16 workers", "governor",
)  # fmt: skip
FEWER = JOB._replace(what="the same with 5 permits", case="3,000 jobs, 5 permits, 16 workers")
TRIPS = Line(
    "an uncontended `with gov.acquire_tool(): ...`, two round trips", "one round trip of redis-py",
    "fleet", "one thread, room for all", "RedisGovernor",
)  # fmt: skip
PASSED = Line(
    "a hand-over between two processes", "a token in a list, by `BLPOP` and `RPUSH`",
    "fleet", "one place, 2 processes of 1 thread", "RedisGovernor",
)  # fmt: skip
SUMMARIES = {
    "summary": [TOOL, TURN, FAIR, UNFAIR],
    "costs": [
        TOOL, AGENT, LISTENER, TURN, SHORT, FAIR, UNFAIR,
        Line(
            "a grant among 10,000 waiting requests of 10,000 agents", "of 10 agents",
            "agents", "a grant, 10,000 waiting requests", "10,000 agents",
        ),
        Line(
            "a grant among 5,000 waiting requests", "among 500",
            "agents", "a grant, one agent", "5,000 waiting requests",
        ),
        JOB, FEWER,
        Line("a waiter, beside its thread", "bytes", "memory", "a waiter", "governor", _notes("bytes")),
        Line("an agent", "bytes", "memory", "an agent", "governor", _notes("bytes")),
    ],
    "listener": [
        TOOL._replace(what="an uncontended permit, without a listener"),
        LISTENER._replace(what="the same with one"),
    ],
    "executor": [JOB, FEWER],
    "fleet costs": [
        TRIPS,
        TRIPS._replace(what="the same", beside="µs", show=_micros),
        Line(
            "a turn of 32 threads, room for all", "a counter in a script, a connection a thread",
            "fleet", "32 threads, room for all", "RedisGovernor",
        ),
        PASSED,
        PASSED._replace(what="the same", beside="µs", show=_micros),
        PASSED._replace(what="the same, 4 threads in each", case="one place, 2 processes of 4 threads"),
        Line(
            "a grant among 10,000 waiting requests", "among 100",
            "fleet", "a grant", "10,000 waiting requests",
        ),
        Line(
            "a grant among 1,000 waiting requests of 100 agents", "of one agent",
            "fleet", "a grant, 1,000 waiting requests", "100 agents",
        ),
    ],
}  # fmt: skip
PREFACES = {
    "summary": [
        "![Turns of each of 32 threads that compete for 2 permits](docs/pictures/fairness.svg)",
        "",
        "What it costs, as ratios of time by CPython build, where below 1 is faster "
        "([all benchmarks](docs/benchmarks.md)):",
        "",
    ]
}
