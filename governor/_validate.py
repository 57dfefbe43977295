"""Checking what callers pass in: numbers, names, environment variables."""

from __future__ import annotations

import math
import operator
import os
from typing import SupportsIndex

__all__ = ["check_count", "check_name", "check_timeout", "count_from_env", "seconds_from_env"]


def check_count(argument: str, value: SupportsIndex, *, least: int = 0) -> int:
    """Return ``value`` as an int that is at least ``least``, or say what is wrong with it.

    Raises:
        TypeError: ``value`` is not an integer; a bool is not one here.
        ValueError: ``value`` is less than ``least``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument} must be an integer >= {least}, not {value!r}") from None
    if count < least:
        raise ValueError(f"{argument} must be an integer >= {least}, not {value!r}")
    return count


def check_timeout(value: float | None, argument: str = "timeout") -> float | None:
    """Return ``value`` in seconds, or None for a wait without end (None, or infinity).

    Raises:
        TypeError: ``value`` is neither a number nor None; a bool is not a number here.
        ValueError: ``value`` is negative or NaN.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number of seconds >= 0 or None, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{argument} must be a number of seconds >= 0 or None, not {value!r}")
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return None if math.isinf(seconds) else seconds


def check_name(argument: str, value: str) -> str:
    """Return ``value`` if it is a string that is not empty.

    Raises:
        TypeError: ``value`` is not a string.
        ValueError: ``value`` is empty.
    """
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a string that is not empty, not {value!r}")
    if not value:
        raise ValueError(f"{argument} must be a string that is not empty, not {value!r}")
    return value


def count_from_env(variable: str) -> int | None:
    """Read an integer >= 0 from the environment; None where the variable is not set.

    Raises:
        ValueError: the variable is set to anything else.
    """
    text = os.environ.get(variable)
    if text is None:
        return None
    digits = text.strip()
    try:
        if not (digits.isascii() and digits.isdigit()):
            raise ValueError
        return int(digits)  # which refuses thousands of digits
    except ValueError:
        raise ValueError(f"environment variable {variable} must be an integer >= 0, not {text!r}") from None


def seconds_from_env(variable: str) -> float | None:
    """Read a number of seconds >= 0 from the environment; None where the variable is not set.

    Raises:
        ValueError: the variable is set to anything else.
    """
    text = os.environ.get(variable)
    try:
        return None if text is None else check_timeout(float(text))
    except ValueError:
        raise ValueError(
            f"environment variable {variable} must be a number of seconds >= 0, not {text!r}"
        ) from None
