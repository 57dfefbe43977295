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

from benchmarks._measure import Effort
from benchmarks._peers import PACKAGES, installed
from benchmarks._report import table, write_docs
from benchmarks.agents import agents
from benchmarks.contended import burst, contended
from benchmarks.jobs import jobs
from benchmarks.uncontended import uncontended
from benchmarks.waiting import grants, latency, memory

SCENARIOS = {it.__name__: it for it in (uncontended, contended, burst, grants, latency, memory, agents, jobs)}


def main() -> int:
    """Do as the command line says. Returns the exit status: 1 if a contender is broken, or a page stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.set_defaults(command=measure)
    parser.add_argument(
        "--only", choices=SCENARIOS, action="append", metavar="NAME", help="; ".join(SCENARIOS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
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
    found = []
    for name in arguments.only or SCENARIOS:
        rows = SCENARIOS[name](Effort(arguments.quick))
        print("\n" + table(rows), flush=True)
        found += rows
    if arguments.json:
        result = {
            "python": build,
            "system": f"{platform.system()}, {os.cpu_count()} processors",
            "packages": {name: installed(name) for name in PACKAGES},
        }
        rows = ",\n".join(json.dumps(_compact(dataclasses.asdict(row))) for row in found)
        arguments.json.write_text(f'{json.dumps(result)[:-1]}, "rows": [\n{rows}\n]}}\n', "utf-8")
    return int(any(row.remark.startswith("broken") for row in found))


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
