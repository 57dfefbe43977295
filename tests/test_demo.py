"""The demo from within: what it counts, what it draws, and that it ends as it should."""

from __future__ import annotations

import ast
import hashlib
import http.client
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from threads import Crew, until

from governor._demo.demo import run_demo
from governor._demo.gauge import Gauge, Gauges
from governor._demo.interrupt import Interrupt
from governor._demo.regime import Level
from governor._demo.report import as_json, as_table
from governor._demo.result import Outcome, Peak, Result
from governor._demo.screen import LiveScreen, Moment, PlainScreen, SilentScreen, draw, screen_for
from governor._demo.script import Script, ToolCall
from governor._demo.server import ModelServer
from governor._demo.settings import MAX_AGENTS, Settings
from governor._demo.toolbox import Toolbox
from governor._demo.workshop import Workshop, open_workshop

# A ceiling: real work on a machine that may be very busy.
pytestmark = pytest.mark.timeout(60)

ALONE = "researcher"
FOREVER = 3600.0


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    with open_workshop() as opened:
        yield opened


@pytest.fixture
def gauges() -> Gauges:
    return Gauges.of([ALONE])


@pytest.fixture
def toolbox(workshop: Workshop, gauges: Gauges) -> Toolbox:
    return Toolbox(workshop, gauges)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT be Python's own, wherever the tests are run from."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Impatient(SilentScreen):
    """A screen whose watcher presses Ctrl-C at the first moment of a run."""

    every = 0.01

    def __init__(self, run: int) -> None:
        self._runs_to_see = run

    def begin(self, title: str) -> None:
        self._runs_to_see -= 1

    def show(self, moment: Moment) -> None:
        if self._runs_to_see == 0:
            signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------ the plan


def script(seed: int, workshop: Workshop) -> Script:
    return Script(seed, Settings().bursts, Toolbox(workshop, Gauges.of([])).arguments)


def test_the_same_seed_gives_the_same_plan_in_whatever_order_it_is_asked_for(workshop: Workshop) -> None:
    one, other = script(7, workshop), script(7, workshop)
    turns = [(agent, number) for agent in ("coder", "tester") for number in range(3)]
    forward = {turn: one.turn(*turn) for turn in turns}
    assert forward == {turn: other.turn(*turn) for turn in reversed(turns)}


def test_another_seed_agent_or_turn_gives_another_plan(workshop: Workshop) -> None:
    plan = script(7, workshop)
    first = plan.turn("coder", 0)
    assert first not in [plan.turn("coder", 1), plan.turn("tester", 0), script(8, workshop).turn("coder", 0)]


def test_one_burst_alone_is_above_the_limits_of_tools_and_of_all() -> None:
    settings = Settings()
    assert min(settings.bursts) > max(settings.tools, settings.total)


def test_every_agent_has_a_name_of_its_own() -> None:
    assert len(set(Settings(agents=MAX_AGENTS).names)) == MAX_AGENTS


# ------------------------------------------------------------------------------------ the tools


def test_hashing_reads_real_files(toolbox: Toolbox, workshop: Workshop) -> None:
    files = list(workshop.modules.values())
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files[:60]))
    assert toolbox.run(ALONE, ToolCall("hash", files[0].name)) == digest.hexdigest()


def test_searching_finds_functions_by_a_part_of_their_name(toolbox: Toolbox) -> None:
    found = toolbox.run(ALONE, ToolCall("search", "open")).split()
    assert found
    assert all("open" in function for function in found)


def test_parsing_runs_a_process_that_counts_statements(toolbox: Toolbox, workshop: Workshop) -> None:
    name, file = next(iter(workshop.modules.items()))
    assert toolbox.run(ALONE, ToolCall("parse", name)) == str(len(ast.parse(file.read_bytes()).body))


def test_a_query_names_the_modules_that_use_a_word_most(workshop: Workshop) -> None:
    if workshop.database is None:
        pytest.skip("this interpreter has no sqlite3")
    found = re.findall(r"(\S+): (\w+) (\d+)", workshop.database.query("read"))
    assert len(found) == 3
    for module, word, uses in found:
        text = workshop.modules[module].read_text("utf-8")
        assert "read" in word
        assert len(re.findall(rf"(?<![a-z_]){word}(?![a-z_])", text)) == int(uses)


def test_without_sqlite_there_is_no_such_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_sqlite3", None)
    with open_workshop() as lean:
        assert set(Toolbox(lean, Gauges.of([])).arguments) == {"hash", "search", "parse"}


def test_a_tool_that_fails_says_so_and_is_counted_out(toolbox: Toolbox, gauges: Gauges) -> None:
    with pytest.raises(KeyError):
        toolbox.run(ALONE, ToolCall("hammer", "nail"))
    assert [gauges.tools.inside, gauges.tools.peak] == [0, 1]


def test_tools_that_are_to_end_stop_at_the_next_file(toolbox: Toolbox, workshop: Workshop) -> None:
    toolbox.end_tools()
    assert toolbox.run(ALONE, ToolCall("hash", next(iter(workshop.modules)))) == hashlib.sha256().hexdigest()


def test_a_tool_counts_itself_for_its_agent_for_all_tools_and_in_all(
    toolbox: Toolbox, gauges: Gauges, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    counters = [gauges.agents[ALONE], gauges.tools, gauges.total]
    monkeypatch.setitem(toolbox._tools, "wait", lambda _: str(gate.wait()))
    with Crew() as crew:
        try:
            for _ in range(3):
                crew.start(toolbox.run, ALONE, ToolCall("wait", ""))
            until(lambda: [counter.inside for counter in counters] == [3, 3, 3], "three tools at work")
        finally:
            gate.set()
    assert [counter.inside for counter in counters] == [0, 0, 0]
    assert [counter.peak for counter in counters] == [3, 3, 3]


def test_a_peak_stays_when_all_have_left() -> None:
    gauge = Gauge()
    with gauge, gauge:
        pass
    with gauge:
        assert [gauge.inside, gauge.peak] == [1, 2]


# ------------------------------------------------------------------------------------ the server


def ask(server: ModelServer, turn: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    connection.request("POST", "/", json.dumps({"agent": ALONE, "turn": turn}))
    return connection


def test_the_server_streams_a_turn_in_chunks(workshop: Workshop, gauges: Gauges) -> None:
    plan = script(7, workshop)
    with ModelServer(plan, gauges) as server, closing(ask(server, 3)) as connection:
        response = connection.getresponse()
        assert response.headers["Transfer-Encoding"] == "chunked"
        tokens = [json.loads(line) for line in response]
    turn = plan.turn(ALONE, 3)
    assert tuple(token["word"] for token in tokens if "word" in token) == turn.words
    assert tuple(ToolCall(**token) for token in tokens if "tool" in token) == turn.calls


def test_who_has_read_a_stream_to_its_end_finds_it_counted_out(workshop: Workshop, gauges: Gauges) -> None:
    with ModelServer(script(7, workshop), gauges) as server:
        for turn in range(3):
            with closing(ask(server, turn)) as connection:
                connection.getresponse().read()
                assert [gauges.streams.inside, gauges.total.inside] == [0, 0]
    assert [gauges.streams.peak, gauges.total.peak] == [1, 1]


def test_streams_that_are_to_end_do_so_in_good_order(workshop: Workshop, gauges: Gauges) -> None:
    with ModelServer(script(7, workshop), gauges) as server:
        server.end_streams()
        with closing(ask(server, 0)) as connection:
            assert connection.getresponse().read() == b""


# -------------------------------------------------------------------------------------- the runs


def test_governed_no_limit_is_passed_and_ungoverned_each_is() -> None:
    result = run_demo(Settings(seconds=2), SilentScreen())
    assert result.ungoverned is not None
    assert result.kept
    assert all(peak.over for peak in result.ungoverned.peaks.values())
    assert result.governed.longest_wait > 0
    assert result.governed.operations > 0
    assert result.ungoverned.longest_wait == 0


@pytest.mark.parametrize("total", [1, 3])
def test_a_global_limit_below_the_others_is_kept(total: int) -> None:
    result = run_demo(Settings(total=total, seconds=0.5), SilentScreen())
    assert result.governed.peaks["global"].peak <= total
    assert result.kept


def test_an_agent_that_fails_ends_the_demo_at_once_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise LookupError("no such tool")

    monkeypatch.setattr(Toolbox, "run", fail)
    with pytest.raises(LookupError, match="no such tool"):
        run_demo(Settings(seconds=FOREVER), SilentScreen())


def test_ctrl_c_in_the_first_run_leaves_out_the_second(ctrl_c: None) -> None:
    result = run_demo(Settings(seconds=FOREVER), Impatient(run=1))
    assert result.interrupted
    assert result.ungoverned is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_second_run_keeps_what_was_done(ctrl_c: None) -> None:
    result = run_demo(Settings(seconds=0.3), Impatient(run=2))
    assert result.interrupted
    assert result.ungoverned is not None


def test_a_second_ctrl_c_raises(ctrl_c: None) -> None:
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_left_to_an_application_that_handles_it(ctrl_c: None) -> None:
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
    assert pressed == [signal.SIGINT]
    assert not interrupt.seen


def test_a_thread_other_than_the_main_one_can_run_the_demo() -> None:
    results: list[Result] = []
    with Crew(patience=50) as crew:
        crew.start(lambda: results.append(run_demo(Settings(seconds=0.2), SilentScreen())))
    assert results[0].kept


# ------------------------------------------------------------------------------------ the screens

MOMENT = Moment(
    elapsed=1.5,
    seconds=3.0,
    layers=[Level("streams", 2, 4), Level("tools", 11, 8), Level("global", 10, 10, waiting=6)],
    agents=[Level(f"agent-{number}", 1, 4, waiting=2) for number in range(MAX_AGENTS)],
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_output_is_one_line_for_each_moment() -> None:
    out = io.StringIO()
    screen = PlainScreen(out)
    screen.begin("Governed")
    screen.show(MOMENT)
    screen.show(MOMENT)
    title, *lines = out.getvalue().splitlines()
    assert title == "Governed"
    assert len(lines) == 2
    layers = "   1.5 s | streams 2/4 | tools 11/8  3 over | global 10/10  6 waiting"
    assert lines[0].startswith(f"{layers} | agent-0 1/4  2 waiting | agent-1 ")


@pytest.mark.parametrize("columns", [20, 40, 80, 250])
@pytest.mark.parametrize("lines", [5, 24, 100])
def test_a_picture_fits_the_terminal(columns: int, lines: int) -> None:
    picture = draw(MOMENT, os.terminal_size((columns, lines)))
    assert len(picture) < lines
    assert max(map(len, picture)) < columns


def test_a_picture_shows_each_layer_and_each_agent() -> None:
    picture = draw(MOMENT, os.terminal_size((80, 100)))
    shown = [line.split()[0] for line in picture if "[" in line]
    assert shown == [level.name for level in (*MOMENT.layers, *MOMENT.agents)]
    full = next(line for line in picture if "global" in line)
    half = next(line for line in picture if "streams" in line)
    assert full.count("#") == 2 * half.count("#") == half.count("#") + half.count("-")


def test_a_terminal_is_drawn_over_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    out = Terminal()
    screen = LiveScreen(out)
    screen.begin("Governed")
    screen.show(MOMENT)
    first = out.getvalue()
    screen.show(MOMENT)
    second = out.getvalue()[len(first) :]
    height = len(first.splitlines()) - 2  # less the title, and what follows the last line
    assert second.startswith(f"\x1b[{height}F")
    screen.begin("Ungoverned")
    screen.show(MOMENT)
    third = out.getvalue()[len(first) + len(second) :]
    assert third == first.replace("Governed", "Ungoverned")


def test_the_screen_suits_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("WT_SESSION", "of the new Windows console")
    assert isinstance(screen_for(io.StringIO()), PlainScreen)
    assert isinstance(screen_for(Terminal()), LiveScreen)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("WT_SESSION")
    assert isinstance(screen_for(Terminal()), PlainScreen)


# ------------------------------------------------------------------------------------- the result


def outcome(streams: int) -> Outcome:
    return Outcome(
        streams=Peak(4, streams),
        tools=Peak(8, 8),
        total=Peak(10, 9),
        one_agent=Peak(4, 3),
        operations=123,
        longest_wait=0.40049,
    )


def test_the_json_has_the_promised_shape() -> None:
    run = {
        "streams": {"limit": 4, "peak": 4},
        "tools": {"limit": 8, "peak": 8},
        "global": {"limit": 10, "peak": 9},
        "operations": 123,
        "longest_wait_seconds": 0.4,
    }
    assert json.loads(as_json(Result(outcome(4), outcome(4)))) == {"governed": run, "ungoverned": run}
    assert json.loads(as_json(Result(outcome(4), None))) == {"governed": run, "ungoverned": None}


def test_the_table_has_both_runs_and_says_what_they_show() -> None:
    table = as_table(Result(outcome(4), outcome(6)))
    rows = [line.split() for line in table.splitlines()]
    assert ["limit", "governed", "ungoverned"] in rows
    assert ["peak", "of", "streams", "4", "4", "6"] in rows
    assert ["operations", "done", "123", "123"] in rows
    assert ["longest", "wait", "0.40", "s", "0.40", "s"] in rows
    assert "Governed, no limit was passed." in table
    assert "Ungoverned, these were: streams 6 of 4." in table


def test_the_table_does_not_claim_what_was_not_seen() -> None:
    assert "Ungoverned, none was either" in as_table(Result(outcome(4), outcome(4)))
    assert "LIMITS WERE PASSED, which is a bug: streams 5 of 4." in as_table(Result(outcome(5), None))


def test_the_table_of_an_interrupted_demo_says_so() -> None:
    table = as_table(Result(outcome(4), None, interrupted=True))
    assert "peak of streams                4            4            -" in table
    assert "Ungoverned" not in table
    assert "Interrupted" in table
