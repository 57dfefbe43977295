"""The examples with the frameworks they are about: limits as the model server and the tools count them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from models import EXAMPLES, Gates, ModelServer
from threads import Crew, until

import governor

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what a framework does is its own affair
]

PATIENCE = 25.0  # a framework's first steps are slow
LIMITS = {"max_streams": 2, "max_tools": 3, "max_global": 4}


@pytest.fixture(autouse=True)
def the_same_governor_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(governor.__file__).parents[1]))


def peaks(server: ModelServer) -> tuple[int, int, int]:
    return server.streams.peak, server.pages.peak, server.everything.peak


def idle(server: ModelServer) -> bool:
    return server.streams.now == server.pages.now == server.everything.now == 0


# ------------------------------------------------------------------------------------------- agents


def crowd(example: Any, server: ModelServer, gates: Gates) -> list[str]:
    """Run agents that fill one limit after the other, and return their answers."""
    stats, answers = example.gov.stats, []

    def research(number: int) -> None:
        answers.append(example.research(server, number))

    with Crew(patience=PATIENCE) as crew:
        for number in range(4):
            crew.start(research, number)
        until(
            lambda: server.streams.now == 2 and stats().streams_waiting == 2,
            "two answers, and two agents in line for theirs",
            patience=PATIENCE,
        )
        gates.stream.set()
        until(
            lambda: server.pages.now == 3 and stats().tools_waiting,
            "three tools, and more in line",
            patience=PATIENCE,
        )
        gates.stream.clear()
        for number in 4, 5:
            crew.start(research, number)
        until(
            lambda: server.everything.now == 4 and stats().streams_waiting,
            "a fourth operation, and an answer in line though there is room for a stream",
            patience=PATIENCE,
        )
        gates.open()
    return answers


@pytest.mark.parametrize("name", ["langchain_agent", "smolagents_tools"])
def test_agents_of_a_framework_reach_every_limit_and_pass_none(
    name: str, server: ModelServer, gates: Gates
) -> None:
    pytest.importorskip({"langchain_agent": "langchain_openai", "smolagents_tools": "smolagents"}[name])
    example = __import__(name)

    answers = crowd(example, server, gates)

    assert len(answers) == 6
    assert all(answer.startswith("Done: ") for answer in answers)
    assert peaks(server) == (2, 3, 4)
    assert example.tools_at_work.peak == 3
    assert idle(server)
    assert example.gov.holders() == []
    assert example.gov.stats().global_available == 4


# -------------------------------------------------------------------------------------------- Flask


def test_a_flask_app_reaches_every_limit_and_passes_none(server: ModelServer, gates: Gates) -> None:
    example = flask_example()
    with example.gunicorn(server.url, **LIMITS) as url, Crew(patience=PATIENCE) as crew:
        answers: list[str] = []

        def get(path: str) -> None:
            answers.append(example.get(url + path))

        for number in range(4):
            crew.start(get, f"/ask?prompt=question+{number}")
        until(
            lambda: server.streams.now == 2 and stats(url)["streams_waiting"] == 2,
            "two answers, and two browsers in line for theirs",
            patience=PATIENCE,
        )
        for _ in range(2):
            crew.start(get, "/fetch?page=a&page=b&page=c&page=d")
        until(
            lambda: server.everything.now == 4 and stats(url)["tools_waiting"] == 2,
            "two tools beside the answers, and both browsers' next ones in line",
            patience=PATIENCE,
        )
        gates.stream.set()
        until(lambda: server.pages.now == 3, "a third tool in the place of an answer", patience=PATIENCE)
        gates.open()
        crew.join()

        said = sorted(answer for answer in answers if answer.startswith("You"))
        assert said == [f"You said: question {number}" for number in range(4)]
        assert peaks(server) == (2, 3, 4)
        until(lambda: idle(server) and set(stats(url).values()) == {0}, "all to be given back")


def test_a_browser_that_goes_away_amid_a_stream_gives_its_permit_back() -> None:
    example = flask_example()
    pieces, rest = itertools.count(), threading.Event()

    def first_piece_only(kind: str) -> None:
        if next(pieces) > 0:
            rest.wait()

    with ModelServer(first_piece_only) as server, example.gunicorn(server.url, **LIMITS) as url:
        try:
            with urllib.request.urlopen(f"{url}/ask?prompt={'word+' * 500}", timeout=PATIENCE) as page:
                assert page.read(3) == b"You"
                assert stats(url)["streams_in_use"] == 1
        finally:
            rest.set()

        until(lambda: set(stats(url).values()) == {0}, "the permit to come back")
        until(lambda: idle(server), "the model to notice")
        assert server.cut.now == 1  # so it was not by the answer's end
        assert next(pieces) < 500


def flask_example() -> Any:
    for needed in "flask", "gunicorn", "openai":
        pytest.importorskip(needed)
    return __import__("flask_app")


def stats(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/stats", timeout=PATIENCE) as page:
        return json.load(page)


# ------------------------------------------------------------------------------------------ scripts


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("langchain_agent", "langchain_openai"),
        ("smolagents_tools", "smolagents"),
        ("flask_app", "gunicorn"),
    ],
)
def test_an_example_runs_as_a_script_and_tells_what_happened(name: str, needs: str) -> None:
    pytest.importorskip(needs)
    script = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=55
    )
    assert script.returncode == 0, script.stderr
    assert "Traceback" not in script.stderr
    assert "in use now: 0" in script.stdout
