"""Celery's tasks under permits, in a worker with threads and in one that forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from threads import Gauge, is_idle, until

import governor
from governor import AcquireTimeout, ConcurrencyGovernor, ConcurrencyLimitExceeded

pytest.importorskip("celery")

from celery import Celery, Task
from celery.contrib.testing.worker import start_worker

from governor.integrations.celery import GovernedTask

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what a framework does is its own affair
]

PATIENCE = 25.0


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=2, max_global=3)


@pytest.fixture
def app() -> Celery:
    return make_app()


def make_app(**options: Any) -> Celery:
    made = Celery("tests", broker="memory://", backend="cache+memory://", set_as_current=False, **options)
    made.conf.broker_transport_options = {"polling_interval": 0.01}
    return made


@contextmanager
def working(app: Celery) -> Iterator[None]:
    """Run a worker with eight threads."""
    with start_worker(
        app, pool="threads", concurrency=8, perform_ping_check=False, shutdown_timeout=PATIENCE
    ):
        yield


# -------------------------------------------------------------------------------------- the threads


def test_a_worker_with_threads_fills_the_limit_and_passes_it_never(
    app: Celery, gov: ConcurrencyGovernor
) -> None:
    gauge, gate = Gauge(), threading.Event()

    @app.task(shared=False, base=GovernedTask, governor=gov)
    def dig(depth: int) -> int:
        """Dig a hole."""
        with gauge:
            assert gate.wait(PATIENCE)
        return depth

    with working(app):
        results = [dig.delay(depth) for depth in range(6)]
        try:
            until(lambda: gauge.inside == 2 and gov.stats().tools_waiting == 4, "two at work, four in line")
        finally:
            gate.set()
        assert [result.get(timeout=PATIENCE) for result in results] == [*range(6)]

    assert (gauge.peak, gauge.entries) == (2, 6)
    assert is_idle(gov)


def test_all_tasks_of_an_app_may_be_governed_by_the_shared_governor() -> None:
    app = make_app(task_cls=GovernedTask)

    @app.task(shared=False)
    def look() -> int:
        return shared.stats().tools_in_use

    with ConcurrencyGovernor.shared() as shared, working(app):
        assert look.delay().get(timeout=PATIENCE) == 1
        assert is_idle(shared)


def test_a_task_keeps_what_celery_gives_it(app: Celery, gov: ConcurrencyGovernor) -> None:
    @app.task(shared=False, base=GovernedTask, bind=True, governor=gov, kind="stream")
    def look(self: Any, depth: int) -> tuple[str, int, int]:
        """Say which run this is."""
        return self.request.id, self.request.retries, gov.stats().streams_in_use

    assert (look.name, look.__doc__) == (f"{__name__}.look", "Say which run this is.")
    with pytest.raises(TypeError, match="depth"):
        look.delay()  # checked against the signature before it is sent
    with working(app):
        result = look.delay(3)
        assert result.get(timeout=PATIENCE) == [result.id, 0, 1]
    assert is_idle(gov)


def test_a_task_may_lend_its_place_to_others(app: Celery) -> None:
    gov = ConcurrencyGovernor(1, 1, 1)

    @app.task(shared=False, base=GovernedTask, governor=gov)
    def dig(depth: int) -> int:
        return depth

    @app.task(shared=False, base=GovernedTask, governor=gov)
    def delegate(depth: int) -> int:
        with governor.suspended():
            return dig.delay(depth).get(timeout=PATIENCE, disable_sync_subtasks=False)

    with working(app):
        assert delegate.delay(7).get(timeout=PATIENCE) == 7
    assert is_idle(gov)


# --------------------------------------------------------------------------------------- no permit


@pytest.mark.parametrize(("serializer", "type_there"), [("json", Exception), ("pickle", AcquireTimeout)])
def test_a_task_that_gets_no_permit_in_time_fails_without_having_run(
    serializer: str, type_there: type[Exception], app: Celery, gov: ConcurrencyGovernor
) -> None:
    ran: list[int] = []
    app.conf.update(result_serializer=serializer, accept_content=["json", serializer])

    @app.task(shared=False, base=GovernedTask, governor=gov, acquire_timeout=0.01)
    def dig(depth: int) -> None:
        ran.append(depth)

    with working(app), gov.acquire_tool(), gov.acquire_tool():
        with pytest.raises(type_there, match=r"no tool permit within 0\.01 s: tools 2/2 in use") as caught:
            dig.delay(3).get(timeout=PATIENCE)
        assert type(caught.value) is type_there
    assert ran == []
    assert is_idle(gov)


def test_celery_retries_for_want_of_a_permit_where_it_is_told_to(
    app: Celery, gov: ConcurrencyGovernor
) -> None:
    tries: list[int] = []

    class Seen(GovernedTask):
        def on_retry(self, exc: Exception, *_: Any) -> None:
            tries.append(self.request.retries)
            assert isinstance(exc, AcquireTimeout)
            for permit in held:
                permit.release()

    @app.task(
        shared=False,
        base=Seen,
        governor=gov,
        acquire_timeout=0.01,
        autoretry_for=[AcquireTimeout],
        default_retry_delay=0,
    )
    def dig(depth: int) -> int:
        return depth

    held = [gov.acquire_tool(), gov.acquire_tool()]
    with working(app):
        assert dig.delay(3).get(timeout=PATIENCE) == 3
    assert tries == [0]
    assert is_idle(gov)


# ------------------------------------------------------------------------------- without a worker


def test_a_direct_call_and_an_eager_one_run_under_a_permit(app: Celery, gov: ConcurrencyGovernor) -> None:
    @app.task(shared=False, base=GovernedTask, bind=True, governor=gov)
    def look(self: Any) -> tuple[str | None, int]:
        return self.request.id, gov.stats().tools_in_use

    assert look() == (None, 1)
    eager = look.apply()
    assert eager.get() == (eager.id, 1)
    assert is_idle(gov)


def test_a_task_as_a_class_is_governed_once(app: Celery, gov: ConcurrencyGovernor) -> None:
    gov.resize(max_tools=1)

    class Dig(GovernedTask):
        name = "dig"
        governor = gov

        def __init__(self) -> None:
            self.seen: list[int] = []

        def run(self, depth: int) -> int:
            self.seen.append(gov.stats().tools_in_use)
            return depth

    class DigTwice(Dig):
        name = "dig twice"

        def run(self, depth: int) -> int:
            return 2 * super().run(depth)

    dig = app.register_task(DigTwice())
    assert isinstance(dig, Task)
    assert dig(3) == dig.run(depth=3) == dig.apply([3]).get() == 6
    assert dig.seen == [1, 1, 1]
    assert is_idle(gov)


def test_a_full_line_is_told_at_once(app: Celery) -> None:
    full = ConcurrencyGovernor(1, 0, 1, max_queued=0)

    @app.task(shared=False, base=GovernedTask, governor=full)
    def dig() -> None:
        raise AssertionError("never run")

    with pytest.raises(ConcurrencyLimitExceeded):
        dig()


# ---------------------------------------------------------------------------------------- processes

PROGRAM = """
import os, sys, time
from pathlib import Path
from celery import Celery
from governor import ConcurrencyGovernor
from governor.integrations.celery import GovernedTask

here = Path(__file__).parent
queue = {"data_folder_in": str(here / "queue"), "data_folder_out": str(here / "queue")}
control = {"control_folder": str(here / "control"), "polling_interval": 0.01}
app = Celery(
    "prefork",
    broker="filesystem://",
    backend=f"file://{here / 'results'}",
    broker_transport_options=queue | control,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)
gov = ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=1)
if "worker" in sys.argv:
    held = gov.acquire_tool()  # by the worker itself, before it forks

@app.task(base=GovernedTask, governor=gov)
def meet(name):
    (here / name).touch()
    deadline = time.monotonic() + 20
    while not ((here / "a").exists() and (here / "b").exists()):
        assert time.monotonic() < deadline, "the other never came"
        time.sleep(0.01)
    return os.getpid(), gov.stats().tools_in_use
"""


def test_each_child_of_a_worker_that_forks_has_the_full_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prefork.py").write_text(PROGRAM, "utf-8")
    for folder in "queue", "results", "control":
        (tmp_path / folder).mkdir()
    paths = os.pathsep.join([str(Path(governor.__file__).parents[1]), str(tmp_path)])
    command = [sys.executable, "-m", "celery", "--quiet", "--app", "prefork", "worker"]
    options = ["--pool", "prefork", "--concurrency", "2", "--loglevel", "WARNING"]
    monkeypatch.syspath_prepend(tmp_path)
    meet = __import__("prefork").meet
    log = tmp_path / "log"
    with log.open("w") as output:
        worker = subprocess.Popen(
            [*command, *options, "--without-gossip", "--without-mingle", "--without-heartbeat"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        results = [meet.delay(name) for name in "ab"]
        found = [result.get(timeout=PATIENCE) for result in results]
    except Exception as error:
        error.add_note(log.read_text())
        raise
    finally:
        worker.terminate()
        worker.wait(PATIENCE)
    (one, in_use), (other, in_use_there) = found
    assert len({one, other, worker.pid}) == 3
    assert (in_use, in_use_there) == (1, 1)
