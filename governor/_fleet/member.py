"""How the commands take part in a fleet, and how they fail."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from governor import ConcurrencyError

if TYPE_CHECKING:
    from governor.redis import RedisGovernor

__all__ = ["Failure", "ends_on_sigterm", "member"]


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
        from redis.exceptions import RedisError
    except ImportError as error:
        raise Failure("needs redis: pip install 'concurrency-governor[redis]'") from error
    from governor.redis import RedisGovernor

    secret = _password_in(arguments.url)
    try:
        gov = RedisGovernor(arguments.url, arguments.name, **limits)
        try:
            yield gov
        finally:
            gov.close()
    except (RedisError, ConcurrencyError, ValueError) as error:
        message = str(error) or type(error).__name__
        # An old server quotes what it does not understand, the password for example.
        raise Failure(message.replace(secret, "***") if secret else message) from None


def _password_in(url: str) -> str | None:
    """Return the password in a URL, if there is one."""
    connection: Any = import_module("redis.connection")  # whose functions have no types
    try:
        options: dict[str, Any] = connection.parse_url(url)
        return options.get("password")
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
