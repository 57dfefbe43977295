"""The pictures of the docs, drawn from the results that were kept. Needs matplotlib."""

from __future__ import annotations

import hashlib

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._measure import Row
from benchmarks._report import DETAIL, RESULTS, ROOT, results
from benchmarks.contended import SECONDS

__all__ = ["draw"]

GREY = "#808080"  # to be read on white and on black
COLOURS = ("#2f81f7", "#d97706", "#9a6bd8", "#3fa34d", "#c9417f", "#0f9b9b")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "governor",
    "font.size": 10,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw() -> None:
    """Draw all, and note in each what results it was drawn of."""
    rows = {
        (scenario, case, row.contender): row
        for (scenario, case), found in results()[DETAIL].items()
        for row in found
    }
    source = hashlib.sha256((RESULTS / f"{DETAIL}.json").read_bytes()).hexdigest()
    matplotlib.use("svg")
    with matplotlib.rc_context(STYLE):
        for name, make in (("fairness", fairness), ("burst", burst), ("agents", agents)):
            figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
            make(axes, rows)
            _save(figure, name, source)


def _save(figure: Figure, name: str, source: str) -> None:
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    metadata = {"Date": None, "Description": f"CPython {DETAIL}, results {source}"}
    figure.savefig(folder / f"{name}.svg", transparent=True, metadata=metadata)
    pyplot.close(figure)


Rows = dict[tuple[str, str, str], Row]


def fairness(axes: Axes, rows: Rows) -> None:
    """Draw the turns of each thread, the unluckiest first."""
    case = "32 threads, 2 permits, held 1 ms"
    for name, shift, colour in (
        ("nested BoundedSemaphores", 0.2, COLOURS[1]),
        ("governor", -0.2, COLOURS[0]),
    ):
        turns = rows["contended", case, name].samples
        axes.bar([n + shift for n in range(1, len(turns) + 1)], turns, 0.4, label=name, color=colour)
    axes.set_xlim(0, len(turns) + 1)
    axes.set_xlabel("thread, by its number of turns (32 threads, 2 permits, each held for 1 ms)")
    axes.set_ylabel(f"turns in {SECONDS[32]:g} s")
    axes.legend(loc="upper left")


def burst(axes: Axes, rows: Rows) -> None:
    """Draw which share of the streams had waited for how long."""
    case = "2 threads with streams, 64 with tools"
    names = ("nested BoundedSemaphores", "the same, the global one first", "resource-semaphore", "governor")
    for name, colour in zip(names, (COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[0]), strict=True):
        row = rows.get(("burst", case, name))
        if row is not None and row.samples:
            waits = [max(it, 0.001) for it in row.samples]
            shares = [100 * (n + 1) / len(waits) for n in range(len(waits))]
            label = "nested BoundedSemaphores, the global one first" if "first" in name else name
            axes.step(waits, shares, where="post", label=label, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("wait of a stream during a burst of 64 tools, ms")
    axes.set_ylabel("share that waited no longer, %")
    axes.legend(loc="lower right")


def agents(axes: Axes, rows: Rows) -> None:
    """Draw the cost of a turn by the number of agents."""
    cases = {key[1]: int(key[1].split()[2].replace(",", "")) for key in rows if key[1].startswith("a turn, ")}
    names = dict.fromkeys(key[2] for key, row in rows.items() if key[1] in cases and row.thousands)
    for name, colour in zip(names, (COLOURS[1], COLOURS[0], *COLOURS[2:]), strict=False):
        cost = {size: 1_000 / (rows["agents", case, name].thousands or 1) for case, size in cases.items()}
        axes.plot(list(cost), list(cost.values()), marker="o", label=name, color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("number of agents")
    axes.set_ylabel("one turn, µs")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
