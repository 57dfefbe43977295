"""A tool under `@gov.tool` in each framework: it stays what it was, and the limit holds in its threads."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from model_server import ModelServer
from serving import Gates
from threads import Crew, Gauge, is_idle, until

from governor import ConcurrencyGovernor
from governor.integrations.asyncio import permit

os.environ.update(CREWAI_DISABLE_TELEMETRY="true", CREWAI_TRACING_ENABLED="false")  # before it is imported
os.environ.update(CREWAI_DISABLE_VERSION_CHECK="true")

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("default"),  # what a framework does is its own affair
    pytest.mark.filterwarnings("error::ResourceWarning:governor"),
]

PATIENCE = 40.0  # a framework's first steps are slow

DEPTHS = range(4)

# What makes the scripted model ask for four calls at once.
PROMPT = "\n".join(["Dig.", *(f"dig {json.dumps({'depth': depth})}" for depth in DEPTHS)])


@pytest.fixture(autouse=True)
def nothing_is_stored_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREWAI_STORAGE_DIR", str(tmp_path))


class Recipe(NamedTuple):
    """What a framework made of a tool: how it shows it to a model, and an agent's run that calls it."""

    name: str
    description: str
    schema: Any
    run: Callable[[], Any]


Tool = Callable[[int], str]


def crewai(dig: Tool, server: ModelServer) -> Recipe:
    pytest.importorskip("crewai")
    from crewai import LLM, Agent, Crew, Task
    from crewai.events.event_bus import crewai_event_bus
    from crewai.tools import tool

    made = tool(dig)
    llm = LLM(model="openai/scripted", base_url=server.url, api_key="none")

    def run() -> Any:
        digger = Agent(role="digger", goal="Dig.", backstory="Digs.", tools=[made], llm=llm)
        task = Task(description=PROMPT, expected_output="The depths.", agent=digger)
        try:
            return Crew(agents=[digger], tasks=[task]).kickoff()
        finally:
            crewai_event_bus.shutdown()  # whose threads would go on

    return Recipe(made.name, made.description, made.args_schema.model_json_schema(), run)


def dspy(dig: Tool, server: ModelServer) -> Recipe:
    dspy = pytest.importorskip("dspy")
    from dspy.utils import DummyLM
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # of a thread that would go on

    def digger(depth: int) -> Any:
        agent = dspy.ReAct("task -> answer", tools=[dig])
        call = {"next_thought": "dig", "next_tool_name": "dig", "next_tool_args": {"depth": depth}}
        end = {"next_thought": "done", "next_tool_name": "finish", "next_tool_args": {}}
        agent.set_lm(DummyLM([call, end, {"reasoning": "it is dug", "answer": "done"}]))
        return agent, dspy.Example(task="Dig.").with_inputs("task")

    def run() -> Any:
        return dspy.Parallel(num_threads=4, disable_progress_bar=True)([digger(depth) for depth in DEPTHS])

    made = dspy.Tool(dig)
    return Recipe(made.name, made.desc, made.args, run)


def haystack(dig: Tool, server: ModelServer) -> Recipe:
    pytest.importorskip("haystack")
    from haystack.components.agents import Agent
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import create_tool_from_function
    from haystack.utils import Secret

    made = create_tool_from_function(dig)
    model = OpenAIChatGenerator(Secret.from_token("none"), "scripted", api_base_url=server.url)

    def run() -> Any:
        return Agent(chat_generator=model, tools=[made]).run([ChatMessage.from_user(PROMPT)])

    return Recipe(made.name, made.description, made.parameters, run)


def llama_index(dig: Tool, server: ModelServer) -> Recipe:
    pytest.importorskip("llama_index.core")
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
    from llama_index.core.llms.mock import MockFunctionCallingLLM
    from llama_index.core.tools import FunctionTool

    made = FunctionTool.from_defaults(dig)

    def think(messages: list[ChatMessage], **_: Any) -> ChatMessage:
        if messages[-1].role == "tool":
            return ChatMessage("done", role="assistant")
        calls = [
            ToolCallBlock(tool_call_id=str(depth), tool_name="dig", tool_kwargs={"depth": depth})
            for depth in DEPTHS
        ]
        return ChatMessage(role="assistant", blocks=calls)

    async def main() -> Any:
        model = MockFunctionCallingLLM(response_generator=think)
        return await FunctionAgent(tools=[made], llm=model).run("Dig.")

    schema = made.metadata.get_parameters_dict()
    return Recipe(made.metadata.name, made.metadata.description, schema, lambda: asyncio.run(main()))


def mcp(dig: Tool, server: ModelServer) -> Recipe:
    if not hasattr(pytest.importorskip("mcp.server"), "MCPServer"):
        pytest.skip("before 2, MCP's server runs a tool on its event loop")
    from mcp.client import Client
    from mcp.server import MCPServer

    tools = MCPServer("tools")
    tools.tool()(dig)

    async def main() -> Any:
        async with Client(tools) as client:
            calls = [client.call_tool("dig", {"depth": depth}) for depth in DEPTHS]
            return (await client.list_tools()).tools[0], await asyncio.gather(*calls)

    async def look() -> Any:
        async with Client(tools) as client:
            return (await client.list_tools()).tools[0]

    shown = asyncio.run(look())
    return Recipe(shown.name, shown.description, shown.input_schema, lambda: asyncio.run(main()))


def openai_agents(dig: Tool, server: ModelServer) -> Recipe:
    pytest.importorskip("agents")
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    made = function_tool(dig)

    async def main() -> Any:
        async with AsyncOpenAI(base_url=server.url, api_key="none") as client:
            model = OpenAIChatCompletionsModel("scripted", client)
            return await Runner.run(Agent("digger", tools=[made], model=model), PROMPT)

    return Recipe(made.name, made.description, made.params_json_schema, lambda: asyncio.run(main()))


def pydantic_ai(dig: Tool, server: ModelServer) -> Recipe:
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent, Tool
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import FunctionModel

    def think(messages: list[Any], info: Any) -> ModelResponse:
        if len(messages) > 1:
            return ModelResponse([TextPart("done")])
        return ModelResponse([ToolCallPart("dig", {"depth": depth}) for depth in DEPTHS])

    made = Tool(dig)
    agent = Agent(FunctionModel(think), tools=[made])
    schema = made.function_schema.json_schema
    return Recipe(made.name, made.description or "", schema, lambda: asyncio.run(agent.run("Dig.")))


FRAMEWORKS = [crewai, dspy, haystack, llama_index, mcp, openai_agents, pydantic_ai]
each_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda it: it.__name__)


def plain(depth: int) -> str:
    """Dig a hole.

    Args:
        depth: How deep.
    """
    return f"{depth} deep"


plain.__name__ = plain.__qualname__ = "dig"


@each_framework
def test_a_governed_tool_is_shown_to_the_model_as_it_was(
    framework: Callable[[Tool, ModelServer], Recipe], server: ModelServer
) -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    shown, was = framework(gov.tool(plain), server), framework(plain, server)
    assert shown[:3] == was[:3]
    assert shown.name == "dig"
    assert "Dig a hole." in shown.description
    assert "depth" in str(shown.schema)


@each_framework
def test_the_limit_holds_in_the_threads_of_a_framework(
    framework: Callable[[Tool, ModelServer], Recipe], server: ModelServer, gates: Gates
) -> None:
    gov = ConcurrencyGovernor(max_streams=1, max_tools=2, max_global=3)
    gauge, gate, results = Gauge(), threading.Event(), []
    gates.open()

    @gov.tool
    def dig(depth: int) -> str:
        """Dig a hole."""
        with gauge:
            assert gate.wait(PATIENCE)
        return f"{depth} deep"

    run = framework(dig, server).run
    with Crew(patience=PATIENCE) as crew:
        crew.start(lambda: results.append(run()))
        until(
            lambda: gauge.inside == 2 and gov.stats().tools_waiting == 2,
            "two tools, two in line",
            patience=PATIENCE,
        )
        gate.set()

    assert len(results) == 1
    assert (gauge.peak, gauge.entries) == (2, 4)
    assert is_idle(gov)


def test_a_tool_of_fastmcp_is_a_task() -> None:
    pytest.importorskip("crewai")  # in whose environment MCP's version is the one that has it
    from mcp.server.fastmcp import FastMCP
    from mcp.shared.memory import create_connected_server_and_client_session

    gov = ConcurrencyGovernor(max_streams=1, max_tools=2, max_global=3)
    gauge, gate, tools = Gauge(), threading.Event(), FastMCP("tools")

    @tools.tool()
    async def dig(depth: int) -> str:
        """Dig a hole."""
        async with permit(gov, "tool"):
            with gauge:
                while not gate.is_set():
                    await asyncio.sleep(0.001)
        return f"{depth} deep"

    async def main() -> list[str]:
        async with create_connected_server_and_client_session(tools._mcp_server) as client:
            calls = [client.call_tool("dig", {"depth": depth}) for depth in DEPTHS]
            return [result.content[0].text for result in await asyncio.gather(*calls)]

    said: list[str] = []
    with Crew(patience=PATIENCE) as crew:
        crew.start(lambda: said.extend(asyncio.run(main())))
        until(lambda: gauge.inside == 2 and gov.stats().tools_waiting == 2, "two tools, two in line")
        gate.set()
    assert said == [f"{depth} deep" for depth in DEPTHS]
    assert (gauge.peak, gauge.entries) == (2, 4)
    assert is_idle(gov)
