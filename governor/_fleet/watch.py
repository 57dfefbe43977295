"""``governor fleet watch``: how full a fleet is, who holds permits, and who waits."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from governor._fleet.member import ends_on_sigterm, member
from governor._fleet.picture import draw

if TYPE_CHECKING:
    from governor.redis import RedisGovernor

__all__ = ["watch"]


def watch(arguments: argparse.Namespace) -> int:
    """Show the fleet until interrupted, or once. A server that goes away is waited for."""
    if arguments.json:
        show = _print_json
    elif sys.stdout.isatty() and _knows_ansi() and not arguments.once:
        show = _Screen().show
    else:
        show = _print_plainly
    with ends_on_sigterm(), member(arguments) as gov:
        from redis.exceptions import AuthenticationError
        from redis.exceptions import ConnectionError as Unreachable
        from redis.exceptions import TimeoutError as TooSlow

        away: float | None = None
        while True:
            try:
                look, away = _look(gov, arguments.name), None
            except (Unreachable, TooSlow) as error:
                if arguments.once or isinstance(error, AuthenticationError):
                    raise
                away = away or round(time.time(), 3)
                look = {"fleet": arguments.name, "away_since": away}
            show(look)
            if arguments.once:
                return 0
            time.sleep(arguments.interval)


def _look(gov: RedisGovernor, name: str) -> dict[str, Any]:
    """Return what there is to see now, in the shape of the JSON."""
    survey, me = gov._survey_fleet(), gov._session.id.rpartition(":")[0]
    return {
        "fleet": name,
        "settles": round(survey.settles, 3),
        "layers": [layer._asdict() for layer in survey.layers],
        "holders": [
            {
                "kind": holder.kind,
                "agent": _agent(holder.governor, name),
                "process": holder.process,
                "thread": holder.thread,
                "seconds": round(holder.seconds, 3),
            }
            for holder in survey.holders
        ],
        "sessions": [
            session._asdict() | {"lease_left": round(session.lease_left, 3)}
            for session in survey.sessions
            if session.process != me  # which only looks
        ],
    }


def _agent(governor: str | None, fleet: str) -> str | None:
    """Return the name of the agent in a governor's name, if it is one's."""
    if governor is None or governor == fleet:
        return None
    return governor.removeprefix(f"{fleet}/")


def _print_json(look: dict[str, Any]) -> None:
    print(json.dumps(look), flush=True)


def _print_plainly(look: dict[str, Any]) -> None:
    print("\n".join([*draw(look), ""]), flush=True)


class _Screen:
    """Draws each look over the one before."""

    def __init__(self) -> None:
        self._height = 0

    def show(self, look: dict[str, Any]) -> None:
        """Go up to where the last picture begins, and draw over it."""
        lines = draw(look, shutil.get_terminal_size())
        up = f"\x1b[{self._height}F" if self._height else ""
        # What was wider, or longer, is cleared.
        body = "".join(f"{line}\x1b[K\n" for line in lines)
        print(f"{up}{body}\x1b[J", end="", flush=True)
        self._height = len(lines)


def _knows_ansi() -> bool:
    """Tell whether a terminal here draws by ANSI sequences: the old Windows console may not."""
    if sys.platform == "win32":
        return "WT_SESSION" in os.environ
    return os.environ.get("TERM", "dumb") != "dumb"
