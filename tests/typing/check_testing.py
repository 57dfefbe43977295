"""Checked by type checkers, never run: what users' tests infer.

A `type: ignore` states that its line is an error: where it is not, the comment is reported.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import assert_type

from governor import ConcurrencyGovernor, ConcurrencyPermit, PermitHolder
from governor.testing import NonBlockingGovernor, WouldBlock, assert_all_returned


def a_governor_that_lets_nobody_wait() -> None:
    gov = NonBlockingGovernor(4, 8, 16, max_queued=None, name="crew")
    assert_type(NonBlockingGovernor.with_defaults(), NonBlockingGovernor)
    assert_type(gov.acquire_tool(timeout=1.5), ConcurrencyPermit)
    assert_type(gov.agent("coder", max_tools=2), NonBlockingGovernor)
    NonBlockingGovernor(4, 8)  # type: ignore


def a_check(plain: ConcurrencyGovernor) -> None:
    with assert_all_returned(NonBlockingGovernor(4, 8, 16)) as gov:
        assert_type(gov, NonBlockingGovernor)
    with assert_all_returned(plain, timeout=0.5) as same:
        assert_type(same, ConcurrencyGovernor)
    assert_all_returned(42)  # type: ignore


def an_error(error: WouldBlock) -> None:
    assert_type(error.what, str)
    assert_type(error.holders, tuple[PermitHolder, ...])
    assert_type(error.governor, str | None)
