"""LangChain's agents and LangGraph's tool nodes under the middleware: counted by the tools themselves."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from model_server import ModelServer
from serving import Gates
from threads import Crew, Gauge, is_idle, until

import governor
from governor import AcquireTimeout, ConcurrencyGovernor

os.environ.update(LANGSMITH_TRACING="false", LANGCHAIN_TRACING_V2="false")  # before LangChain is imported
pytest.importorskip("langchain")

from langchain.agents import create_agent
from langchain.tools import BaseTool, tool
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.prebuilt.tool_node import ToolCallRequest

from governor.integrations.langchain import GovernorMiddleware

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what a framework does is its own affair
]

PATIENCE = 25.0  # a framework's first steps are slow


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=2, max_tools=3, max_global=4)


class Work:
    """What the tools of these tests do: count themselves, and wait until the test lets them go."""

    def __init__(self) -> None:
        self.gauge, self.gate = Gauge(), threading.Event()

    def __call__(self) -> None:
        with self.gauge:
            assert self.gate.wait(PATIENCE)

    async def in_a_task(self) -> None:
        with self.gauge:
            while not self.gate.is_set():
                await asyncio.sleep(0.001)


@pytest.fixture
def work() -> Work:
    return Work()


def dig(work: Work) -> BaseTool:
    """A tool as anybody might have made it, knowing nothing of a governor."""

    @tool
    def dig(depth: int) -> str:
        """Dig a hole."""
        work()
        return f"{depth} deep"

    return dig


def climb(work: Work) -> BaseTool:
    @tool
    async def climb(height: int) -> str:
        """Climb a hill."""
        await work.in_a_task()
        return f"{height} high"

    return climb


def model(server: ModelServer) -> ChatOpenAI:
    # Models share a client, and these tests share it among event loops, between which no connection
    # may be handed on.
    headers = {"Connection": "close"}
    return ChatOpenAI(
        model="scripted",
        base_url=server.url,
        api_key="none",
        streaming=True,
        max_retries=0,
        default_headers=headers,
    )


def calls(name: str, **arguments: Any) -> str:
    """The line of a prompt that makes the scripted model call a tool."""
    return f"{name} {json.dumps(arguments)}"


def prompt(*lines: str) -> dict[str, Any]:
    return {"messages": [("user", "\n".join(lines))]}


def answers_of(results: list[Any]) -> list[str]:
    return [result["messages"][-1].text for result in results]


# ------------------------------------------------------------------------------------------- limits


def fill_every_limit(gov: ConcurrencyGovernor, server: ModelServer, gates: Gates, work: Work) -> None:
    """Await each limit's being full with more in line, then let all go."""
    until(
        lambda: server.streams.now == 2 and gov.stats().streams_waiting == 2,
        "two answers, and two agents in line for theirs",
        patience=PATIENCE,
    )
    gates.open()
    until(
        lambda: work.gauge.inside == 3 and gov.stats().tools_waiting == 9,
        "three tools, and all others in line",
        patience=PATIENCE,
    )
    work.gate.set()


def check(gov: ConcurrencyGovernor, server: ModelServer, work: Work, answers: list[str]) -> None:
    assert [answer[:5] for answer in answers] == ["Done:"] * 4
    assert (work.gauge.peak, work.gauge.entries, server.streams.peak) == (3, 12, 2)
    assert is_idle(gov)


def test_concurrent_invokes_with_parallel_tools_fill_the_limits_and_pass_none(
    gov: ConcurrencyGovernor, server: ModelServer, gates: Gates, work: Work
) -> None:
    agent = create_agent(model(server), [dig(work)], middleware=[GovernorMiddleware(gov)])
    results: list[Any] = []

    with Crew(patience=PATIENCE) as crew:
        for _ in range(4):
            asked = prompt(*(calls("dig", depth=depth) for depth in range(3)))
            crew.start(lambda asked=asked: results.append(agent.invoke(asked)))
        fill_every_limit(gov, server, gates, work)

    check(gov, server, work, answers_of(results))


def test_concurrent_tasks_with_parallel_tools_fill_the_limits_and_pass_none(
    gov: ConcurrencyGovernor, server: ModelServer, gates: Gates, work: Work
) -> None:
    agent = create_agent(model(server), [dig(work), climb(work)], middleware=[GovernorMiddleware(gov)])
    results: list[Any] = []

    async def main() -> None:
        asked = prompt(calls("dig", depth=1), calls("climb", height=1), calls("climb", height=2))
        results.extend(await asyncio.gather(*(agent.ainvoke(asked) for _ in range(4))))

    with Crew(patience=PATIENCE) as crew:
        crew.start(lambda: asyncio.run(main()))
        fill_every_limit(gov, server, gates, work)

    check(gov, server, work, answers_of(results))


def test_threads_and_tasks_share_the_limits(
    gov: ConcurrencyGovernor, server: ModelServer, gates: Gates, work: Work
) -> None:
    agent = create_agent(model(server), [dig(work)], middleware=[GovernorMiddleware(gov)])
    asked = prompt(*(calls("dig", depth=depth) for depth in range(3)))
    results: list[Any] = []

    async def main() -> None:
        results.extend(await asyncio.gather(*(agent.ainvoke(asked) for _ in range(2))))

    with Crew(patience=PATIENCE) as crew:
        crew.start(lambda: asyncio.run(main()))
        for _ in range(2):
            crew.start(lambda: results.append(agent.invoke(asked)))
        fill_every_limit(gov, server, gates, work)

    check(gov, server, work, answers_of(results))


def tool_node(mw: GovernorMiddleware, *tools: BaseTool) -> Any:
    graph = StateGraph(MessagesState)
    node = ToolNode(tools, wrap_tool_call=mw.wrap_tool_call, awrap_tool_call=mw.awrap_tool_call)
    graph.add_node("tools", node)
    graph.set_entry_point("tools")
    return graph.compile()


def turn(name: str, count: int) -> dict[str, Any]:
    """A model's message that asks for so many calls."""
    asked = [{"name": name, "args": {"depth": n}, "id": f"call-{n}"} for n in range(count)]
    return {"messages": [AIMessage("", tool_calls=asked)]}


@pytest.mark.parametrize("in_tasks", [False, True], ids=["in threads", "in tasks"])
def test_a_tool_node_of_langgraph_keeps_the_limit(
    in_tasks: bool, gov: ConcurrencyGovernor, work: Work
) -> None:
    graph, results = tool_node(GovernorMiddleware(gov), dig(work)), []

    def run() -> None:
        asked = turn("dig", 5)
        results.append(asyncio.run(graph.ainvoke(asked)) if in_tasks else graph.invoke(asked))

    with Crew(patience=PATIENCE) as crew:
        crew.start(run)
        until(lambda: work.gauge.inside == 3 and gov.stats().tools_waiting == 2, "three tools, two in line")
        work.gate.set()

    assert [message.text for message in results[0]["messages"][1:]] == [f"{n} deep" for n in range(5)]
    assert (work.gauge.peak, work.gauge.entries) == (3, 5)
    assert is_idle(gov)


# -------------------------------------------------------------------------------------- no permit


def invoke(graph: Any, asked: dict[str, Any]) -> Any:
    return graph.invoke(asked)


def ainvoke(graph: Any, asked: dict[str, Any]) -> Any:
    return asyncio.run(graph.ainvoke(asked))


both = pytest.mark.parametrize("run", [invoke, ainvoke])


@both
def test_a_call_that_gets_no_permit_in_time_ends_the_run(
    run: Callable[..., Any], gov: ConcurrencyGovernor, server: ModelServer, gates: Gates, work: Work
) -> None:
    mw = GovernorMiddleware(gov, acquire_timeout=0.01)
    gates.open()
    agent = create_agent(model(server), [dig(work)], middleware=[mw])

    with (
        gov.acquire_stream(),
        gov.acquire_stream(),
        pytest.raises(
            AcquireTimeout, match=r"no stream permit within 0\.01 s: streams 2/2 in use, global 2/4"
        ),
    ):
        run(agent, prompt("hello"))
    with (
        gov.acquire_tool(),
        gov.acquire_tool(),
        gov.acquire_tool(),
        pytest.raises(AcquireTimeout, match=r"no tool permit within 0\.01 s: tools 3/3 in use, global 3/4"),
    ):
        run(agent, prompt(calls("dig", depth=1)))

    assert (server.streams.peak, work.gauge.entries) == (1, 0)
    assert is_idle(gov)


@both
def test_a_permit_that_is_there_needs_no_wait(run: Callable[..., Any], work: Work) -> None:
    gov = ConcurrencyGovernor(1, 1, 1)
    work.gate.set()
    graph = tool_node(GovernorMiddleware(gov, acquire_timeout=0), dig(work))

    assert run(graph, turn("dig", 1))["messages"][-1].text == "0 deep"
    assert is_idle(gov)


@both
def test_a_tool_that_fails_gives_its_permit_back(run: Callable[..., Any], gov: ConcurrencyGovernor) -> None:
    @tool
    def stumble(depth: int) -> str:
        """Fall."""
        raise TimeoutError("the tool's own")

    graph = tool_node(GovernorMiddleware(gov), stumble)
    with pytest.raises(TimeoutError, match="the tool's own") as caught:
        run(graph, turn("stumble", 1))
    assert not isinstance(caught.value, AcquireTimeout)
    assert is_idle(gov)


def test_a_run_that_is_cancelled_leaves_the_line(gov: ConcurrencyGovernor, work: Work) -> None:
    graph = tool_node(GovernorMiddleware(gov), climb(work))
    asked = {"messages": [AIMessage("", tool_calls=[{"name": "climb", "args": {"height": 1}, "id": "1"}])]}

    async def main() -> None:
        with gov.acquire_tool(), gov.acquire_tool():
            runs = [asyncio.create_task(graph.ainvoke(asked)) for _ in range(2)]
            while not (work.gauge.inside and gov.stats().tools_waiting):
                await asyncio.sleep(0.001)
            for run in runs:
                run.cancel()
            await asyncio.wait(runs)
            assert all(run.cancelled() for run in runs)

    asyncio.run(main())
    assert work.gauge.inside == 0
    assert is_idle(gov)


def test_a_permit_that_comes_just_as_its_run_is_cancelled_goes_back(gov: ConcurrencyGovernor) -> None:
    mw = GovernorMiddleware(gov)
    asked = ToolCallRequest({"name": "climb", "args": {}, "id": "1"}, tool=None, state={}, runtime=None)

    async def never(request: ToolCallRequest) -> Any:
        raise AssertionError("it was cancelled before")

    async def main() -> None:
        held = [gov.acquire_tool() for _ in range(3)]
        run = asyncio.create_task(mw.awrap_tool_call(asked, never))
        while not gov.stats().tools_waiting:
            await asyncio.sleep(0)
        held.pop().release()  # the permit is on its way
        run.cancel()
        await asyncio.wait([run])
        assert run.cancelled()
        assert gov.stats().tools_in_use == 2
        for permit in held:
            permit.release()

    asyncio.run(main())
    assert is_idle(gov)


# ----------------------------------------------------------------------------------------- nesting


def test_a_tool_in_a_thread_lends_its_place_to_a_sub_agent(server: ModelServer, gates: Gates) -> None:
    gov, work = ConcurrencyGovernor(1, 1, 1), Work()  # one place for all
    mw = GovernorMiddleware(gov)
    gates.open()
    work.gate.set()
    digger = create_agent(model(server), [dig(work)], middleware=[mw])

    @tool
    def delegate(task: str) -> str:
        """Give a task to a sub-agent."""
        assert gov.stats().tools_in_use == 1
        with governor.suspended():
            return digger.invoke(prompt(task))["messages"][-1].text

    agent = create_agent(model(server), [delegate], middleware=[mw])
    result = agent.invoke(prompt(calls("delegate", task=calls("dig", depth=7))))

    assert result["messages"][-1].text == "Done: Done: 7 deep"
    assert is_idle(gov)


@both
def test_an_exempt_tool_takes_no_permit(run: Callable[..., Any], server: ModelServer, gates: Gates) -> None:
    gov, work = ConcurrencyGovernor(1, 1, 1), Work()
    gates.open()
    work.gate.set()
    mw = GovernorMiddleware(gov, exempt=["delegate"])
    digger = create_agent(model(server), [dig(work)], middleware=[mw])

    @tool
    def delegate(task: str) -> str:
        """Give a task to a sub-agent."""
        assert is_idle(gov)
        return run(digger, prompt(task))["messages"][-1].text

    agent = create_agent(model(server), [delegate], middleware=[mw])
    result = run(agent, prompt(calls("delegate", task=calls("dig", depth=7))))

    assert result["messages"][-1].text == "Done: Done: 7 deep"
    assert work.gauge.entries == 1
    assert is_idle(gov)


# ---------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_told_when_it_is_made(gov: ConcurrencyGovernor) -> None:
    with pytest.raises(TypeError, match=r"exempt must hold names of tools: \['delegate'\]"):
        GovernorMiddleware(gov, exempt="delegate")
    with pytest.raises(ValueError, match="acquire_timeout must be a number of seconds >= 0"):
        GovernorMiddleware(gov, acquire_timeout=-1)
