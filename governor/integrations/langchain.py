"""A middleware for LangChain's agents: model calls and tool calls run under permits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container
from contextlib import nullcontext
from typing import Any

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
    from langchain_core.messages import ToolMessage
    from langgraph.prebuilt.tool_node import ToolCallRequest
    from langgraph.types import Command
except ImportError as error:
    raise ImportError(
        "governor.integrations.langchain needs langchain: pip install 'concurrency-governor[langchain]'"
    ) from error

from governor._governor import Governor
from governor._validate import check_timeout
from governor.integrations.asyncio import permit

__all__ = ["GovernorMiddleware"]


class GovernorMiddleware(AgentMiddleware[Any, Any, Any]):
    """Holds a stream permit around each model call of an agent, and a tool permit around each tool.

    One line governs them all, tools of others included::

        agent = create_agent(model, tools, middleware=[GovernorMiddleware(gov)])

    Put it last: the last of the list is the innermost, so that no permit is kept while a middleware
    that retries waits for its next try. One may serve any number of agents, in threads and in tasks.

    For a ``ToolNode`` of LangGraph, hand on its methods::

        ToolNode(tools, wrap_tool_call=mw.wrap_tool_call, awrap_tool_call=mw.awrap_tool_call)

    In a thread, a tool that waits for a sub-agent may lend its place: ``governor.suspended()``.
    In a task there is no such thing: name it in ``exempt``.
    """

    def __init__(
        self,
        governor: Governor,
        *,
        acquire_timeout: float | None = None,
        exempt: Container[str] = (),
    ) -> None:
        """Govern the agents that have this middleware.

        Args:
            governor: Whose permits the calls take.
            acquire_timeout: Seconds that a call waits for its permit; None waits for ever. After
                that ``AcquireTimeout`` ends the agent's run.
            exempt: The names of tools that take no permit, as they only wait for other agents.

        Raises:
            TypeError: the timeout is not a number, or ``exempt`` is a string.
            ValueError: the timeout is negative.
        """
        super().__init__()
        if isinstance(exempt, str):
            raise TypeError(f"exempt must hold names of tools: [{exempt!r}], not {exempt!r}")
        self._governor = governor
        self._timeout = check_timeout(acquire_timeout, "acquire_timeout")
        self._exempt = exempt

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model under a stream permit."""
        with self._governor.acquire("stream", self._timeout):
            return handler(request)

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Call the model under a stream permit, without blocking the event loop."""
        async with permit(self._governor, "stream", self._timeout):
            return await handler(request)

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Call a tool under a tool permit."""
        if request.tool_call["name"] in self._exempt:
            return handler(request)
        with self._governor.acquire("tool", self._timeout):
            return handler(request)

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        """Call a tool under a tool permit, without blocking the event loop."""
        exempt = request.tool_call["name"] in self._exempt
        async with nullcontext() if exempt else permit(self._governor, "tool", self._timeout):
            return await handler(request)
