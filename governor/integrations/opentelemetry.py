"""Metrics of governors, and waits on spans, for OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

try:
    from opentelemetry import trace
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter_provider
except ImportError as error:
    raise ImportError(
        "governor.integrations.opentelemetry needs opentelemetry-api: "
        "pip install 'concurrency-governor[opentelemetry]'"
    ) from error

from governor._events import GovernorEvent
from governor._governor import Governor
from governor.integrations._metrics import by_name

__all__ = ["GovernorInstrumentation"]


class GovernorInstrumentation:
    """Shows governors, and their agents, to OpenTelemetry: ``GovernorInstrumentation(gov)``.

    The metrics have the shape of the semantic conventions for pools of database connections,
    ``db.client.connection.*``:

    - ``governor.permit.max``, and ``governor.permit.count`` by ``state`` (``used`` or ``idle``),
    - ``governor.permit.pending_requests``: how many stand in line,
    - ``governor.permit.timeouts``, and ``governor.permit.rejections`` by ``reason`` (``full``,
      ``closed``, ``deadlock`` or ``cancelled``),
    - ``governor.permit.wait_time`` and ``governor.permit.use_time``, in seconds.

    The attributes are ``governor.name``, ``governor.kind`` (``stream`` or ``tool``; for max and count
    also ``global``) and, for an agent, ``governor.agent``. The span that is current where a permit is
    acquired gets the attribute ``governor.stream.wait_time`` or ``governor.tool.wait_time``.
    """

    def __init__(
        self,
        *governors: Governor,
        meter_provider: MeterProvider | None = None,
        agents: bool = False,
    ) -> None:
        """Listen to these governors, and make their instruments.

        Args:
            governors: One or more, of different names. One without a name is ``default``.
            meter_provider: Whose meter to use; None: the global one's. One for all governors that are
                shown by it, since an instrument is made once.
            agents: Whether each agent has series of its own. False counts what agents do as their
                governor's. The SDK never forgets an attribute, so do not choose True for agents that
                come and go by the thousand.

        Raises:
            ValueError: none, two of the same name, or an agent.
        """
        self._governors = by_name(governors)
        self._agents = agents
        meter = (meter_provider or get_meter_provider()).get_meter("governor")
        gauge, name = meter.create_observable_up_down_counter, "governor.permit"
        gauge(f"{name}.max", [self._max], "{permit}", "How many may hold a permit at once.")
        gauge(f"{name}.count", [self._count], "{permit}", "How many permits are used, or idle.")
        gauge(f"{name}.pending_requests", [self._pending], "{request}", "How many stand in line.")
        self._timeouts = meter.create_counter(f"{name}.timeouts", "{timeout}", "Waits that timed out.")
        self._rejections = meter.create_counter(f"{name}.rejections", "{rejection}", "Other refusals.")
        self._waits = meter.create_histogram(f"{name}.wait_time", "s", "How long permits were waited for.")
        self._uses = meter.create_histogram(f"{name}.use_time", "s", "How long permits were held.")
        self._stops = [governor.subscribe(self._hear) for governor in governors]

    def close(self) -> None:
        """Listen no longer, and show nothing more."""
        for stop in self._stops:
            stop()
        self._governors.clear()

    def _survey(self) -> Iterator[tuple[dict[str, str], int, int, int]]:
        for name, governor in list(self._governors.items()):
            for agent, kind, used, waiting, limit in governor._survey():
                if agent is None or self._agents:
                    yield self._attributes(name, kind, agent), used, waiting, limit

    def _attributes(self, name: str, kind: str, agent: str | None) -> dict[str, str]:
        attributes = {"governor.name": name, "governor.kind": kind}
        if agent is not None and self._agents:
            attributes["governor.agent"] = agent
        return attributes

    def _max(self, _: CallbackOptions) -> Iterable[Observation]:
        return [Observation(limit, attributes) for attributes, _used, _waiting, limit in self._survey()]

    def _count(self, _: CallbackOptions) -> Iterable[Observation]:
        for attributes, used, _waiting, limit in self._survey():
            yield Observation(used, attributes | {"state": "used"})
            yield Observation(max(0, limit - used), attributes | {"state": "idle"})

    def _pending(self, _: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(waiting, attributes)
            for attributes, _used, waiting, _limit in self._survey()
            if attributes["governor.kind"] != "global"
        ]

    def _hear(self, event: GovernorEvent) -> None:
        if event.kind is None:
            return
        attributes = self._attributes(event.governor or "default", event.kind, event.agent)
        if event.event == "acquired":
            seconds = event.seconds or 0.0
            self._waits.record(seconds, attributes)
            trace.get_current_span().set_attribute(f"governor.{event.kind}.wait_time", seconds)
        elif event.event == "released":
            self._uses.record(event.seconds or 0.0, attributes)
        elif event.reason == "timeout":
            self._timeouts.add(1, attributes)
        elif event.event == "rejected":
            self._rejections.add(1, attributes | {"reason": event.reason or ""})
