"""``governor fleet create`` and ``governor fleet resize``."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from governor._fleet.member import ends_on_sigterm, member

if TYPE_CHECKING:
    from governor.redis import RedisGovernor

__all__ = ["create", "resize"]


def create(arguments: argparse.Namespace) -> int:
    """Make the fleet, and say when it grants."""
    with (
        ends_on_sigterm(),
        member(
            arguments,
            max_streams=arguments.streams,
            max_tools=arguments.tools,
            max_global=arguments.total,
            lease=arguments.lease,
            max_queued=arguments.queued,
        ) as gov,
    ):
        settles = math.ceil(gov._survey_fleet().settles)
        print(f"{_limits(gov, arguments.name)}, grants {f'in {settles} s' if settles else 'now'}")
    return 0


def resize(arguments: argparse.Namespace) -> int:
    """Change the limits, and say what they are now."""
    with ends_on_sigterm(), member(arguments) as gov:
        gov.resize(max_streams=arguments.streams, max_tools=arguments.tools, max_global=arguments.total)
        print(_limits(gov, arguments.name))
    return 0


def _limits(gov: RedisGovernor, name: str) -> str:
    now = gov.stats()
    return f"fleet {name!r}: streams {now.streams_max}, tools {now.tools_max}, global {now.global_max}"
