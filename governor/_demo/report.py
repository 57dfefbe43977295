"""The result, as JSON for programs or as a table for people."""

from __future__ import annotations

import json
from textwrap import wrap

from governor._demo.result import Outcome, Peak, Result

__all__ = ["as_json", "as_table"]


def as_json(result: Result) -> str:
    """Return both runs on one line of JSON; null for the one that did not begin."""
    ungoverned = result.ungoverned
    return json.dumps(
        {
            "governed": result.governed.as_dict(),
            "ungoverned": None if ungoverned is None else ungoverned.as_dict(),
        }
    )


def as_table(result: Result) -> str:
    """Return both runs side by side, and below what that says in words."""
    peaks = result.governed.peaks
    rows = zip(
        ["", *(f"peak of {name}" for name in peaks), "operations done", "longest wait"],
        ["limit", *(str(peak.limit) for peak in peaks.values()), "", ""],
        ["governed", *_column(result.governed)],
        ["ungoverned", *_column(result.ungoverned)],
        strict=True,
    )
    lines = [f"{label:<25}{limit:>7}{one:>13}{two:>13}" for label, limit, one, two in rows]
    words = [line for sentence in _conclusions(result) for line in wrap(sentence, 78)]
    return "\n".join([*lines, "", *words])


def _column(outcome: Outcome | None) -> list[str]:
    """Return what one run did, in the order of the table's rows."""
    if outcome is None:
        return ["-"] * 6
    peaks = [str(peak.peak) for peak in outcome.peaks.values()]
    return [*peaks, str(outcome.operations), f"{outcome.longest_wait:.2f} s"]


def _conclusions(result: Result) -> list[str]:
    """Say where the numbers come from, and what they show."""
    lines = ["Peaks are counted by the model server and by the tools, not by the governor."]
    if result.kept:
        lines.append("Governed, no limit was passed.")
    else:
        lines.append(f"GOVERNED, LIMITS WERE PASSED, which is a bug: {_over(result.governed)}.")
    if result.ungoverned is not None:
        over = _over(result.ungoverned)
        lines.append(
            f"Ungoverned, these were: {over}."
            if over
            else "Ungoverned, none was either: too little work for limits as high as these."
        )
    if result.interrupted:
        lines.append("Interrupted: this is what was done until then.")
    return lines


def _over(outcome: Outcome) -> str:
    """List the peaks that passed their limits."""
    over: dict[str, Peak] = {name: peak for name, peak in outcome.peaks.items() if peak.over}
    return ", ".join(f"{name} {peak.peak} of {peak.limit}" for name, peak in over.items())
