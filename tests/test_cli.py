"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import governor
from governor._cli import main
from governor._demo import demo
from governor._demo.result import Outcome, Peak, Result
from governor._demo.screen import Screen
from governor._demo.settings import Settings

# Ceilings: real work on a machine that may be very busy.
pytestmark = pytest.mark.timeout(60)
PATIENCE = 50

MOMENT = re.compile(
    r" +\d+\.\d s \| streams \d+/4.* \| tools \d+/8.* \| global \d+/10.* \| researcher \d+/4.* \| planner .*"
)

LIMITS = {"streams": 4, "tools": 8, "global": 10}

posix_only = pytest.mark.skipif(os.name == "nt", reason="signals and pipes are POSIX's")


@pytest.fixture(autouse=True)
def plain_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep argparse's colours out, whatever the terminal or the CI asks for."""
    monkeypatch.setenv("PYTHON_COLORS", "0")


# ----------------------------------------------------------------------------- in this process


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Stand in for the demo, which would take its time; return what it is asked for."""
    settings: list[Settings] = []

    def run_demo(given: Settings, screen: Screen) -> Result:
        settings.append(given)
        return result()

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return settings


def result(*, streams: int = 4, interrupted: bool = False) -> Result:
    """Return the result of a demo whose peak of streams was this, of four allowed."""
    peaks = Peak(4, streams), Peak(8, 8), Peak(10, 10), Peak(4, 4)
    outcome = Outcome(*peaks, operations=123, longest_wait=0.4)
    return Result(outcome, None if interrupted else outcome, interrupted)


def test_without_options_the_demo_has_its_defaults(asked: list[Settings]) -> None:
    assert main(["demo"]) == 0
    assert asked == [Settings()]


def test_each_option_reaches_the_demo(asked: list[Settings]) -> None:
    options = "--streams 1 --tools 2 --global 3 --agents 5 --seconds 0.7 --seed -11"
    assert main(["demo", *options.split()]) == 0
    assert asked == [Settings(streams=1, tools=2, total=3, agents=5, seconds=0.7, seed=-11)]


@pytest.mark.parametrize(("streams", "agents"), [(1, 3), (9, 11), (1000, 32)])
def test_there_are_more_agents_than_streams_where_that_is_possible(
    asked: list[Settings], streams: int, agents: int
) -> None:
    main(["demo", "--streams", str(streams)])
    assert asked[0].agents == agents


Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command line that must be refused, with nothing on stdout; return what it says."""

    def refuse(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        said = capsys.readouterr()
        assert exit_.value.code == 2
        assert said.out == ""
        return said.err

    return refuse


@pytest.mark.parametrize("option", ["--streams", "--tools", "--global", "--agents"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "", "nan"])
def test_a_count_that_makes_no_sense_is_an_error_that_names_the_option(
    option: str, value: str, refusal: Refusal
) -> None:
    message = refusal("demo", option, value)
    assert f"argument {option}: must be a whole number" in message
    assert message.endswith(f"not {value!r}\n")


def test_more_agents_than_a_process_should_have_are_refused(refusal: Refusal) -> None:
    message = refusal("demo", "--agents", "33")
    assert "argument --agents: must be a whole number from 1 to 32, not '33'" in message


@pytest.mark.parametrize("value", ["0", "-1", "-0.5", "nan", "inf", "soon", ""])
def test_a_time_that_makes_no_sense_is_an_error_that_names_the_option(value: str, refusal: Refusal) -> None:
    message = refusal("demo", "--seconds", value)
    assert f"argument --seconds: must be a number of seconds above 0, not {value!r}" in message


def test_a_seed_that_is_no_number_is_an_error_that_names_the_option(refusal: Refusal) -> None:
    assert "argument --seed: must be a whole number, not 'x'" in refusal("demo", "--seed", "x")


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--stream", "4"], ["demo", "--streams"]])
def test_what_it_does_not_understand_it_does_not_do(arguments: list[str], refusal: Refusal) -> None:
    assert "error: " in refusal(*arguments)


def test_a_limit_that_the_governor_let_pass_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_: result(streams=5))
    assert main(["demo"]) == 1
    assert "a bug" in capsys.readouterr().out


def test_an_interrupted_demo_prints_the_json_that_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_: result(interrupted=True))
    assert main(["demo", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["ungoverned"] is None


def test_an_impatient_second_ctrl_c_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert main(["demo"]) == 130


# ---------------------------------------------------------------------- in a process of its own


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child find the package that is under test, and nothing by the folder it starts in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(governor.__file__).parents[1]))


# What is left open at the end would be said on stderr, which the tests want empty.
COMMAND = [sys.executable, "-X", "dev", "-W", "error", "-m", "governor", "demo"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end."""
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=PATIENCE)


@contextmanager
def running(*options: str) -> Iterator[subprocess.Popen[str]]:
    """Start the demo, and make sure that it is gone after the block."""
    pipe = subprocess.PIPE
    # A job in the background of a script starts with SIGINT ignored, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        child = subprocess.Popen([*COMMAND, *options], stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.usefixtures("elsewhere")
def test_json_alone_is_on_stdout_and_shows_the_point() -> None:
    done = run("--seconds", "2", "--json")
    assert done.stderr == ""
    assert done.returncode == 0
    runs = json.loads(done.stdout)
    assert list(runs) == ["governed", "ungoverned"]
    for outcome in runs.values():
        assert list(outcome) == [*LIMITS, "operations", "longest_wait_seconds"]
        assert {layer: outcome[layer]["limit"] for layer in LIMITS} == LIMITS
    for layer, limit in LIMITS.items():
        assert runs["governed"][layer]["peak"] <= limit < runs["ungoverned"][layer]["peak"]


@pytest.mark.usefixtures("elsewhere")
def test_output_that_is_no_terminal_gets_plain_lines_and_the_table() -> None:
    done = run("--seconds", "0.6")
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    second = lines.index("Ungoverned: the same work, nothing held back")
    end = lines.index("")
    assert lines[0].startswith("Governed: 6 agents")
    for moments in (lines[1:second], lines[second + 1 : end]):
        assert 1 <= len(moments) <= 2
        assert all(map(MOMENT.fullmatch, moments))
    assert lines[end + 1].split() == ["limit", "governed", "ungoverned"]
    assert "Governed, no limit was passed." in lines
    assert "\x1b" not in done.stdout


@pytest.mark.usefixtures("elsewhere")
def test_a_bad_value_is_status_2() -> None:
    done = run("--tools", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--tools" in done.stderr


@posix_only
@pytest.mark.usefixtures("elsewhere")
def test_ctrl_c_ends_it_with_the_table_so_far() -> None:
    with running("--seconds", "3600") as child:
        assert child.stdout is not None
        title, moment = child.stdout.readline(), child.stdout.readline()
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=PATIENCE)
    assert errors == ""
    assert title.startswith("Governed")
    assert MOMENT.fullmatch(moment.rstrip())
    assert "peak of streams " in rest
    assert "Interrupted" in rest
    assert child.returncode == 130


@posix_only
@pytest.mark.usefixtures("elsewhere")
def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    with running("--seconds", "3600") as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(PATIENCE) == 1
        assert child.stderr is not None
        assert child.stderr.read() == ""
