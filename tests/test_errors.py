"""The errors: whom each is, what it carries, what it says, and that it travels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

import governor
from governor import AcquireTimeout, ConcurrencyError, ConcurrencyLimitExceeded, SemaphoreClosed
from governor._errors import LayerUse

LAYERS = (LayerUse("tools", 8, 8), LayerUse("global", 9, 16))

SAYINGS = [
    (SemaphoreClosed("tool permit"), "no tool permit: closed"),
    (SemaphoreClosed("tool permit", "crew"), "no tool permit: governor 'crew': closed"),
    (
        AcquireTimeout("tool permit", 5.0, LAYERS, 3),
        "no tool permit within 5.0 s: tools 8/8 in use, global 9/16, 3 waiting ahead",
    ),
    (
        AcquireTimeout("stream permit", 0.0, LAYERS, 0, "crew"),
        "governor 'crew': no stream permit at once: tools 8/8 in use, global 9/16, 0 waiting ahead",
    ),
    (
        ConcurrencyLimitExceeded("tool permit", 2, LAYERS, 2),
        "no tool permit as the line is full (max_queued=2): tools 8/8 in use, global 9/16, "
        "2 waiting: raise max_queued, or submit less at once",
    ),
    (
        ConcurrencyLimitExceeded("tool permit", 0, LAYERS, 0, "crew"),
        "governor 'crew': no tool permit as the line is full (max_queued=0): tools 8/8 in use, "
        "global 9/16, 0 waiting: raise max_queued, or submit less at once",
    ),
    (
        ConcurrencyLimitExceeded("tool permit", None),
        "no tool permit inside a signal handler or finalizer that interrupted the governor itself: "
        "it must not wait there: use try_acquire",
    ),
]
ERRORS = [error for error, _ in SAYINGS]


@pytest.mark.parametrize(("error", "saying"), SAYINGS)
def test_an_error_says_what_was_asked_what_is_in_the_way_and_what_to_do(
    error: ConcurrencyError, saying: str
) -> None:
    assert str(error) == saying


@pytest.mark.parametrize("error", [SemaphoreClosed, AcquireTimeout, ConcurrencyLimitExceeded])
def test_one_name_catches_every_error(error: type[ConcurrencyError]) -> None:
    assert issubclass(error, ConcurrencyError)
    assert issubclass(error, Exception)


def test_only_a_timeout_is_the_timeout_that_the_stdlib_knows() -> None:
    assert [type(it) for it in ERRORS if isinstance(it, TimeoutError)] == [AcquireTimeout] * 2


def test_an_error_carries_in_fields_what_its_message_says() -> None:
    error = AcquireTimeout("tool permit", 5.0, LAYERS, 3, "crew")
    assert (error.what, error.bound, error.waiting, error.governor) == ("tool permit", 5.0, 3, "crew")
    assert [(use.name, use.in_use, use.limit) for use in error.layers] == [("tools", 8, 8), ("global", 9, 16)]
    closed = SemaphoreClosed("stream permit", "crew")
    assert (closed.what, closed.governor) == ("stream permit", "crew")


@pytest.mark.parametrize("travel", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_travels_whole(
    error: ConcurrencyError, travel: Callable[[ConcurrencyError], ConcurrencyError]
) -> None:
    there = travel(error)
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert vars(there) == vars(error)


def test_the_notes_on_an_error_travel_with_it() -> None:
    error = AcquireTimeout("tool permit", 5.0, LAYERS, 3)
    error.add_note("seen by worker 7")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["seen by worker 7"]


@pytest.mark.parametrize("name", [it for it in governor.__all__ if isinstance(getattr(governor, it), type)])
def test_tracebacks_show_the_name_that_users_import(name: str) -> None:
    assert getattr(governor, name).__module__ == "governor"
