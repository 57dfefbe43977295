"""Metrics as an operator sees them: a real page for Prometheus, OpenTelemetry's own reader."""

from __future__ import annotations

import gc
import random
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from threads import Crew, is_idle, until

from governor import AcquireTimeout, ConcurrencyGovernor, GovernedExecutor

pytestmark = pytest.mark.every_governor


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=2, max_tools=3, max_global=4, max_queued=5, name="api")


Outcomes = Counter[tuple[str, str, str]]


def use(gov: ConcurrencyGovernor, agent: str, turns: int, seed: int, counted: Outcomes) -> None:
    """Ask for permits in several ways, and count how that ended by agent, kind and outcome."""
    chance = random.Random(seed)
    for _ in range(turns):
        kind: Any = chance.choice(["stream", "tool"])
        if chance.randrange(3) == 0:
            permit = gov.try_acquire(kind)
            outcome = "timeout" if permit is None else "acquired"
        elif chance.randrange(3) == 0:
            request = gov.request(kind)
            cancelled = request.cancel()
            error = None if cancelled else request.exception()
            outcome = "cancelled" if cancelled else "full" if error else "acquired"
            permit = None if cancelled or error else request.result()
        else:
            try:
                permit, outcome = gov.acquire(kind, chance.choice([0.0005, 20])), "acquired"
            except AcquireTimeout:
                permit, outcome = None, "timeout"
            except Exception:
                permit, outcome = None, "full"
        counted[agent, kind, outcome] += 1
        if permit is not None:
            permit.release()


def storm(gov: ConcurrencyGovernor) -> tuple[Outcomes, list[ConcurrencyGovernor]]:
    """Let eight threads do ten thousand operations. Returns what came of them, and the agents."""
    agents = [gov.agent(f"agent-{n}", max_tools=2) for n in range(3)]
    sources = [(gov, ""), *((agent, f"agent-{n}") for n, agent in enumerate(agents))]
    counts = [Outcomes() for _ in range(8)]
    with Crew(patience=40) as crew:
        for seed, counted in enumerate(counts):
            source, label = sources[seed % 4]
            crew.start(use, source, label, 1_250, seed, counted)
    return sum(counts, Outcomes()), agents


# ----------------------------------------------------------------------------------- Prometheus


class Page:
    """What Prometheus would scrape."""

    def __init__(self, registry: Any, port: int) -> None:
        self.registry, self._address = registry, f"http://127.0.0.1:{port}/metrics"

    def __call__(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(self._address, timeout=10) as page:
            text = page.read().decode()
        families = list(text_string_to_metric_families(text))
        names = [family.name for family in families]
        assert len(names) == len(set(names)), "a metric that is there twice"
        return {
            (it.name, frozenset(it.labels.items())): it.value for family in families for it in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self().get((name, frozenset(labels.items())))


@pytest.fixture
def page() -> Iterator[Page]:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    server, thread = prometheus.start_http_server(0, "127.0.0.1", registry)
    yield Page(registry, server.server_port)
    server.shutdown()
    server.server_close()
    thread.join()


def collector_of(*governors: ConcurrencyGovernor, **options: Any) -> Any:
    from governor.integrations.prometheus import GovernorCollector

    return GovernorCollector(*governors, **options)


def test_a_scrape_shows_limits_use_and_lines(gov: ConcurrencyGovernor, page: Page) -> None:
    collector_of(gov, registry=page.registry)
    coder = gov.agent("coder", max_tools=1)
    with coder.acquire_tool(), gov.acquire_stream():
        line = coder.request_tool()
        found = page()
    line.result().release()

    def row(name: str, kind: str, agent: str = "") -> float | None:
        return found.get((name, frozenset({"governor": "api", "kind": kind, "agent": agent}.items())))

    assert [row("governor_limit", kind) for kind in ("stream", "tool", "global")] == [2, 3, 4]
    assert [row("governor_in_use", kind) for kind in ("stream", "tool", "global")] == [1, 1, 2]
    assert [row("governor_waiting", kind) for kind in ("stream", "tool", "global")] == [0, 1, None]
    assert [row(f"governor_{it}", "tool", "coder") for it in ("limit", "in_use", "waiting")] == [1, 1, 1]
    assert row("governor_limit", "stream", "coder") is None, "a limit that it has not"


@pytest.mark.timeout(60)
def test_a_scrape_agrees_with_an_independent_count(gov: ConcurrencyGovernor, page: Page) -> None:
    collector_of(gov, registry=page.registry)
    counted, agents = storm(gov)
    told, waits, holds = Outcomes(), Outcomes(), Outcomes()
    for (name, labels), value in page().items():
        its = dict(labels)
        if name == "governor_operations_total":
            told[its["agent"], its["kind"], its["outcome"]] = int(value)
        elif name == "governor_wait_seconds_count":
            waits[its["agent"], its["kind"], "acquired"] = int(value)
        elif name == "governor_hold_seconds_count":
            holds[its["agent"], its["kind"], "acquired"] = int(value)
    assert told == counted
    assert waits == holds == Outcomes({it: n for it, n in counted.items() if it[2] == "acquired"})
    assert len(agents) == 3
    assert is_idle(gov)


def test_a_wait_is_measured_in_seconds(gov: ConcurrencyGovernor, page: Page) -> None:
    collector_of(gov, registry=page.registry)
    permits = [gov.acquire_stream() for _ in range(2)]
    waited: list[float] = []

    def wait() -> None:
        with gov.acquire_stream() as permit:
            waited.append(permit.waited)

    with Crew() as crew:
        crew.start(wait)
        until(lambda: gov.stats().streams_waiting, "one in line")
        for permit in permits:
            permit.release()
    total = page.value("governor_wait_seconds_sum", governor="api", kind="stream", agent="")
    assert waited[0] <= total < waited[0] + 0.5  # the others had not to wait, but a fleet has to be asked


def test_what_was_counted_of_agents_that_are_gone_is_shown_once_more(
    gov: ConcurrencyGovernor, page: Page
) -> None:
    collector_of(gov, registry=page.registry)
    stays = gov.agent("stays", max_tools=1)
    stays.acquire_tool().release()
    for n in range(50):
        gov.agent(f"goes-{n}", max_tools=1).acquire_tool().release()

    def agents() -> set[str]:
        return {dict(labels)["agent"] for name, labels in page() if name == "governor_operations_total"}

    gc.collect()
    assert len(agents()) == 51
    assert agents() == {"stays"}


def test_the_labels_of_ten_thousand_agents_do_not_live_for_ever(gov: ConcurrencyGovernor) -> None:
    pytest.importorskip("prometheus_client")
    collector = collector_of(gov, registry=None)
    most = 0
    for n in range(10_000):
        gov.agent(f"agent-{n}", max_tools=1).acquire_tool().release()
        most = max(most, len(collector._operations._metrics))
    assert 500 < most <= 1_100, "nobody asked, and so nobody forgot"
    assert not collector_of(ConcurrencyGovernor(1, 1, 1), registry=None, agents=False)._known


def test_without_agents_all_is_the_governors(gov: ConcurrencyGovernor, page: Page) -> None:
    collector_of(gov, registry=page.registry, agents=False)
    coder = gov.agent("coder", max_tools=1)
    coder.acquire_tool().release()
    with GovernedExecutor(coder, ThreadPoolExecutor(1)) as pool:
        pool.submit(int).result()
    outcome = {"governor": "api", "kind": "tool", "agent": "", "outcome": "acquired"}
    assert page.value("governor_operations_total", **outcome) == 2
    assert {dict(labels).get("agent", "") for _, labels in page()} == {""}


def test_several_governors_share_a_page(page: Page) -> None:
    first, second = ConcurrencyGovernor(1, 2, 3), ConcurrencyGovernor(4, 5, 6, name="batch")
    collector = collector_of(first, second, registry=page.registry)
    second.acquire_tool().release()
    assert page.value("governor_limit", governor="default", kind="tool", agent="") == 2
    assert page.value("governor_limit", governor="batch", kind="tool", agent="") == 5
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        collector_of(ConcurrencyGovernor(1, 1, 1), registry=page.registry)
    collector.close()
    assert not first._global.tree.observed


@pytest.mark.parametrize("wrong", [["x"], [[ConcurrencyGovernor(1, 1, 1)]]])
@pytest.mark.parametrize("library", ["prometheus", "opentelemetry"])
def test_what_is_no_governor_is_refused(library: str, wrong: list[Any]) -> None:
    pytest.importorskip("prometheus_client" if library == "prometheus" else "opentelemetry.sdk")
    with pytest.raises(TypeError, match="governor must be a ConcurrencyGovernor, or a RedisGovernor, not"):
        (collector_of if library == "prometheus" else instrumentation_of)(*wrong)


@pytest.mark.parametrize("names", [[], ["a", "a"], [None, "default"]])
@pytest.mark.parametrize("library", ["prometheus", "opentelemetry"])
def test_governors_of_one_name_are_refused(library: str, names: list[str | None]) -> None:
    governors = [ConcurrencyGovernor(1, 1, 1, name=name) for name in names]
    if library == "prometheus":
        pytest.importorskip("prometheus_client")
        make: Any = collector_of
    else:
        pytest.importorskip("opentelemetry.sdk")
        make = instrumentation_of
    with pytest.raises(ValueError, match="of different names"):
        make(*governors)
    with pytest.raises(ValueError, match="must not be agents"):
        make(ConcurrencyGovernor(1, 1, 1, name="api").agent("coder", max_tools=1))
    assert not any(it._global.tree.observed for it in governors)


# -------------------------------------------------------------------------------- OpenTelemetry


def instrumentation_of(*governors: ConcurrencyGovernor, **options: Any) -> Any:
    from governor.integrations.opentelemetry import GovernorInstrumentation

    return GovernorInstrumentation(*governors, **options)


class Readings:
    """What OpenTelemetry's reader in memory has of one meter provider."""

    def __init__(self) -> None:
        metrics = pytest.importorskip("opentelemetry.sdk.metrics")
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        self._reader = InMemoryMetricReader()
        self.provider = metrics.MeterProvider([self._reader], shutdown_on_exit=False)

    def __call__(self) -> dict[str, dict[frozenset[tuple[str, Any]], Any]]:
        data = self._reader.get_metrics_data()
        scopes = (
            [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        )
        return {
            metric.name: {frozenset(point.attributes.items()): point for point in metric.data.data_points}
            for scope in scopes
            for metric in scope.metrics
        }


@pytest.fixture
def readings() -> Iterator[Readings]:
    readings = Readings()
    yield readings
    readings.provider.shutdown()


def at(kind: str, **others: str) -> frozenset[tuple[str, Any]]:
    return frozenset({"governor.name": "api", "governor.kind": kind, **others}.items())


def test_the_metrics_have_the_shape_of_a_connection_pools(
    gov: ConcurrencyGovernor, readings: Readings
) -> None:
    instrumentation = instrumentation_of(gov, meter_provider=readings.provider)
    with gov.acquire_tool(), gov.acquire_stream(), gov.acquire_stream():
        line = gov.request_stream()
        with pytest.raises(AcquireTimeout):
            gov.acquire_stream(0)
        found = readings()
    line.result().release()
    assert {attributes: point.value for attributes, point in found["governor.permit.max"].items()} == {
        at("stream"): 2,
        at("tool"): 3,
        at("global"): 4,
    }
    count = found["governor.permit.count"]
    assert (count[at("stream", state="used")].value, count[at("stream", state="idle")].value) == (2, 0)
    assert (count[at("global", state="used")].value, count[at("global", state="idle")].value) == (3, 1)
    pending = found["governor.permit.pending_requests"]
    assert {attributes: point.value for attributes, point in pending.items()} == {
        at("stream"): 1,
        at("tool"): 0,
    }
    assert found["governor.permit.timeouts"][at("stream")].value == 1
    instrumentation.close()
    gov.acquire_tool().release()
    assert "governor.permit.max" not in readings()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("agents", [True, False])
def test_readings_agree_with_an_independent_count(
    gov: ConcurrencyGovernor, readings: Readings, agents: bool
) -> None:
    instrumentation_of(gov, meter_provider=readings.provider, agents=agents)
    counted, _ = storm(gov)
    if not agents:
        of_all = Outcomes()
        for (_, kind, outcome), number in counted.items():
            of_all["", kind, outcome] += number
        counted = of_all
    found, told = readings(), Outcomes()
    names = {"wait_time": "acquired", "use_time": "released", "timeouts": "timeout", "rejections": None}
    for name, outcome in names.items():
        for attributes, point in found[f"governor.permit.{name}"].items():
            its = dict(attributes)
            number = point.value if hasattr(point, "value") else point.count
            told[its.get("governor.agent", ""), its["governor.kind"], outcome or its["reason"]] = number
    for (agent, kind, outcome), number in list(counted.items()):
        if outcome == "acquired":
            counted[agent, kind, "released"] = number
    assert told == counted
    assert is_idle(gov)


def test_a_wait_is_an_attribute_of_the_current_span(gov: ConcurrencyGovernor, readings: Readings) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    instrumentation_of(gov, meter_provider=readings.provider)
    waited: list[float] = []
    permits = [gov.acquire_stream() for _ in range(2)]

    def turn() -> None:
        with tracer.start_as_current_span("turn"), gov.acquire_stream() as permit:
            waited.append(permit.waited)

    with Crew() as crew:
        crew.start(turn)
        until(lambda: gov.stats().streams_waiting, "one in line")
        for permit in permits:
            permit.release()
    (span,) = exporter.get_finished_spans()
    assert dict(span.attributes or {}) == {"governor.stream.wait_time": waited[0]}
    assert waited[0] > 0
    provider.shutdown()
