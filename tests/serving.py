"""What tests ask of the examples' model server: to hold its answers, and what it has counted."""

from __future__ import annotations

import threading

from model_server import ModelServer

__all__ = ["Gates", "idle", "peaks"]


class Gates:
    """Hold up every piece of an answer, and every page, until the test opens a gate."""

    def __init__(self) -> None:
        self.stream, self.page = threading.Event(), threading.Event()

    def __call__(self, kind: str) -> None:
        getattr(self, kind).wait()

    def open(self) -> None:
        self.stream.set()
        self.page.set()


def peaks(server: ModelServer) -> tuple[int, int, int]:
    return server.streams.peak, server.pages.peak, server.everything.peak


def idle(server: ModelServer) -> bool:
    return server.streams.now == server.pages.now == server.everything.now == 0
