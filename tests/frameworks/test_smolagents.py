"""Agents of smolagents that are governed in one line: counted by the tools themselves."""

from __future__ import annotations

import json
import os
import threading
from typing import Any, ClassVar

import pytest
from model_server import ModelServer
from serving import Gates
from threads import Crew, Gauge, is_idle, until

from governor import AcquireTimeout, ConcurrencyGovernor

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1")  # before smolagents is imported
pytest.importorskip("smolagents")

from rich.console import Console
from smolagents import CodeAgent, OpenAIModel, Tool, ToolCallingAgent

from governor.integrations.smolagents import govern

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what a framework does is its own affair
]

PATIENCE = 25.0  # a framework's first steps are slow


class Dig(Tool):
    """A tool as anybody might have made it, knowing nothing of a governor."""

    name = "dig"
    description = "Dig a hole."
    inputs: ClassVar = {"depth": {"type": "integer", "description": "How deep."}}
    output_type = "string"

    def __init__(self) -> None:
        super().__init__()
        self.gauge, self.gate = Gauge(), threading.Event()

    def forward(self, depth: int) -> str:
        with self.gauge:
            assert self.gate.wait(PATIENCE)
        return f"{depth} deep"


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=2, max_tools=3, max_global=4)


def agent(server: ModelServer, *tools: Tool, **options: Any) -> ToolCallingAgent:
    model = OpenAIModel("scripted", api_base=server.url, api_key="none")
    made = ToolCallingAgent([*tools], model, max_tool_threads=8, **options)
    made.logger.console = Console(quiet=True)
    return made


def calls(name: str, **arguments: Any) -> str:
    """The line of a prompt that makes the scripted model call a tool."""
    return f"{name} {json.dumps(arguments)}"


@pytest.mark.parametrize("streams", [False, True], ids=["whole answers", "streamed answers"])
def test_concurrent_runs_fill_the_limits_and_pass_none(
    streams: bool, gov: ConcurrencyGovernor, server: ModelServer, gates: Gates
) -> None:
    dig, answers = Dig(), []

    def run() -> None:
        one = govern(agent(server, dig, stream_outputs=streams), gov)
        answers.append(one.run("\n".join(calls("dig", depth=depth) for depth in range(3))))

    with Crew(patience=PATIENCE) as crew:
        for _ in range(4):
            crew.start(run)
        until(
            lambda: server.streams.now == 2 and gov.stats().streams_waiting == 2,
            "two answers, and two agents in line for theirs",
            patience=PATIENCE,
        )
        gates.open()
        until(
            lambda: dig.gauge.inside == 3 and gov.stats().tools_waiting == 9,
            "three tools, and all others in line",
            patience=PATIENCE,
        )
        dig.gate.set()

    assert [answer[:5] for answer in answers] == ["Done:"] * 4
    assert (dig.gauge.peak, dig.gauge.entries, server.streams.peak) == (3, 12, 2)
    assert is_idle(gov)


def test_an_agent_that_another_manages_is_governed_and_takes_no_place_itself(
    server: ModelServer, gates: Gates
) -> None:
    gov, dig = ConcurrencyGovernor(1, 1, 1), Dig()  # one place for all
    gates.open()
    dig.gate.set()
    digger = agent(server, dig, name="digger", description="Digs.", stream_outputs=True)
    boss = agent(server, managed_agents=[digger], stream_outputs=True)

    answer = govern(boss, gov).run(calls("digger", task=calls("dig", depth=7)))

    assert dig.gauge.entries == 1
    assert "7 deep" in answer
    assert dig.forward.governor is digger.model.generate.governor is gov
    assert is_idle(gov)


def test_tools_that_an_agent_calls_from_code_are_governed(gov: ConcurrencyGovernor) -> None:
    class Coder:
        """A model that writes the program that it was made with."""

        model_id = "coder"

        def generate(self, messages: Any, **_: Any) -> Any:
            from smolagents import ChatMessage

            assert gov.stats().streams_in_use == 1
            code = "Thought: dig.\n<code>\nfinal_answer(dig(depth=3))\n</code>"
            return ChatMessage(role="assistant", content=code)

    class Look(Dig):
        def forward(self, depth: int) -> str:
            assert gov.stats().tools_in_use == 1
            return f"{depth} deep"

    coder = CodeAgent([Look()], Coder(), max_steps=1)
    coder.logger.console = Console(quiet=True)

    assert govern(coder, gov).run("Dig.") == "3 deep"
    assert is_idle(gov)


def test_a_call_that_gets_no_permit_in_time_fails(gov: ConcurrencyGovernor, server: ModelServer) -> None:
    dig = Dig()
    one = govern(agent(server, dig), gov, acquire_timeout=0.01)

    with (
        gov.acquire_tool(),
        gov.acquire_tool(),
        gov.acquire_tool(),
        pytest.raises(AcquireTimeout, match=r"no tool permit within 0\.01 s"),
    ):
        dig(depth=1)
    with (
        gov.acquire_stream(),
        gov.acquire_stream(),
        pytest.raises(AcquireTimeout, match=r"no stream permit within 0\.01 s"),
    ):
        one.model.generate([])

    assert dig.gauge.entries == 0
    assert server.streams.peak == 0
    assert is_idle(gov)


def test_to_govern_it_again_changes_nothing(server: ModelServer) -> None:
    gov, dig = ConcurrencyGovernor(1, 1, 1), Dig()
    dig.gate.set()
    one = agent(server, dig)
    assert govern(govern(one, gov), gov) is one

    assert dig(depth=2) == "2 deep"  # which would raise DeadlockError under two permits


def test_a_tool_of_another_governor_is_refused(gov: ConcurrencyGovernor, server: ModelServer) -> None:
    dig = Dig()
    govern(agent(server, dig), gov)
    with pytest.raises(ValueError, match=r"is governed by <ConcurrencyGovernor .* already"):
        govern(agent(server, dig), ConcurrencyGovernor.with_defaults())
