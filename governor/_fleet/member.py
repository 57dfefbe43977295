"""How the commands take part in a fleet, and how they fail."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from governor import ConcurrencyError

if TYPE_CHECKING:
    from governor.redis import RedisGovernor

__all__ = ["Failure", "ends_on_sigterm", "member"]

# What a governor says where the fleet has other limits than it was given.
_DIFFERS = re.compile(r"(\w+)=\S+: the fleet .* has (\S+): ")


class Failure(Exception):
    """What a command tells the user in one line, in place of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def member(arguments: argparse.Namespace, **limits: Any) -> Generator[RedisGovernor, None, None]:
    """Take part in the fleet for the length of a block.

    Raises:
        Failure: there is no such fleet, its server cannot be reached, or redis-py is not there.
    """
    try:
        from redis.exceptions import AuthenticationError, RedisError
        from redis.exceptions import ConnectionError as Unreachable
    except ImportError as error:
        raise Failure("needs redis: pip install 'concurrency-governor[redis]'") from error
    from governor.redis import RedisGovernor

    options = _options_in(arguments.url)
    secret: str | None = options.get("password")
    try:
        gov = RedisGovernor(arguments.url, arguments.name, **limits)
        try:
            yield gov
        finally:
            gov.close()
    except (RedisError, ConcurrencyError, ValueError) as error:
        message = str(error) or type(error).__name__
        if isinstance(error, ValueError):
            message = _in_terms_of_commands(message, arguments.name, limits)
        socket = options.get("path")
        if socket and isinstance(error, Unreachable) and not isinstance(error, AuthenticationError):
            command = f"governor fleet serve --socket {shlex.quote(socket)}"
            message = f"{message.rstrip('.')}: is the server running? {command}"
        # An old server quotes what it does not understand, the password for example.
        raise Failure(message.replace(secret, "***") if secret else message) from None


def _in_terms_of_commands(message: str, name: str, wanted: dict[str, Any]) -> str:
    """Say what a governor says of its arguments in terms of the commands."""
    shell_name = shlex.quote(name)
    if "there is no fleet" in message:
        command = f"governor fleet create URL {shell_name} --streams N --tools N --global N"
        return f"there is no fleet {name!r} on this server: make it with {command}"
    if not (found := _DIFFERS.match(message)):
        return message
    argument, has = found.groups()
    if argument in ("lease", "max_queued"):
        how = "it cannot be changed while the fleet is there: end it and make it again"
    else:
        option = argument.removeprefix("max_")
        how = f"change it with governor fleet resize URL {shell_name} --{option} {wanted[argument]}"
    return f"the fleet {name!r} has {argument}={has}: {how}"


def _options_in(url: str) -> dict[str, Any]:
    """Return what redis-py makes of a URL: a password, the path of a socket, and the like."""
    connection: Any = import_module("redis.connection")  # whose functions have no types
    try:
        options: dict[str, Any] = connection.parse_url(url)
        return options
    except ValueError:
        # Whose message may quote a part of the password.
        raise Failure(
            "URL must be redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH, with what is special in "
            "a password percent-encoded"
        ) from None


@contextmanager
def ends_on_sigterm() -> Generator[None, None, None]:
    """Let SIGTERM end the block as an exception does, so that the fleet is told."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
