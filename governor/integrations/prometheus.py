"""Metrics of governors, for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Sequence

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "governor.integrations.prometheus needs prometheus-client: "
        "pip install 'concurrency-governor[prometheus]'"
    ) from error

from governor._events import GovernorEvent
from governor._governor import Governor
from governor.integrations._metrics import by_name

__all__ = ["GovernorCollector"]

_LABELS = ("governor", "kind", "agent")
_OUTCOMES = ("acquired", "timeout", "full", "closed", "deadlock", "cancelled")
_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class GovernorCollector(Collector):
    """Shows governors, and their agents, to Prometheus.

    As in::

        GovernorCollector(gov)
        prometheus_client.start_http_server(9000)

    Gauges, of one snapshot a governor, taken when they are asked for: ``governor_limit``,
    ``governor_in_use`` and ``governor_waiting``. A counter: ``governor_operations_total``, by
    ``outcome`` (``acquired``, ``timeout``, ``full``, ``closed``, ``deadlock`` or ``cancelled``).
    Histograms: ``governor_wait_seconds`` of what was acquired, and ``governor_hold_seconds``.

    The labels are ``governor``, ``kind`` (``stream`` or ``tool``, for limit and in use also
    ``global``) and ``agent``, which is empty for the governor itself. What was counted of an agent
    that is gone is shown once more, and then forgotten. The gauges of a governor itself include what
    its agents hold; its counter and histograms do not.
    """

    def __init__(
        self,
        *governors: Governor,
        registry: CollectorRegistry | None = REGISTRY,
        agents: bool = True,
        buckets: Sequence[float] = _BUCKETS,
    ) -> None:
        """Listen to these governors, and register their metrics.

        Args:
            governors: One or more, of different names. One without a name is ``default``.
            registry: Where to register them; None: nowhere. One for all governors that are shown in
                it, since a metric has one collector.
            agents: Whether each agent has series of its own. False counts what agents do as their
                governor's, and is the choice for those that come and go by the thousand.
            buckets: The upper bounds of the histograms, in seconds.

        Raises:
            ValueError: none, two of the same name, or an agent; or the registry has such metrics already.
        """
        self._governors = by_name(governors)
        self._agents = agents
        self._known: set[tuple[str, str]] = set()
        self._lock = threading.RLock()  # a signal handler may close a governor, and so be told of it
        self._operations = Counter(
            "governor_operations", "Permits asked for, by outcome.", (*_LABELS, "outcome"), registry=None
        )
        self._waits = Histogram(
            "governor_wait_seconds",
            "How long permits were waited for.",
            _LABELS,
            registry=None,
            buckets=buckets,
        )
        self._holds = Histogram(
            "governor_hold_seconds", "How long they were held.", _LABELS, registry=None, buckets=buckets
        )
        if registry is not None:
            registry.register(self)
        self._stops = [governor.subscribe(self._hear) for governor in governors]

    def close(self) -> None:
        """Listen no longer. The registry shows this until it is told to unregister it."""
        for stop in self._stops:
            stop()

    def describe(self) -> list[Metric]:
        """Return the metrics, with nothing in them."""
        counts = (self._operations, self._waits, self._holds)
        return [*self._gauges(), *(metric for it in counts for metric in it.describe())]

    def collect(self) -> list[Metric]:
        """Return the metrics as they are now."""
        limit, in_use, waiting = gauges = self._gauges()
        for name, governor in self._governors.items():
            for agent, kind, used, in_line, maximum in governor._survey():
                if agent is None or self._agents:
                    labels = (name, kind, agent or "")
                    limit.add_metric(labels, maximum)
                    in_use.add_metric(labels, used)
                    if kind != "global":
                        waiting.add_metric(labels, in_line)
        counted = [it for metric in (self._operations, self._waits, self._holds) for it in metric.collect()]
        self._forget_the_gone()
        return [*gauges, *counted]

    def _gauges(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("governor_limit", "How many may hold a permit at once.", labels=_LABELS),
            GaugeMetricFamily("governor_in_use", "How many hold a permit.", labels=_LABELS),
            GaugeMetricFamily("governor_waiting", "How many stand in line for a permit.", labels=_LABELS),
        )

    def _hear(self, event: GovernorEvent) -> None:
        if event.kind is None:
            return
        name, agent = event.governor or "default", (event.agent or "") if self._agents else ""
        labels = (name, event.kind, agent)
        if agent and (name, agent) not in self._known:
            self._meet(name, agent)
        if event.event == "acquired":
            self._operations.labels(*labels, "acquired").inc()
            self._waits.labels(*labels).observe(event.seconds or 0.0)
        elif event.event == "released":
            self._holds.labels(*labels).observe(event.seconds or 0.0)
        elif event.event == "rejected":
            self._operations.labels(*labels, event.reason).inc()

    def _meet(self, name: str, agent: str) -> None:
        with self._lock:
            self._known.add((name, agent))
            size = len(self._known)
        if size % 1000 == 0:  # where nobody asks, nobody forgets
            self._forget_the_gone()

    def _forget_the_gone(self) -> None:
        known = set(self._known)  # before the survey: who comes after it is not gone
        alive = {
            (name, agent)
            for name, governor in self._governors.items()
            for agent, *_ in governor._survey()
            if agent is not None
        }
        gone = known - alive
        with self._lock:
            self._known -= gone
        for name, agent in gone:
            for labels in ((name, "stream", agent), (name, "tool", agent)):
                for outcome in _OUTCOMES:
                    _remove(self._operations, *labels, outcome)
                _remove(self._waits, *labels)
                _remove(self._holds, *labels)


def _remove(metric: Counter | Histogram, *labels: str) -> None:
    try:
        metric.remove(*labels)
    except KeyError:
        pass  # of older versions, where there is no such series
