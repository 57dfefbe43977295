"""The examples' model server, held up by gates."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from model_server import ModelServer  # noqa: E402

__all__ = ["EXAMPLES", "Gates", "ModelServer"]


class Gates:
    """Hold up every piece of an answer, and every page, until the test opens a gate."""

    def __init__(self) -> None:
        self.stream, self.page = threading.Event(), threading.Event()

    def __call__(self, kind: str) -> None:
        getattr(self, kind).wait()

    def open(self) -> None:
        self.stream.set()
        self.page.set()
