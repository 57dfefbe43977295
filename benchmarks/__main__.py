"""Measure governor beside what one would use in its place, and write the figures down.

``python -m benchmarks`` measures and prints tables; ``docs`` and ``pictures`` make those of the
documentation from the results that were kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks._measure import Effort
from benchmarks._peers import PACKAGES, installed
from benchmarks._report import table, write_docs
from benchmarks._server import server_version
from benchmarks.agents import agents
from benchmarks.contended import burst, contended
from benchmarks.fleet import fleet
from benchmarks.jobs import jobs
from benchmarks.uncontended import uncontended
from benchmarks.waiting import grants, latency, memory

SCENARIOS = {
    it.__name__: it for it in (uncontended, contended, burst, grants, latency, memory, agents, jobs, fleet)
}


def main() -> int:
    """Do as the command line says. Returns the exit status: 1 if a contender is broken, or a page stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.set_defaults(command=measure)
    parser.add_argument(
        "--only", choices=SCENARIOS, action="append", metavar="NAME", help="; ".join(SCENARIOS)
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the figures there too; with --only, what it has of other scenarios stays",
    )
    parser.add_argument("--quick", action="store_true", help="show that all works; the figures mean nothing")
    commands = parser.add_subparsers()
    docs = commands.add_parser("docs", help="write the tables of the README and the docs")
    docs.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    docs.set_defaults(command=lambda arguments: write_docs(check=arguments.check))
    commands.add_parser("pictures", help="draw those of the docs").set_defaults(command=pictures)
    arguments = parser.parse_args()
    return arguments.command(arguments)


def measure(arguments: argparse.Namespace) -> int:
    """Measure, print, and keep."""
    build = platform.python_version() + ("" if getattr(sys, "_is_gil_enabled", lambda: True)() else "t")
    print(f"CPython {build}")
    chosen = arguments.only or [*SCENARIOS]
    result: dict[str, Any] = {
        "python": build,
        "system": f"{platform.system()}, {os.cpu_count()} processors",
        "server": server_version() if fleet.__name__ in chosen else None,
        "packages": {name: installed(name) for name in PACKAGES},
    }
    others, rest = [], [name for name in SCENARIOS if name not in chosen]
    if arguments.json and rest and arguments.json.exists():
        kept = json.loads(arguments.json.read_text("utf-8"))
        others = [row for row in kept["rows"] if row["scenario"] in rest]
        if others and (differs := _join(result, kept)):
            print(f"{arguments.json} is of {differs}: leave out --only, or --json", file=sys.stderr)
            return 2
    found = []
    for name in chosen:
        rows = SCENARIOS[name](Effort(arguments.quick))
        print("\n" + table(rows), flush=True)
        found += rows
    if arguments.json:
        order = [*SCENARIOS]
        every = sorted(
            [*others, *(_compact(dataclasses.asdict(row)) for row in found)],
            key=lambda row: order.index(row["scenario"]),
        )
        rows = ",\n".join(map(json.dumps, every))
        arguments.json.write_text(f'{json.dumps(result)[:-1]}, "rows": [\n{rows}\n]}}\n', "utf-8")
    return int(any(row.remark.startswith("broken") for row in found))


def _join(result: dict[str, Any], kept: dict[str, Any]) -> str:
    """Complete what is said of this run by what is kept of an earlier one.

    Returns in what they differ, if they do: then their rows are not to be compared.
    """
    for name in ("python", "system"):
        if kept[name] != result[name]:
            return f"{kept[name]}, not {result[name]}"
    result["server"] = result["server"] or kept.get("server")
    for name, version in kept["packages"].items():
        mine = result["packages"].setdefault(name, None) or version
        if version not in (None, mine):
            return f"{name} {version}, not {mine}"
        result["packages"][name] = mine
    return ""


def _compact(value: object) -> object:
    """Four digits are more than the figures are worth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _compact(it) for name, it in value.items() if it not in (None, "", [], {})}
    return [_compact(it) for it in value] if isinstance(value, list | tuple) else value


def pictures(_: argparse.Namespace) -> int:
    from benchmarks._pictures import draw

    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
