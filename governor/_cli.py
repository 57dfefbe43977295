"""The command ``governor``, which is also ``python3 -m governor``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence

from governor._demo.settings import MAX_AGENTS, Settings
from governor._fleet.arguments import Parser, add_fleet

__all__ = ["main"]

# What a shell reports of a command that Ctrl-C ended: 128 and the number of SIGINT.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: The arguments after the program's name; None takes those of the process.

    Returns:
        0 when all went well, 1 when it did not, 130 after Ctrl-C.

    Raises:
        SystemExit: with status 2 for bad arguments, with 0 after ``--help``.
    """
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has left, as in `governor demo | head`. At exit Python flushes stdout
        # once more, and would complain: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> Parser:
    """Return the parser. Each subcommand sets ``run``, which takes the arguments."""
    parser = Parser(
        prog="governor",
        description="Keep an LLM agent inside its limits.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    _add_demo(commands)
    add_fleet(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand ``demo``."""
    demo = commands.add_parser(
        "demo",
        help="watch a crew of agents work with the governor and without it",
        description="Run agents that read streams from a model server on this machine and run "
        "real tools: first under a governor, then the same work without it. Both runs count "
        "how much went on at once.",
        allow_abbrev=False,
    )
    count, default = _count(), Settings()
    demo.add_argument(
        "--streams",
        type=count,
        default=default.streams,
        metavar="N",
        help="limit of streams open at once (default: %(default)s)",
    )
    demo.add_argument(
        "--tools",
        type=count,
        default=default.tools,
        metavar="N",
        help="limit of tools running at once; one agent may run half (default: %(default)s)",
    )
    demo.add_argument(
        "--global",
        type=count,
        default=default.total,
        dest="total",
        metavar="N",
        help="limit of both together (default: %(default)s)",
    )
    demo.add_argument(
        "--agents",
        type=_count(MAX_AGENTS),
        metavar="N",
        help=f"agents at work, at most {MAX_AGENTS} (default: two more than --streams)",
    )
    demo.add_argument(
        "--seconds",
        type=_duration,
        default=default.seconds,
        metavar="S",
        help="how long each of the two runs lasts (default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=_whole_number,
        default=default.seed,
        metavar="N",
        help="fixes what the model says and which tools it asks for (default: %(default)s)",
    )
    demo.add_argument(
        "--json",
        action="store_true",
        help="print nothing but the result, as JSON",
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo, print its result, and return the exit status."""
    # Here and not above: each command loads what it needs, and Ctrl-C meanwhile is caught.
    from governor._demo.demo import run_demo
    from governor._demo.report import as_json, as_table
    from governor._demo.screen import SilentScreen, screen_for

    settings = Settings(
        streams=arguments.streams,
        tools=arguments.tools,
        total=arguments.total,
        agents=arguments.agents or min(arguments.streams + 2, MAX_AGENTS),
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    if arguments.json:
        result = run_demo(settings, SilentScreen())
        print(as_json(result))
    else:
        result = run_demo(settings, screen_for(sys.stdout))
        print(f"\n{as_table(result)}")
    if result.interrupted:
        return _INTERRUPTED
    return 0 if result.kept else 1


def _count(most: int | None = None) -> Callable[[str], int]:
    """Return what reads a number of things, at least one and at most `most`."""
    bounds = "of at least 1" if most is None else f"from 1 to {most}"

    def read(text: str) -> int:
        number = _whole_number(text)
        if number < 1 or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, not {text!r}")
        return number

    return read


def _whole_number(text: str) -> int:
    """Read a whole number; argparse puts the option's name before the message."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _duration(text: str) -> float:
    """Read a number of seconds, above zero and finite."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:  # which NaN is not either
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return seconds
