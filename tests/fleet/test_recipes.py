"""One budget for the workers of gunicorn and of Celery, which fork, and some of which die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from threads import Crew, is_idle, until

import governor

pytest.importorskip("redis")

from fleet.servers import Server, reap

from governor import ConcurrencyGovernor

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name == "nt", reason="these servers fork"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what a framework does is its own affair
]

PATIENCE = 45.0

# Short, for the tests' sake, and long enough for a machine that is busy.
LIMITS = {"max_streams": 1, "max_tools": 2, "max_global": 3, "lease": 4}

Join = Callable[..., ConcurrencyGovernor]

# What runs under a permit: it counts who else is there, and stays until it is told to go.
WORK = """
import os, time
from pathlib import Path
from governor.redis import RedisGovernor

here = Path(__file__).parent
url, name = os.environ["FLEET_URL"], os.environ["FLEET_NAME"]
gov = RedisGovernor(url, name, max_streams=1, max_tools=2, max_global=3)

def work():
    mark = here / "inside" / str(os.getpid())
    mark.touch()
    alive = [pid for pid in os.listdir(here / "inside") if is_alive(pid)]
    deadline = time.monotonic() + 60
    while not (here / "gate").exists():
        assert time.monotonic() < deadline, "nobody opened the gate"
        time.sleep(0.01)
    mark.unlink()
    return f"{os.getpid()} {len(alive)}"

def is_alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True
"""


class Place:
    """Where the processes under test run, and what is seen of them."""

    def __init__(self, folder: Path, server: Server, fleet_name: str, gov: ConcurrencyGovernor) -> None:
        self.folder, self.gov = folder, gov
        (folder / "inside").mkdir()
        (folder / "work.py").write_text(WORK, "utf-8")
        paths = [str(Path(governor.__file__).parents[1]), str(folder)]
        self.env = os.environ | {
            "FLEET_NAME": fleet_name,
            "FLEET_URL": server.url,
            "PYTHONPATH": os.pathsep.join(paths),
        }

    @contextmanager
    def running(self, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Run a module of Python until the block ends; show what it said if that failed."""
        log = self.folder / f"log-{len([*self.folder.glob('log-*')])}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # by which all that it forks can be ended
                **options,
            )
        reap(process.pid)
        try:
            yield process
            process.terminate()
            process.wait(PATIENCE)
        except BaseException as error:
            error.add_note(log.read_text())
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def holders(self) -> set[int]:
        """The processes that hold a permit."""
        processes = [holder.process or "" for holder in self.gov.holders()]
        assert all(it.startswith(f"{socket.gethostname()}:") for it in processes)
        return {int(it.rpartition(":")[2]) for it in processes}

    def others(self) -> set[str]:
        """The processes that take part, without this one."""
        gov: Any = self.gov
        return {it.process for it in gov._survey_fleet().sessions} - {f"{socket.gethostname()}:{os.getpid()}"}

    def await_use(self, in_use: int, waiting: int) -> set[int]:
        """Wait until so many run and wait, in all processes together; return those that run."""

        def reached() -> bool:
            now = self.gov.stats()
            return (now.tools_in_use, now.tools_waiting) == (in_use, waiting)

        until(reached, f"{in_use} at work, {waiting} in line", patience=PATIENCE)
        return self.holders()

    def open_gate(self) -> None:
        (self.folder / "gate").touch()


@pytest.fixture
def place(tmp_path: Path, server: Server, fleet_name: str, join: Join) -> Place:
    return Place(tmp_path, server, fleet_name, join(**LIMITS))


def crowd(answers: list[str]) -> set[int]:
    """Return how many were seen inside at once, by those who were."""
    return {int(answer.split()[1]) for answer in answers}


# ------------------------------------------------------------------------------------------ gunicorn

APP = """
from work import gov, os, work

def app(environ, start_response):
    if environ["PATH_INFO"] == "/look":
        answer = str(os.getpid())
    else:
        with gov.acquire_tool():
            answer = work()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [answer.encode()]
"""


@contextmanager
def gunicorn(place: Place, *options: str) -> Iterator[str]:
    """Run the app in gunicorn's workers, of which each serves one request at a time; give its address."""
    (place.folder / "app.py").write_text(APP, "utf-8")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as door:
        command = ["gunicorn", "--bind", f"fd://{door.fileno()}", "--no-control-socket", "--timeout", "90"]
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        with place.running(*command, *options, "app:app", pass_fds=[door.fileno()]):
            yield url


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE) as page:
        text: str = page.read().decode()
        return text


@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
def test_gunicorns_workers_share_the_limits_and_survive_one_another(preload: bool, place: Place) -> None:
    pytest.importorskip("gunicorn")
    options = ["--workers", "4", *(["--preload"] if preload else [])]
    answers: list[str] = []
    failed: list[Exception] = []

    def ask(url: str) -> None:
        try:
            answers.append(get(f"{url}/work"))
        except OSError as error:  # of the one whose worker was killed
            failed.append(error)

    with gunicorn(place, *options) as url, Crew(patience=PATIENCE) as crew:
        for _ in range(4):
            crew.start(ask, url)
        both = place.await_use(2, 2)
        assert len(both) == 2
        victim = both.pop()

        os.kill(victim, signal.SIGKILL)
        survivors = place.await_use(2, 1)  # after its lease
        assert victim not in survivors
        place.open_gate()
        crew.join()

        assert (len(answers), len(failed)) == (3, 1)
        assert crowd(answers) <= {1, 2}
        pids = {int(answer.split()[0]) for answer in answers}
        assert survivors <= pids

        # The worker that took the dead one's place takes part as well.
        def a_new_one() -> bool:
            return int(get(f"{url}/work").split()[0]) not in pids

        until(a_new_one, "the new worker to answer", patience=PATIENCE)
    until(lambda: is_idle(place.gov), "all to be given back")


def test_gunicorns_workers_leave_the_fleet_when_they_end(place: Place) -> None:
    pytest.importorskip("gunicorn")
    place.open_gate()
    with gunicorn(place, "--workers", "2") as url:
        get(f"{url}/work")
    assert place.others() == set()


# -------------------------------------------------------------------------------------------- Celery

TASKS = """
from celery import Celery
from celery.signals import worker_process_shutdown
from governor.integrations.celery import GovernedTask
from work import gov, here, work

queue = {"data_folder_in": str(here / "queue"), "data_folder_out": str(here / "queue")}
control = {"control_folder": str(here / "control"), "polling_interval": 0.01}
app = Celery(
    "tasks",
    broker="filesystem://",
    backend=f"file://{here / 'results'}",
    broker_transport_options=queue | control,
    worker_prefetch_multiplier=1,
    worker_lost_wait=0.1,
    broker_connection_retry_on_startup=True,
)

@app.task(base=GovernedTask, governor=gov)
def dig():
    return work()

@worker_process_shutdown.connect
def leave(**_):
    gov.close()
"""


def test_the_children_of_celerys_workers_share_the_limits_and_survive_one_another(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("celery")
    for name in "queue", "results", "control":
        (place.folder / name).mkdir()
    (place.folder / "tasks.py").write_text(TASKS, "utf-8")
    monkeypatch.syspath_prepend(place.folder)
    for name in "FLEET_URL", "FLEET_NAME":
        monkeypatch.setenv(name, place.env[name])

    command = ["celery", "--quiet", "--app", "tasks", "worker", "--pool", "prefork", "--concurrency", "2"]
    command += ["--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    with (
        place.running(*command, "--hostname", "one@here"),
        place.running(*command, "--hostname", "two@here"),
    ):
        tasks = __import__("tasks")
        try:
            # A worker may fetch as many as it has children beyond those that run.
            results = [tasks.dig.delay() for _ in range(8)]
            both = place.await_use(2, 2)
            assert len(both) == 2
            victim = both.pop()
            os.kill(victim, signal.SIGKILL)
            until(lambda: victim not in place.holders(), "its lease to end", patience=PATIENCE)
            assert len(place.await_use(2, 2)) == 2  # another child has come, too
            place.open_gate()

            answers, failed = [], []
            for result in results:
                try:
                    answers.append(result.get(timeout=PATIENCE))
                except Exception as error:
                    failed.append(type(error).__name__)
            assert failed == ["WorkerLostError"]
            assert len(answers) == 7
            assert crowd(answers) <= {1, 2}

            assert tasks.dig.delay().get(timeout=PATIENCE)
            until(lambda: is_idle(place.gov), "all to be given back")
        finally:
            tasks.gov.close()
            for name in "tasks", "work":
                sys.modules.pop(name, None)
    assert place.others() == set()
