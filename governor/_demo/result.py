"""What came of the two runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from governor._demo.crew import Tally
from governor._demo.gauge import Gauges
from governor._demo.settings import Settings

__all__ = ["Outcome", "Peak", "Result"]


@dataclass(frozen=True)
class Peak:
    """The most that ran at once, beside the limit, which the ungoverned run knows nothing of."""

    limit: int
    peak: int

    @property
    def over(self) -> bool:
        """Whether the limit was passed."""
        return self.peak > self.limit


@dataclass(frozen=True)
class Outcome:
    """What one run did.

    Attributes:
        streams: The peak of streams open at once, as the server counted.
        tools: The peak of tools running at once, as the tools counted.
        total: The peak of both together.
        one_agent: The peak of tools of the agent that ran the most of them at once.
        operations: Streams and tool calls that were done within the time.
        longest_wait: Seconds that an operation waited to be let in, at most.
    """

    streams: Peak
    tools: Peak
    total: Peak
    one_agent: Peak
    operations: int
    longest_wait: float

    @classmethod
    def of(cls, settings: Settings, gauges: Gauges, tally: Tally) -> Outcome:
        """Read the counters of a run that is over."""
        busiest = max(gauge.peak for gauge in gauges.agents.values())
        return cls(
            streams=Peak(settings.streams, gauges.streams.peak),
            tools=Peak(settings.tools, gauges.tools.peak),
            total=Peak(settings.total, gauges.total.peak),
            one_agent=Peak(settings.tools_per_agent, busiest),
            operations=tally.operations,
            longest_wait=tally.longest_wait,
        )

    @property
    def peaks(self) -> dict[str, Peak]:
        """The peaks, by the names that people read."""
        return {
            "streams": self.streams,
            "tools": self.tools,
            "global": self.total,
            "one agent's tools": self.one_agent,
        }

    def as_dict(self) -> dict[str, object]:
        """Return what ``--json`` promises of one run."""
        return {
            "streams": asdict(self.streams),
            "tools": asdict(self.tools),
            "global": asdict(self.total),
            "operations": self.operations,
            "longest_wait_seconds": round(self.longest_wait, 3),
        }


@dataclass(frozen=True)
class Result:
    """What both runs did.

    Attributes:
        governed: The run under the governor.
        ungoverned: The same plan for the same time without it; None if Ctrl-C came first.
        interrupted: Whether Ctrl-C cut the demo short.
    """

    governed: Outcome
    ungoverned: Outcome | None
    interrupted: bool = False

    @property
    def kept(self) -> bool:
        """Whether the governor kept every limit. Anything else is a bug of the library."""
        return not any(peak.over for peak in self.governed.peaks.values())
