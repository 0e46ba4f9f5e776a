"""The pictures of a report: ratios to peers on a logarithmic scale; left of the line at 1 ours is slower."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from rsmodels.files import atomic_path

WIN, LOSS = "#2a7f62", "#b5402a"
PEER_COLOURS = ("#1f4e79", "#c77d0a", "#7a5195", "#5f6b6d", "#00808a", "#a3195b", "#8a8a00")
PASS_COLOURS = {"forward": "#1f4e79", "backward": "#c77d0a", "both": "#7a5195", "other": "#5f6b6d"}


def suite_chart(results: dict, suite: str, path: Path) -> None:
    """One line per case: a bar to the best peer, a dot for every peer."""
    rows = [row for row in results["suites"][suite]["cases"] if row.get("best_peer")]
    figure = Figure(figsize=(9.5, 1.6 + 0.24 * len(rows)))
    axes = figure.subplots()
    peers: dict[str, list[tuple[float, int]]] = {}
    for line, row in enumerate(rows):
        best = row["ratio"][row["best_peer"]]
        axes.barh(line, best - 1, left=1, height=0.6, color=WIN if best >= 1 else LOSS, alpha=0.35)
        for peer, ratio in row["ratio"].items():
            peers.setdefault(peer, []).append((ratio, line))
    for number, (peer, points) in enumerate(peers.items()):
        colour = PEER_COLOURS[number % len(PEER_COLOURS)]
        axes.scatter(*zip(*points, strict=True), s=16, color=colour, label=peer, zorder=3)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    _finish(axes, f"{suite}: times faster than each peer (bar: than the best)", results)
    if peers:
        figure.legend(loc="outside upper right", ncols=4, fontsize=7)
    _save(figure, path)


def overview_chart(results: dict, path: Path) -> None:
    """One line per suite, one dot per case against its best peer, coloured by pass."""
    suites = results["suites"]
    figure = Figure(figsize=(9, 1.8 + 0.55 * len(suites)))
    axes = figure.subplots()
    for number, (name, colour) in enumerate(PASS_COLOURS.items()):
        points = [
            (row["ratio"][row["best_peer"]], line + 0.18 * (number - 1.5))
            for line, suite in enumerate(suites.values())
            for row in suite["cases"]
            if row.get("best_peer") and _pass_of(row["case"]) == name
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, alpha=0.75, color=colour, label=name, zorder=3)
    axes.set_yticks(range(len(suites)), list(suites), fontsize=8)
    axes.set_ylim(-0.6, len(suites) - 0.4)
    _finish(axes, "times faster than the best peer, one dot per case", results)
    figure.legend(loc="outside upper right", ncols=4, fontsize=7)
    _save(figure, path)


def _pass_of(case: str) -> str:
    first = case.partition(",")[0]
    return first if first in PASS_COLOURS else "other"


def _finish(axes: Axes, label: str, results: dict) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.7), max(high, 1.5))
    axes.axvline(1, color="black", linewidth=0.9)
    axes.grid(axis="x", linewidth=0.3)
    axes.invert_yaxis()
    on = results["machine"]
    with_what = f"driver {on['driver']}" if "driver" in on else f"{on['threads']} threads"
    axes.set_xlabel(
        f"{label}\n{on['processor']}, {with_what}, torch {on['torch']}; medians of interleaved rounds",
        fontsize=8,
    )


def _save(figure: Figure, path: Path) -> None:
    figure.set_layout_engine("constrained")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80, pil_kwargs={"optimize": True})
