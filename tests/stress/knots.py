"""A program: four threads tie permits into cycles, one collects all the time, and all come back.

Not in the process of the tests, where each of these collections would go through all that pytest
has loaded; without the global lock each stops every thread for that long.
"""

from __future__ import annotations

import gc
import threading
import time
import warnings

from governor import ConcurrencyGovernor, ConcurrencyPermit


class Knot:
    """Something in a cycle that keeps a permit."""

    def __init__(self, permit: ConcurrencyPermit) -> None:
        self.permit, self.me = permit, self


def main() -> None:
    warnings.simplefilter("ignore", ResourceWarning)
    gc.set_threshold(3, 2, 2)
    gov = ConcurrencyGovernor(2, 2, 3)
    over = threading.Event()

    def tie_knots() -> None:
        for turn in range(50):
            Knot(gov.acquire_tool() if turn % 2 else gov.acquire_stream())

    def sweep() -> None:
        # Without a pause a free-threaded build stops the world again before others can run.
        while not over.wait(0.001):
            gc.collect()

    threading.Thread(target=sweep, daemon=True).start()
    crew = [threading.Thread(target=tie_knots, daemon=True) for _ in range(4)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join(40)
        assert not thread.is_alive(), f"stuck: {gov}"
    over.set()
    deadline = time.monotonic() + 8
    while gov.stats().global_in_use:
        gc.collect()
        assert time.monotonic() < deadline, f"not all came back: {gov}"
    assert gov.stats().tools_waiting == gov.stats().streams_waiting == 0


if __name__ == "__main__":
    main()
