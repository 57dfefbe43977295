"""Run the benchmarks: ``python -m benchmarks [--only NAME] [--json FILE]``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys

from benchmarks import core, jobs
from benchmarks._measure import table

SCENARIOS = {**core.SCENARIOS, **jobs.SCENARIOS}


def main() -> None:
    """Measure, and print a table of ratios; the first of each block is what the rest is held to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    build = platform.python_version() + ("" if getattr(sys, "_is_gil_enabled", lambda: True)() else "t")
    print(f"CPython {build}")
    found = []
    for name in arguments.only or SCENARIOS:
        rows = SCENARIOS[name]()
        print("\n" + table(rows), flush=True)
        found += rows
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"python": build, "rows": [dataclasses.asdict(row) for row in found]}, file, indent=1)


if __name__ == "__main__":
    main()
