"""LangChain agents in threads under one governor: their model calls, their tools, their sub-agents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ.update(LANGSMITH_TRACING="false", LANGCHAIN_TRACING_V2="false")  # before LangChain is imported

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain.tools import tool
from langchain_openai import ChatOpenAI
from model_server import Gauge, ModelServer, fetch

import governor

gov = governor.ConcurrencyGovernor(max_streams=2, max_tools=3, max_global=4)
tools_at_work = Gauge()


@wrap_model_call
def under_a_permit(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    """Hold a stream permit for as long as the model answers."""
    with gov.acquire_stream():
        return handler(request)


@tool
@gov.tool
def fetch_page(url: str) -> str:
    """Fetch a page."""
    with tools_at_work:
        return fetch(url)


def ask(model_url: str, task: str) -> str:
    """Run an agent to its answer."""

    @tool
    @gov.tool
    def delegate(task: str) -> str:
        """Give a task to a sub-agent."""
        with tools_at_work:
            task = task.strip()  # what the tool does itself
        with governor.suspended():  # the sub-agent's tools may have this one's place
            return ask(model_url, task)

    model = ChatOpenAI(model="scripted", base_url=model_url, api_key="none", streaming=True)
    agent = create_agent(model, [fetch_page, delegate], middleware=[under_a_permit])
    return agent.invoke({"messages": [("user", task)]})["messages"][-1].text


def research(server: ModelServer, number: int) -> str:
    """Run an agent that fetches two pages, while a sub-agent of its fetches two more."""
    pages = [call("fetch_page", url=f"{server.root}/{number}/{page}") for page in "abcd"]
    return ask(server.url, "\n".join([call("delegate", task="\n".join(pages[2:])), *pages[:2]]))


def call(tool_name: str, **arguments: str) -> str:
    """Return the line of a prompt that makes the scripted model call a tool."""
    return f"{tool_name} {json.dumps(arguments)}"


def main() -> None:
    """Run six agents at once."""
    with ModelServer() as server, ThreadPoolExecutor(6) as agents:
        answers = list(agents.map(lambda number: research(server, number), range(6)))
    print(answers[0])
    print(f"{len(answers)} agents, and as many sub-agents; the server's counts: {server.stats()}")
    print(f"the tools' own count: {tools_at_work.peak} at most; in use now: {gov.stats().global_in_use}")


if __name__ == "__main__":
    main()
