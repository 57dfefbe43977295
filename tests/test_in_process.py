"""The governor of a process: its defaults, the environment, the ones that are shared."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from governors import books, expect, limits, race, waiting
from threads import Crew, until

from governor import ConcurrencyGovernor, ConcurrencyLimitExceeded, SemaphoreClosed

VARIABLES = ["MAX_STREAMS", "MAX_TOOLS", "MAX_GLOBAL", "MAX_QUEUED"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(f"GOVERNOR_{variable}", raising=False)


@pytest.fixture
def shared_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name that no other test shares a governor under."""
    yield request.node.name
    ConcurrencyGovernor.shared(request.node.name).close()


def test_the_defaults_are_4_streams_8_tools_16_in_all() -> None:
    assert limits(ConcurrencyGovernor.with_defaults()) == (4, 8, 16)


@pytest.mark.parametrize("huge", [2**63 - 1, 10**30])
def test_a_huge_limit_is_a_limit(huge: int) -> None:
    gov = ConcurrencyGovernor(huge, huge, 16, max_queued=huge)
    assert limits(gov) == (huge, huge, 16)
    agent = gov.agent("coder", max_tools=huge, max_streams=huge)
    agent.resize(max_tools=3, max_streams=huge)
    assert limits(agent) == (huge, 3, 16)
    with agent.acquire_tool(), agent.acquire_stream():
        assert books(gov) == books(agent) == (1, 1, 2)


# ---------------------------------------------------------------------------------- the environment


@pytest.mark.parametrize("prefix", ["GOVERNOR_", "CREW_", ""])
def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    for value, variable in enumerate(VARIABLES):
        monkeypatch.setenv(f"{prefix}{variable}", str(value))
    gov = ConcurrencyGovernor.from_env() if prefix == "GOVERNOR_" else ConcurrencyGovernor.from_env(prefix)
    assert limits(gov) == (0, 1, 2)
    with Crew() as crew:
        for _ in range(3):
            crew.start(expect, SemaphoreClosed, gov.acquire_stream)
        until(lambda: waiting(gov) == 3, "as many in line as may be")
        with pytest.raises(ConcurrencyLimitExceeded, match="max_queued=3"):
            gov.acquire_stream(timeout=5)
        gov.close()


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("MAX_STREAMS", (1, 8, 16)), ("MAX_TOOLS", (4, 1, 16)), ("MAX_GLOBAL", (4, 8, 1))],
)
def test_what_the_environment_does_not_say_takes_the_default(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: tuple[int, int, int]
) -> None:
    assert limits(ConcurrencyGovernor.from_env()) == (4, 8, 16)
    monkeypatch.setenv(f"GOVERNOR_{variable}", "1")
    assert limits(ConcurrencyGovernor.from_env()) == expected


@pytest.mark.parametrize("bad", ["", "-1", "many", "1.5", "None"])
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, bad: str) -> None:
    monkeypatch.setenv(f"CREW_{variable}", bad)
    saying = re.escape(f"environment variable CREW_{variable} must be an integer >= 0, not {bad!r}")
    with pytest.raises(ValueError, match=saying):
        ConcurrencyGovernor.from_env("CREW_")


# ------------------------------------------------------------------------------------------- shared


def test_one_name_is_one_governor(shared_name: str) -> None:
    gov = ConcurrencyGovernor.shared(shared_name)
    assert limits(gov) == (4, 8, 16)
    assert gov.name == shared_name
    assert ConcurrencyGovernor.shared(shared_name) is gov
    assert ConcurrencyGovernor.shared(shared_name, max_tools=8) is gov
    assert ConcurrencyGovernor.shared(shared_name + " two") is not gov
    ConcurrencyGovernor.shared(shared_name + " two").close()


def test_the_name_may_be_left_out() -> None:
    with ConcurrencyGovernor.shared() as gov:
        assert ConcurrencyGovernor.shared("default") is gov


def test_what_a_shared_governor_is_not_told_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, shared_name: str
) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(f"GOVERNOR_{variable}", "0")
    gov = ConcurrencyGovernor.shared(shared_name, max_tools=3)
    assert limits(gov) == (0, 3, 0)
    with pytest.raises(ConcurrencyLimitExceeded, match="max_queued=0"):
        gov.acquire_tool(timeout=5)
    monkeypatch.setenv("GOVERNOR_MAX_TOOLS", "not read any more")
    assert ConcurrencyGovernor.shared(shared_name) is gov


def test_other_limits_than_it_was_made_with_are_refused_though_it_was_resized(shared_name: str) -> None:
    gov = ConcurrencyGovernor.shared(shared_name, max_tools=3)
    gov.resize(max_tools=5)
    with pytest.raises(ValueError, match=r"max_tools=5: the shared governor '.*' was made with 3: "):
        ConcurrencyGovernor.shared(shared_name, max_tools=5)
    with pytest.raises(ValueError, match=r"max_global=9: the shared governor '.*' was made with 16: "):
        ConcurrencyGovernor.shared(shared_name, max_global=9)
    assert ConcurrencyGovernor.shared(shared_name, max_streams=4, max_tools=3, max_global=16) is gov
    assert limits(gov) == (4, 5, 16)


def test_closing_frees_the_name_once(shared_name: str) -> None:
    old = ConcurrencyGovernor.shared(shared_name, max_tools=1)
    old.close()
    new = ConcurrencyGovernor.shared(shared_name, max_tools=2)
    assert new is not old
    old.close()
    assert ConcurrencyGovernor.shared(shared_name) is new
    assert not new.closed


def test_closing_a_namesake_leaves_the_shared_one_alone(shared_name: str) -> None:
    gov = ConcurrencyGovernor.shared(shared_name)
    ConcurrencyGovernor(1, 1, 1, name=shared_name).close()
    gov.agent(shared_name, max_tools=1).close()
    assert ConcurrencyGovernor.shared(shared_name) is gov


def test_threads_that_ask_at_once_share_one(shared_name: str) -> None:
    assert len(race(lambda: ConcurrencyGovernor.shared(shared_name))) == 1
