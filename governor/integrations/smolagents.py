"""Agents of smolagents, governed in one line: their models, their tools, the agents they manage."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

try:
    import smolagents
except ImportError as error:
    raise ImportError(
        "governor.integrations.smolagents needs smolagents: pip install 'concurrency-governor[smolagents]'"
    ) from error

from governor._calls import governed_stream, governed_tool
from governor._governor import Governor
from governor._validate import check_timeout

__all__ = ["govern"]

Agent = TypeVar("Agent")

_smolagents: Any = smolagents  # which has no types


def govern(agent: Agent, governor: Governor, *, acquire_timeout: float | None = None) -> Agent:
    """Let each call of an agent's model take a stream permit, and each of its tools a tool permit.

    It holds in whatever threads the agent runs its tools. An agent that this one manages is governed
    too, and so are its model and tools, but to call it takes no permit: it waits for others.

    What is governed are the model and the tools themselves, so other agents that share them are
    governed with them. A tool that is added to the agent later is not: govern the agent again.

    Args:
        agent: The agent, which is changed in place.
        governor: Whose permits to take.
        acquire_timeout: Seconds that a call waits for its permit; None waits for ever. After that
            it fails with ``AcquireTimeout``, of which smolagents tells the model, if it was a tool.

    Returns:
        The agent.

    Raises:
        ValueError: the agent's model, or one of its tools, is governed by another governor already,
            or the timeout is negative.
        TypeError: the timeout is not a number.
    """
    timeout = check_timeout(acquire_timeout, "acquire_timeout")
    stream = partial(governed_stream, acquire=partial(governor.acquire, "stream", timeout))
    tool = partial(governed_tool, acquire=partial(governor.acquire, "tool", timeout))
    untyped: Any = agent
    for method in "generate", "generate_stream":
        _govern(untyped.model, method, stream, governor)
    for each in untyped.tools.values():
        if not isinstance(each, _smolagents.FinalAnswerTool):  # which does no work
            _govern(each, "forward", tool, governor)
    for managed in untyped.managed_agents.values():
        govern(managed, governor, acquire_timeout=acquire_timeout)
    return agent


def _govern(owner: Any, method: str, decorate: Any, governor: Governor) -> None:
    call = getattr(owner, method, None)
    if call is None:  # a model that cannot stream
        return
    other = getattr(call, "governor", None)
    if other is governor:
        return
    if other is not None:
        raise ValueError(f"{owner!r} is governed by {other!r} already: give this agent one of its own")
    governed = decorate(call)
    governed.governor = governor
    setattr(owner, method, governed)
