"""What the adapters of metrics share."""

from __future__ import annotations

from governor._governor import Governor, check_governor

__all__ = ["by_name"]


def by_name(governors: tuple[Governor, ...]) -> dict[str, Governor]:
    """Return the governors by the names that they are shown under.

    Raises:
        TypeError: one is not a governor.
        ValueError: there are none, two have the same name, or one is an agent.
    """
    for governor in governors:
        check_governor(governor)
    named = {governor.name or "default": governor for governor in governors}
    if not governors or len(named) < len(governors):
        raise ValueError(f"governors must be one or more, of different names, not {governors!r}")
    if any(governor.parent is not None for governor in governors):
        raise ValueError(f"governors must not be agents, which come with their governor: {governors!r}")
    return named
