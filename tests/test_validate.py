"""What callers may pass in, and what they are told where it is wrong."""

from __future__ import annotations

import re
from enum import IntEnum

import pytest

from governor._validate import check_count, check_name, check_timeout, count_from_env, seconds_from_env

INF, NAN = float("inf"), float("nan")


class Size(IntEnum):
    SMALL = 3


class Index:
    """An integer of another library, as numpy has them."""

    def __index__(self) -> int:
        return 4


@pytest.mark.parametrize("value", [0, 1, 2**64, 10**30, Size.SMALL, Index()])
def test_a_count_is_any_integer_and_comes_back_as_an_int(value: int) -> None:
    count = check_count("max_tools", value)
    assert type(count) is int
    assert count == value.__index__()


@pytest.mark.parametrize("value", [True, False, 1.0, 0.5, NAN, INF, "1", b"1", None, [], 1j, object()])
def test_what_is_not_an_integer_is_not_a_count(value: object) -> None:
    saying = re.escape(f"max_tools must be an integer >= 0, not {value!r}")
    with pytest.raises(TypeError, match=saying):
        check_count("max_tools", value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "least"), [(-1, 0), (-(10**30), 0), (0, 1), (Size.SMALL, 4)])
def test_a_count_below_the_least_is_refused(value: int, least: int) -> None:
    saying = re.escape(f"size must be an integer >= {least}, not {value!r}")
    with pytest.raises(ValueError, match=saying):
        check_count("size", value, least=least)


@pytest.mark.parametrize("value", [0, 0.0, -0.0, 1, 1.5, 5e-324, 1e308, Size.SMALL])
def test_a_timeout_is_any_number_of_seconds(value: float) -> None:
    timeout = check_timeout(value)
    assert type(timeout) is float
    assert timeout == value


@pytest.mark.parametrize("value", [None, INF, 10**400])
def test_a_wait_without_end_has_one_face(value: float | None) -> None:
    assert check_timeout(value) is None


@pytest.mark.parametrize("value", [-1, -0.001, -(10**400), -INF, NAN])
def test_a_negative_timeout_is_refused_and_so_is_no_number(value: float) -> None:
    saying = re.escape(f"timeout must be a number of seconds >= 0 or None, not {value!r}")
    with pytest.raises(ValueError, match=saying):
        check_timeout(value)


@pytest.mark.parametrize("value", [True, False, "1", b"1", 1j, [], object()])
def test_what_is_not_a_number_is_not_a_timeout(value: object) -> None:
    saying = re.escape(f"acquire_timeout must be a number of seconds >= 0 or None, not {value!r}")
    with pytest.raises(TypeError, match=saying):
        check_timeout(value, "acquire_timeout")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["crew", " ", "Ⅷ", "a/b"])
def test_a_name_is_any_string_that_is_not_empty(value: str) -> None:
    assert check_name("name", value) == value


@pytest.mark.parametrize(("value", "error"), [("", ValueError), (None, TypeError), (b"x", TypeError)])
def test_anything_else_is_not_a_name(value: object, error: type[Exception]) -> None:
    saying = re.escape(f"name must be a string that is not empty, not {value!r}")
    with pytest.raises(error, match=saying):
        check_name("name", value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "count"), [(None, None), ("0", 0), ("8", 8), (" 08 \n", 8)])
def test_a_count_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str | None, count: int | None
) -> None:
    monkeypatch.delenv("CREW_MAX_TOOLS", raising=False)
    if text is not None:
        monkeypatch.setenv("CREW_MAX_TOOLS", text)
    assert count_from_env("CREW_MAX_TOOLS") == count


@pytest.mark.parametrize(
    "text", ["", " ", "eight", "-1", "+1", "1.0", "1_000", "0x8", "1 2", "nan", "inf", "٣", "²", "9" * 5000]
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CREW_MAX_TOOLS", text)
    saying = "environment variable CREW_MAX_TOOLS must be an integer >= 0, not "
    with pytest.raises(ValueError, match=saying):
        count_from_env("CREW_MAX_TOOLS")


@pytest.mark.parametrize(
    ("text", "seconds"), [(None, None), ("30", 30.0), (" 0.5 ", 0.5), ("inf", None), ("0", 0.0)]
)
def test_seconds_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str | None, seconds: float | None
) -> None:
    monkeypatch.delenv("CREW_SLOW_WAIT", raising=False)
    if text is not None:
        monkeypatch.setenv("CREW_SLOW_WAIT", text)
    assert seconds_from_env("CREW_SLOW_WAIT") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "nan", "1 s"])
def test_bad_seconds_are_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CREW_SLOW_WAIT", text)
    with pytest.raises(ValueError, match="CREW_SLOW_WAIT must be a number of seconds >= 0, not "):
        seconds_from_env("CREW_SLOW_WAIT")
