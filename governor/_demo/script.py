"""What the model says: a plan of turns, fixed by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Script", "ToolCall", "Turn"]

_VOCABULARY = (
    "first", "let", "us", "look", "at", "how", "the", "module", "does", "this", "before", "we",
    "change", "anything", "then", "compare", "both", "and", "check", "that", "it", "holds",
)  # fmt: skip


@dataclass(frozen=True)
class ToolCall:
    """One tool that the model asks for, with its one argument."""

    tool: str
    argument: str


@dataclass(frozen=True)
class Turn:
    """One answer of the model: some words, then the tools that it asks for."""

    words: tuple[str, ...]
    calls: tuple[ToolCall, ...]


class Script:
    """Writes every turn of every agent; the same seed writes the same ones.

    Args:
        seed: Fixes all that the script writes.
        bursts: The sizes to choose from for a turn's burst of tool calls.
        arguments: For each tool, by name, the arguments to choose from.
    """

    def __init__(self, seed: int, bursts: range, arguments: dict[str, Sequence[str]]) -> None:
        self._seed = seed
        self._bursts = bursts
        self._arguments = arguments

    def turn(self, agent: str, number: int) -> Turn:
        """Write the turn of this number for an agent, in whatever order they are asked for."""
        chance = random.Random(f"{self._seed}/{agent}/{number}")
        words = chance.choices(_VOCABULARY, k=chance.randint(15, 25))
        tools = chance.choices(list(self._arguments), k=chance.choice(self._bursts))
        calls = [ToolCall(tool, chance.choice(self._arguments[tool])) for tool in tools]
        return Turn(tuple(words), tuple(calls))
