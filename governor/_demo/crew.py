"""The agents: each reads a stream, runs the burst of tools it asked for, and begins again."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import count
from threading import Barrier, Event, Lock
from time import monotonic
from typing import Self

from governor import SemaphoreClosed
from governor._demo.regime import Kind, Regime
from governor._demo.script import ToolCall
from governor._demo.server import ModelServer
from governor._demo.toolbox import Toolbox

__all__ = ["Crew", "Tally"]

# Seconds; a stream is a matter of tenths, but a machine may be very busy.
_PATIENCE = 60


class Tally:
    """What the agents got done, and how long they were held back."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.operations = 0
        self.longest_wait = 0.0

    def done(self) -> None:
        """Count an operation that came to its end."""
        with self._lock:
            self.operations += 1

    def waited(self, seconds: float) -> None:
        """Note a wait for admission, if it is the longest."""
        with self._lock:
            self.longest_wait = max(self.longest_wait, seconds)


class Crew:
    """Agents at work in threads for as long as the `with` block runs.

    Args:
        names: The agents' names.
        burst: The most tool calls that a turn asks for.
        regime: What lets their operations in.
        server: The model that they listen to.
        toolbox: The tools that they run.
    """

    def __init__(
        self,
        names: Sequence[str],
        burst: int,
        regime: Regime,
        server: ModelServer,
        toolbox: Toolbox,
    ) -> None:
        self.tally = Tally()
        self._names = names
        self._regime = regime
        self._server = server
        self._toolbox = toolbox
        self._ending = Event()
        self._agents = ThreadPoolExecutor(len(names), thread_name_prefix="agent")
        # Room for every call of every agent: nothing but the regime holds one back.
        self._room = len(names) * burst
        self._bursts = ThreadPoolExecutor(self._room, thread_name_prefix="tool")
        self._lives: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._start_threads()
        self._lives = [self._agents.submit(self._live, name) for name in self._names]
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End all that is under way, as soon as it can end in good order."""
        # Nobody is let in any more before the first is sent out.
        self._ending.set()
        self._regime.close()
        self._server.end_streams()
        self._toolbox.end_tools()
        self._agents.shutdown()
        self._bursts.shutdown()

    @property
    def broken(self) -> bool:
        """Whether an agent has failed, while the others still work."""
        return any(life.done() and life.exception() for life in self._lives)

    def check(self) -> None:
        """Raise what an agent failed of, if one did. The crew's work must be over."""
        for life in self._lives:
            life.result()

    def _start_threads(self) -> None:
        """Start all threads for tools, which the pool does one by one, as it runs short of them.

        A burst would then wait for its threads, in a process that is busy already.
        """
        gate = Barrier(self._room + 1)
        try:
            for _ in range(self._room):
                self._bursts.submit(gate.wait)
            gate.wait()
        except BaseException:
            gate.abort()
            raise

    def _live(self, agent: str) -> None:
        """Take one turn after the other until the end."""
        for turn in count():
            if self._ending.is_set():
                return
            self._turn(agent, turn)

    def _turn(self, agent: str, number: int) -> None:
        """Read what the model has to say, then run its tools, all at once."""
        calls: list[ToolCall] = []
        self._operate(agent, "stream", lambda: calls.extend(self._listen(agent, number)))
        burst = [self._bursts.submit(self._use_tool, agent, call) for call in calls]
        wait(burst)
        for call in burst:
            call.result()

    def _use_tool(self, agent: str, call: ToolCall) -> None:
        """Run one tool."""
        self._operate(agent, "tool", lambda: self._toolbox.run(agent, call))

    def _operate(self, agent: str, kind: Kind, work: Callable[[], object]) -> None:
        """Wait to be let in, work, and put it on the books; begin nothing once all is to end."""
        asked = monotonic()
        try:
            with self._regime.acquire(agent, kind) as permit:
                self.tally.waited(permit.waited)
                if self._ending.is_set():
                    return
                work()
        except SemaphoreClosed:
            # Its wait was in vain, but a wait: one that starves should show.
            self.tally.waited(monotonic() - asked)
            return
        if not self._ending.is_set():
            self.tally.done()

    def _listen(self, agent: str, turn: int) -> list[ToolCall]:
        """Read one stream to its end; return the tool calls in it."""
        question = json.dumps({"agent": agent, "turn": turn})
        with closing(http.client.HTTPConnection(*self._server.address, timeout=_PATIENCE)) as model:
            model.request("POST", "/", question)
            tokens = [json.loads(line) for line in model.getresponse()]
        return [ToolCall(token["tool"], token["argument"]) for token in tokens if "tool" in token]
