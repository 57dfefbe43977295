"""What the commands of ``governor fleet`` take. Each is loaded when it is run, and no sooner."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["Parser", "add_fleet"]

Commands = argparse._SubParsersAction
Run = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """A parser that keeps passwords to itself, and hands on another program's arguments as they are."""

    takes_command = False

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, which may quote an argument, but not the password in a URL."""
        hidden = re.sub(r"(\w+://)\S*@", r"\1***@", message)
        super().error(re.sub(r"([?&]password=)[^&\s']*", r"\1***", hidden))

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse what stands before ``--``, if a command is to follow that.

        Left to argparse, a second ``--`` would be taken out of the command.
        """
        if not self.takes_command:
            return super().parse_known_args(args, namespace)
        given = [*(sys.argv[1:] if args is None else args)]
        end = given.index("--") if "--" in given else len(given)
        found, rest = super().parse_known_args(given[:end], namespace)
        found.program = given[end + 1 :]
        if not found.program:
            self.error("a command must follow, after --")
        return found, rest


def add_fleet(commands: Commands[Parser]) -> None:
    """Add the subcommand ``fleet``, and its own."""
    fleet = commands.add_parser(
        "fleet",
        help="share one budget among processes and hosts, by way of Redis or Valkey",
        description="Share one budget among processes and hosts, by way of Redis or Valkey.",
        allow_abbrev=False,
    )
    parts = fleet.add_subparsers(title="commands", dest="command", required=True)
    for add in _add_serve, _add_create, _add_watch, _add_run, _add_resize:
        add(parts)


def _add_serve(parts: Commands[Parser]) -> None:
    serve = parts.add_parser(
        "serve",
        help="run a Valkey server for the processes of this host",
        description="Run a Valkey server for the processes of this host and user, on a socket in the "
        "file system, and print its URL once it answers. Its data is kept beside the socket, so a "
        "restart forgets nothing. SIGTERM and Ctrl-C end it. "
        "Needs pip install 'concurrency-governor[fleet-local]', and Linux or macOS.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "--socket",
        metavar="PATH",
        help="where (default: governor.sock in $XDG_RUNTIME_DIR, or else in ~/.cache)",
    )
    serve.set_defaults(run=_run_serve)


def _add_create(parts: Commands[Parser]) -> None:
    create = parts.add_parser(
        "create",
        help="make a fleet ahead of time",
        description="Make a fleet. A new one grants nothing for half a lease, which this gets over "
        "with before the first process needs it. Does nothing if it is there, with these limits.",
        allow_abbrev=False,
    )
    _add_which(create)
    _add_limits(create, required=True)
    create.add_argument(
        "--lease",
        type=_lease,
        metavar="S",
        help="seconds after which the permits of a process that died are given to others, from 0.1 to "
        "86400 (default: 30)",
    )
    create.add_argument(
        "--queued", type=_limit, metavar="N", help="limit of those in line for each kind (default: none)"
    )
    create.set_defaults(run=_run_create)


def _add_watch(parts: Commands[Parser]) -> None:
    watch = parts.add_parser(
        "watch",
        help="show how full a fleet is, who holds and who waits",
        description="Show how full a fleet is, who holds permits, and how many wait, until Ctrl-C.",
        allow_abbrev=False,
    )
    _add_which(watch)
    watch.add_argument("--once", action="store_true", help="show it once, and end")
    watch.add_argument(
        "--interval",
        type=_period,
        default=1.0,
        metavar="S",
        help="seconds between looks (default: %(default)s)",
    )
    watch.add_argument("--json", action="store_true", help="print each look as a line of JSON")
    watch.set_defaults(run=_run_watch)


def _add_run(parts: Commands[Parser]) -> None:
    run = parts.add_parser(
        "run",
        usage="governor fleet run URL NAME --kind {tool,stream} [--timeout S]\n"
        "           [--agent NAME --max-tools N [--max-streams N]] -- COMMAND ...",
        help="run a command under a permit",
        description="Wait for a permit, run a command, and give the permit back when it has ended. "
        "Signals are passed on to it.",
        epilog="The exit status is the command's, or 128 and the number of the signal that ended it; "
        "127 if there is no such command, 126 if it cannot be run; 75 if no permit came in time or "
        "the line is full; 1 if there is no fleet.",
        allow_abbrev=False,
    )
    run.takes_command = True
    _add_which(run)
    run.add_argument("--kind", choices=["tool", "stream"], required=True, help="of which permit")
    run.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="seconds to wait for the permit; 0 does not wait (default: as long as it takes)",
    )
    run.add_argument("--agent", metavar="NAME", help="take it of this agent's; needs --max-tools")
    run.add_argument("--max-tools", type=_limit, metavar="N", help="the agent's limit of tools")
    run.add_argument(
        "--max-streams", type=_limit, metavar="N", help="the agent's limit of streams (default: none)"
    )

    def checked(arguments: argparse.Namespace) -> int:
        limits = (arguments.max_tools, arguments.max_streams)
        if arguments.agent is None and limits != (None, None):
            run.error("--max-tools and --max-streams are an agent's: they need --agent")
        if arguments.agent is not None and arguments.max_tools is None:
            run.error("--agent needs --max-tools")
        return _run_run(arguments)

    run.set_defaults(run=checked)


def _add_resize(parts: Commands[Parser]) -> None:
    resize = parts.add_parser(
        "resize",
        help="change limits of a fleet, for all at once",
        description="Change limits of a fleet, for all processes at once. Those not given stay. "
        "0 pauses. Shrinking revokes nothing: it takes effect as permits come back.",
        allow_abbrev=False,
    )
    _add_which(resize)
    _add_limits(resize, required=False)

    def checked(arguments: argparse.Namespace) -> int:
        if arguments.streams is arguments.tools is arguments.total is None:
            resize.error("give at least one of --streams, --tools and --global")
        return _run_resize(arguments)

    resize.set_defaults(run=checked)


def _add_which(parser: Parser) -> None:
    """Add what says which fleet."""
    parser.add_argument(
        "url",
        type=_url,
        metavar="URL",
        help="redis://HOST:PORT, rediss://... or unix:///PATH; or env:VARIABLE, where that is in the "
        "environment, which keeps a password out of the list of processes",
    )
    parser.add_argument("name", type=_name, metavar="NAME", help="of the fleet")


def _add_limits(parser: Parser, *, required: bool) -> None:
    """Add the three limits."""
    limits = [("streams", "streams"), ("tools", "tools"), ("global", "both together")]
    for option, what in limits:
        parser.add_argument(
            f"--{option}",
            type=_limit,
            required=required,
            dest="total" if option == "global" else option,
            metavar="N",
            help=f"limit of {what}",
        )


def _run_serve(arguments: argparse.Namespace) -> int:
    from governor._fleet.serve import serve

    return _told(serve, arguments)


def _run_create(arguments: argparse.Namespace) -> int:
    from governor._fleet.steer import create

    return _told(create, arguments)


def _run_watch(arguments: argparse.Namespace) -> int:
    from governor._fleet.watch import watch

    return _told(watch, arguments)


def _run_run(arguments: argparse.Namespace) -> int:
    from governor._fleet.run import run

    return _told(run, arguments)


def _run_resize(arguments: argparse.Namespace) -> int:
    from governor._fleet.steer import resize

    return _told(resize, arguments)


def _told(command: Run, arguments: argparse.Namespace) -> int:
    """Run a command; say in a line why it failed, if it did."""
    from governor._fleet.member import Failure

    try:
        return command(arguments)
    except Failure as failure:
        print(f"governor fleet {arguments.command}: {failure}", file=sys.stderr)
        return 1


def _url(text: str) -> str:
    """Read where the server is."""
    if not text.startswith("env:"):
        return text
    variable = text.removeprefix("env:")
    if variable not in os.environ:
        raise argparse.ArgumentTypeError(f"there is no {variable!r} in the environment")
    return os.environ[variable]


def _name(text: str) -> str:
    """Read a fleet's name. What is wrong is not quoted: it may be a password, in the wrong place."""
    if not text or any(it in "{}" or it.isspace() for it in text):
        raise argparse.ArgumentTypeError("must be a name without spaces and braces")
    return text


def _limit(text: str) -> int:
    """Read a limit: at least 0, which pauses."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not {text!r}")
    return number


def _seconds(text: str) -> float:
    """Read a number of seconds, at least 0 and finite."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:  # which NaN is not either
        raise argparse.ArgumentTypeError(f"must be a number of seconds of at least 0, not {text!r}")
    return seconds


def _period(text: str) -> float:
    """Read a number of seconds, above 0 and finite."""
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return seconds


def _lease(text: str) -> float:
    """Read a lease: a number of seconds in the bounds that a fleet has for it."""
    seconds = _seconds(text)
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0.1 to 86400, not {text!r}")
    return seconds
