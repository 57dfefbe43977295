"""The benchmarks run, and see who does not do the job; the docs say what the kept results say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

SCENARIOS = {"uncontended", "contended", "burst", "grants", "latency", "memory", "agents", "jobs", "fleet"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.timeout(160)
def test_each_scenario_runs_and_finds_that_all_do_their_job(tmp_path: Path) -> None:
    done = run("-m", "benchmarks", "--quick", "--json", tmp_path / "quick.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "quick.json").read_text("utf-8"))
    rows = found["rows"]
    assert {row["scenario"] for row in rows} == SCENARIOS
    mine = [row for row in rows if row["contender"] == "governor"]
    assert len(mine) > 10
    assert all(row.get("ratio") or row["notes"]["bytes"] for row in mine)
    # A package that is not there is said to be missing, and one that is there has figures.
    for package, version in found["packages"].items():
        theirs = [row for row in rows if package.split(".")[0] in row["contender"]]
        told = [row for row in theirs if row.get("remark") == "not installed"]
        able = [row for row in theirs if not row.get("remark", "").startswith("cannot")]
        assert able
        assert told == ([] if version else able)
    # A fleet needs a server too.
    fleet = [row for row in rows if row["scenario"] == "fleet"]
    there = bool(found["packages"]["redis"] and found.get("server"))
    assert [row["contender"] for row in fleet if bool(row.get("ratio")) is not there] == []


def test_what_is_kept_of_other_scenarios_stays(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"

    def measured(*names: str) -> tuple[int, dict[str, Any]]:
        only = [it for name in names for it in ("--only", name)]
        done = run("-m", "benchmarks", "--quick", *only, "--json", file)
        return done.returncode, json.loads(file.read_text("utf-8"))

    _, first = measured("uncontended", "memory")
    status, second = measured("uncontended")
    assert status == 0
    assert [row["scenario"] for row in second["rows"]] == [row["scenario"] for row in first["rows"]]
    assert [row == other for row, other in zip(first["rows"], second["rows"], strict=True)].count(False) > 3
    assert [row for row in first["rows"] if row["scenario"] == "memory"] == [
        row for row in second["rows"] if row["scenario"] == "memory"
    ]
    # Rows of another build are not to be compared with these.
    file.write_text(json.dumps(second | {"python": "3.0.0"}), "utf-8")
    status, third = measured("memory")
    assert status == 2
    assert third == second | {"python": "3.0.0"}


def test_who_passes_a_limit_or_loses_a_place_has_no_figures() -> None:
    done = run(
        "-c",
        dedent("""\
        from benchmarks._measure import Contender, interleaved, loop
        from benchmarks._peers import Nested

        class Lax(Nested):
            def build(self, limits):
                super().build({name: limit + 1 for name, limit in limits.items()})

        class Leaky(Nested):
            def build(self, limits):
                super().build(limits)
                self.taken["tool"][0].acquire()

        class Lazy(Nested):
            def run(self, kind, n, body):
                pass

        peers = {it.__name__: it(1, 2, 2) for it in (Nested, Lax, Leaky, Lazy)}
        contenders = {
            name: Contender(loop(lambda n, it=it: it.run("tool", n, bool), 1), it.check)
            for name, it in peers.items()
        }
        for row in interleaved("scenario", "case", contenders, rounds=2):
            print(row.contender, row.ratio is None, row.remark.partition(":")[0])
        """),
    )
    assert done.stdout.splitlines() == [
        "Nested False ",
        "Lax True broken",
        "Leaky True broken",
        "Lazy True broken",
    ], done.stderr


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    done = run("-m", "benchmarks", "docs", "--check")
    assert done.returncode == 0, f"{done.stderr}\nWrite them: python -m benchmarks docs"


@pytest.mark.parametrize("name", ["agents", "burst", "fairness"])
def test_a_picture_is_small_and_drawn_from_the_results(name: str) -> None:
    picture = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text("utf-8")
    results = hashlib.sha256((ROOT / "benchmarks" / "results" / "3.14.json").read_bytes()).hexdigest()
    assert len(picture) < 60_000
    assert results in picture, "Draw them again: python -m benchmarks pictures"
