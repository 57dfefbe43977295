"""A smolagents agent whose tools run in the framework's own threads, governed at the function."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1")  # before smolagents is imported

from model_server import Gauge, ModelServer, fetch
from rich.console import Console
from smolagents import OpenAIModel, Tool, ToolCallingAgent

import governor

gov = governor.ConcurrencyGovernor(max_streams=2, max_tools=3, max_global=4)
tools_at_work = Gauge()


class FetchPage(Tool):
    """A tool as a class: smolagents warns of a function that has decorators beside its own."""

    name = "fetch_page"
    description = "Fetch a page."
    inputs: ClassVar = {"url": {"type": "string", "description": "Where it is."}}
    output_type = "string"

    @gov.tool
    def forward(self, url: str) -> str:
        """Fetch a page."""
        with tools_at_work:
            return fetch(url)


def ask(model_url: str, task: str) -> str:
    """Run an agent to its answer; it runs up to eight tools at once, in threads of its own."""
    model = OpenAIModel("scripted", api_base=model_url, api_key="none")
    model.client.chat.completions.create = gov.stream(model.client.chat.completions.create)
    agent = ToolCallingAgent([FetchPage()], model, max_tool_threads=8, stream_outputs=True)
    agent.logger.console = Console(quiet=True)
    return agent.run(task)


def research(server: ModelServer, number: int) -> str:
    """Run an agent that fetches four pages at once."""
    pages = [{"url": f"{server.root}/{number}/{page}"} for page in "abcd"]
    return ask(server.url, "\n".join(f"fetch_page {json.dumps(page)}" for page in pages))


def main() -> None:
    """Run four agents at once."""
    with ModelServer() as server, ThreadPoolExecutor(4) as agents:
        answers = list(agents.map(lambda number: research(server, number), range(4)))
    print(answers[0])
    print(f"{len(answers)} agents; the server's counts: {server.stats()}")
    print(f"the tools' own count: {tools_at_work.peak} at most; in use now: {gov.stats().global_in_use}")


if __name__ == "__main__":
    main()
