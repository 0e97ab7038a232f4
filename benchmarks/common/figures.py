"""Figures of the pages: metric against speed-up with error bars, MACs against measured latency, all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.contestant_names import CONTROLS, OURS, OURS_BEFORE, UNPRUNED
from benchmarks.common.records import Record
from benchmarks.common.statistics import Cell, Spread, cells

INK = "#6b7280"
STYLE: Any = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "savefig.transparent": True,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.18,
    "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "legend.frameon": False, "figure.constrained_layout.use": True, "svg.hashsalt": "etp-graph",
}  # fmt: skip
COLOURS = {"etp": "#2b6cb0", "torque": "#d98a2b", "tp-groupnorm": "#7a7f87", "depgraph": "#7a7f87"}
_ACROSS = 3
_OTHERS = ("#4c9a6a", "#a05195", "#d45087", "#8c6d46", "#3c8fa0", "#9aa03c", "#6a6ad0", "#b0602b")


def _colours(methods: Sequence[str]) -> dict[str, str]:
    known = dict(COLOURS) if OURS in methods else {**COLOURS, OURS_BEFORE: COLOURS[OURS]}
    rest = [method for method in methods if method not in known]
    return {**known, **{method: _OTHERS[i % len(_OTHERS)] for i, method in enumerate(rest)}}


def new_figure(*, columns: int = 1, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure without a window, so that it works on machines without a display, and its axes, row after row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns if columns > 1 else 6.4, 3.6 * rows), dpi=160)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=rows == 1).flat)


def _pruned(records: Sequence[Record]) -> dict[str, list[Cell]]:
    """The cells that have a network, by method."""
    found: dict[str, list[Cell]] = {}
    for cell in cells(records):
        if cell.ok and cell.method != "dense":
            found.setdefault(cell.method, []).append(cell)
    return found


def plot_curves(records: Sequence[Record], folder: Path, name: str) -> str | None:
    """The final metric against the speed-up that was reached; bars are standard deviations. The file's name."""
    import matplotlib as mpl

    methods = _pruned(records)
    if not methods:
        return None
    metric = records[0]["metric"]
    by, colours = (100.0 if metric["percent"] else 1.0), _colours(list(methods))
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_figure()
        ax.set_title(records[0]["title"])
        for method, own in methods.items():
            points = []
            for cell in sorted(own, key=lambda c: c.speed_up):
                x, y = cell.ratio("macs"), cell.stage("finetuned")
                if x is not None and y is not None:
                    points.append((x.mean, by * y.mean, by * (y.deviation or 0.0)))
            x_values, y_values, bars = zip(*points, strict=True)
            ax.errorbar(
                x_values, y_values, yerr=bars, marker="o", markersize=4, capsize=3, linewidth=1.5,
                color=colours[method], label=method, linestyle="-" if method in (OURS, OURS_BEFORE) else "--",
            )  # fmt: skip
        dense = next(record["test"]["dense"] for record in records if record["status"] == "ok")
        ax.axhline(by * dense, color=INK, linewidth=0.8, linestyle=":", label="checkpoint")
        ax.set_xlabel("dense over pruned MACs")
        ax.set_ylabel(metric["name"] + (", %" if metric["percent"] else ""))
        figure.legend(loc="outside right upper")
        figure.savefig(folder / f"{name}-curve.png", metadata={"Software": None})
    return f"{name}-curve.png"


def plot_latency(records: Sequence[Record], folder: Path, name: str) -> str | None:
    """The measured speed-up of every run against its MACs; on the line both are alike. The file's name."""
    import matplotlib as mpl

    methods = _pruned(records)
    if not methods:
        return None
    colours = _colours(list(methods))
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_figure()
        ax.set_title(f"{records[0]['title']}: MACs and latency")
        largest = 1.0
        for method, own in methods.items():
            runs = [record for cell in own for record in cell.ok]
            x = [record["macs"][0] / record["macs"][1] for record in runs]
            y = [record["latency"][0] / record["latency"][1] for record in runs]
            largest = max(largest, *x, *y)
            ax.scatter(x, y, s=18, color=colours[method], label=method)
        ax.plot([1, largest], [1, largest], color=INK, linewidth=0.8, linestyle=":")
        ax.set_xlabel("dense over pruned MACs")
        ax.set_ylabel("dense over pruned p50 latency")
        figure.legend(loc="outside right upper")
        figure.savefig(folder / f"{name}-latency.png", metadata={"Software": None})
    return f"{name}-latency.png"


def plot_overview(pages: Mapping[str, Sequence[Record]], folder: Path) -> str | None:
    """All methods of each task at its highest speed-up, the best above; bars are standard deviations. The file's name.

    Filled: methods. Hollow: controls. Dotted: the checkpoint; dashed: the same after as many steps without pruning.
    A task with a single seed is left out: nobody could see what of its order is chance.
    """
    import matplotlib as mpl

    shown = [records for records in pages.values() if _pruned(records) and _n_seeds(records) > 1]
    if not shown:
        return None
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, panels = new_figure(columns=_ACROSS, rows=-(-len(shown) // _ACROSS))
        for ax, records in zip(panels, shown, strict=False):
            _overview(ax, records)
        for ax in panels[len(shown) :]:
            ax.set_axis_off()
        figure.savefig(folder / "overview.png", metadata={"Software": None})
    return "overview.png"


def _n_seeds(records: Sequence[Record]) -> int:
    return len({record["config"]["seed"] for record in records})


def _overview(ax: Any, records: Sequence[Record]) -> None:
    found, metric = cells(records), records[0]["metric"]
    fastest = max(cell.speed_up for cell in found if cell.ok)
    by = 100.0 if metric["percent"] else 1.0
    points: list[tuple[str, Spread]] = []
    for cell in found:
        spread = cell.stage("finetuned") if cell.ok and cell.speed_up == fastest else None
        if spread is not None:
            points.append((cell.method, spread))
    points.sort(key=lambda point: point[1].mean, reverse=not metric["higher"])
    for y, (method, spread) in enumerate(points):
        colour, filled = COLOURS[OURS] if method in (OURS, OURS_BEFORE) else INK, method not in CONTROLS
        ax.errorbar(
            by * spread.mean, y, xerr=by * (spread.deviation or 0.0), color=colour, marker="o", markersize=5,
            markerfacecolor=colour if filled else "none", capsize=2, linewidth=1.2,
        )  # fmt: skip
    dense = Spread.of([record["test"]["dense"] for record in records if record["status"] == "ok"])
    if dense is not None:
        ax.axvline(by * dense.mean, color=INK, linewidth=0.8, linestyle=":")
    control = next((cell.stage("finetuned") for cell in found if cell.ok and cell.method == UNPRUNED), None)
    if control is not None:
        ax.axvline(by * control.mean, color=INK, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(points)), [method for method, _ in points])
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in (OURS, OURS_BEFORE) else "normal")
    ax.set_title(f"{records[0]['title'].partition(',')[0]}, {fastest:g}x")
    ax.set_xlabel(
        metric["name"] + (", %" if metric["percent"] else "") + ("" if metric["higher"] else " (less is better)")
    )
