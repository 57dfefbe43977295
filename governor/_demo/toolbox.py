"""The tools: real work on real files, which counts itself."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from threading import Event
from typing import Any

from governor._demo.gauge import Gauges
from governor._demo.script import ToolCall
from governor._demo.workshop import Workshop

__all__ = ["Toolbox"]

# How many files one call hashes or searches: some hundredths of a second of work.
_FILES = 60

_WORDS = ("close", "error", "file", "handle", "lock", "open", "parse", "read", "thread", "write")

_PARSE = "import ast, sys; print(len(ast.parse(open(sys.argv[1], 'rb').read()).body))"

# A process group of its own: Ctrl-C in the terminal is for the demo, not for its tools.
_OWN_GROUP: dict[str, Any] = (
    {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    if os.name == "nt"
    else {"process_group": 0}
)


class Toolbox:
    """Runs tools by name, and counts those that run.

    Args:
        workshop: What the tools work on.
        gauges: Where they are counted, in all and for each agent.
    """

    def __init__(self, workshop: Workshop, gauges: Gauges) -> None:
        self._modules = workshop.modules
        self._gauges = gauges
        self._ending = Event()
        self._tools: dict[str, Callable[[str], str]] = {
            "hash": self._hash,
            "search": self._search,
            "parse": self._parse,
        }
        if workshop.database is not None:
            self._tools["query"] = workshop.database.query

    @property
    def arguments(self) -> dict[str, Sequence[str]]:
        """The tools by name, each with the arguments that it understands."""
        files = {"hash", "parse"}
        return {name: list(self._modules) if name in files else _WORDS for name in self._tools}

    def run(self, agent: str, call: ToolCall) -> str:
        """Do what an agent's model asked for and return what came of it."""
        with self._gauges.total, self._gauges.tools, self._gauges.agents[agent]:
            return self._tools[call.tool](call.argument)

    def end_tools(self) -> None:
        """Let the tools that run stop at the next file."""
        self._ending.set()

    def _hash(self, first: str) -> str:
        """Hash files, from the one of this name on."""
        digest = hashlib.sha256()
        for file in self._files(first):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def _search(self, word: str) -> str:
        """Find the functions that have this word in their names."""
        pattern = re.compile(rf"^\s*def (\w*{word}\w*)", re.MULTILINE)
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in self._files())
        return " ".join(chain.from_iterable(map(pattern.findall, texts)))

    def _parse(self, name: str) -> str:
        """Count the statements of a file, in a process of its own."""
        output: str = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PARSE, str(self._modules[name])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=True,
            **_OWN_GROUP,
        ).stdout
        return output.strip()

    def _files(self, first: str = "") -> Iterator[Path]:
        """Yield files from the one named `first` on, round to the beginning, till all is to end."""
        names = list(self._modules)
        start = names.index(first) if first else 0
        for name in islice(names[start:] + names[:start], _FILES):
            if self._ending.is_set():
                return
            yield self._modules[name]
