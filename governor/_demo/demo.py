"""The demo: the same plan of turns under a governor, then without one."""

from __future__ import annotations

from time import monotonic, sleep

from governor._demo.crew import Crew
from governor._demo.gauge import Gauges
from governor._demo.interrupt import Interrupt
from governor._demo.regime import Governed, Regime, Ungoverned
from governor._demo.result import Outcome, Result
from governor._demo.screen import Moment, Screen
from governor._demo.script import Script
from governor._demo.server import ModelServer
from governor._demo.settings import Settings
from governor._demo.toolbox import Toolbox
from governor._demo.workshop import Workshop, open_workshop

__all__ = ["run_demo"]

# Seconds between two looks at whether to draw, or to stop.
_GLANCE = 0.05


def run_demo(settings: Settings, screen: Screen) -> Result:
    """Do the work under a governor, then without one, each for the same time.

    Ctrl-C ends it in good order, with the result so far.

    Args:
        settings: The limits and the work.
        screen: Shows what is going on.

    Returns:
        What both runs did.
    """
    with Interrupt() as interrupt, open_workshop() as workshop:
        demo = _Demo(settings, workshop, screen, interrupt)
        governed = demo.run(Governed(settings), Gauges.of(settings.names))
        if interrupt.seen:
            return Result(governed, None, interrupted=True)
        gauges = Gauges.of(settings.names)
        ungoverned = demo.run(Ungoverned(settings, gauges), gauges)
        return Result(governed, ungoverned, interrupted=interrupt.seen)


class _Demo:
    """What both runs have in common."""

    def __init__(
        self,
        settings: Settings,
        workshop: Workshop,
        screen: Screen,
        interrupt: Interrupt,
    ) -> None:
        self._settings = settings
        self._workshop = workshop
        self._screen = screen
        self._interrupt = interrupt

    def run(self, regime: Regime, gauges: Gauges) -> Outcome:
        """Let the agents work under a regime; the server and the tools count in the gauges."""
        settings = self._settings
        toolbox = Toolbox(self._workshop, gauges)
        script = Script(settings.seed, settings.bursts, toolbox.arguments)
        with ModelServer(script, gauges) as server:
            crew = Crew(settings.names, settings.bursts[-1], regime, server, toolbox)
            with crew:
                self._watch(regime, crew)
        crew.check()
        return Outcome.of(settings, gauges, crew.tally)

    def _watch(self, regime: Regime, crew: Crew) -> None:
        """Show how it goes until the time is over, Ctrl-C comes, or an agent fails."""
        screen, seconds = self._screen, self._settings.seconds
        screen.begin(regime.title)
        began = monotonic()
        due = screen.every
        while not (self._interrupt.seen or crew.broken):
            elapsed = monotonic() - began
            if elapsed >= min(due, seconds):
                screen.show(Moment(elapsed, seconds, regime.layers(), regime.agents()))
                due = max(due + screen.every, elapsed)
            if elapsed >= seconds:
                return
            sleep(_GLANCE)
