"""How ``governor fleet watch`` shows a fleet to people."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["draw"]


def draw(look: dict[str, Any], size: os.terminal_size | None = None) -> list[str]:
    """Return a look at a fleet as lines; with bars, and cut to fit, if a terminal's size is given."""
    if "away_since" in look:
        since = time.strftime("%H:%M:%S", time.localtime(look["away_since"]))
        return [f"Fleet {look['fleet']!r}: its server is away since {since}"]
    label = max(len(layer["name"]) for layer in look["layers"])
    bar = 0 if size is None else max(10, min(40, size.columns - label - 34))  # 34 for counts and gaps
    lines = [_title(look), *(_layer(layer, label, bar) for layer in look["layers"])]
    lines += _section("Held", map(_holder, look["holders"]))
    lines += _section("Processes", map(_session, look["sessions"]))
    # Names come from other processes: none of them may steer the terminal.
    lines = ["".join(it if it.isprintable() else "?" for it in line) for line in lines]
    if size is None:
        return lines
    room = size.lines - 1  # the cursor stands below the picture
    if len(lines) > room:
        lines[room - 1 :] = [f"and {len(lines) - room + 1} more lines, on a taller terminal"]
    return [line[: size.columns - 1] for line in lines]


def _title(look: dict[str, Any]) -> str:
    settles = math.ceil(look["settles"])
    return f"Fleet {look['fleet']!r}" + (f": new, grants in {settles} s" if settles else "")


def _layer(layer: dict[str, Any], label: int, bar: int) -> str:
    """Write a layer: its name, a bar that is full at the limit, the counts."""
    in_use, limit, waiting = layer["in_use"], layer["limit"], layer["waiting"]
    if limit is None:  # nobody uses this agent any more
        limit = in_use
    filled = min(bar, bar * in_use // limit) if limit else bar
    picture = f"[{'#' * filled}{'-' * (bar - filled)}] " if bar else ""
    over = f"  {in_use - limit} over" if in_use > limit else ""
    line = f"  {waiting} waiting" if waiting else ""
    return f"  {layer['name']:<{label}} {picture}{f'{in_use}/{limit}':>7}{over}{line}"


def _section(title: str, lines: Iterator[str]) -> list[str]:
    """Return lines under a title, or nothing where there are none."""
    found = [f"  {line}" for line in lines]
    return [f"{title}:", *found] if found else []


def _holder(holder: dict[str, Any]) -> str:
    of = f" of {holder['agent']!r}" if holder["agent"] else ""
    by = f" by thread {holder['thread']!r}" if holder["thread"] else ""
    return f"{holder['process']}: {holder['kind']}{of}{by} for {holder['seconds']:.1f} s"


def _session(session: dict[str, Any]) -> str:
    waiting = f", {session['waiting']} waiting" if session["waiting"] else ""
    lease = max(0.0, session["lease_left"])
    return f"{session['process']}: {session['held']} held{waiting}; lease {lease:.0f} s"
