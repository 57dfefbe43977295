"""Ctrl-C as something to look at, not as an exception at any instruction."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

__all__ = ["Interrupt"]


class Interrupt:
    """Notes the first Ctrl-C of its `with` block in `seen`; a second one raises as usual.

    So the demo stops where it can stop well, and one who cannot wait for that is
    still served. Outside the main thread, and where SIGINT is not Python's own to
    handle (ignored under nohup, taken by an application), it leaves all as it is.
    """

    def __init__(self) -> None:
        self.seen = False
        self._ours = False

    def __enter__(self) -> Self:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._note)
            self._ours = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Note that it came, and let the next one through."""
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
