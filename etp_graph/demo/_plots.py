"""Two plots: accuracy against speed-up, and unit norms against distance during the sparse phase."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from etp_graph.errors import EtpError

from ._results import LABELS, DemoResult, GroupNorms, MethodName, Point

COLOURS: dict[MethodName, str] = {"depgraph": "#7a7f87", "torque": "#d98a2b", "etp": "#2b6cb0"}

_INK = "#6b7280"  # legible on white and on black pages

_STYLE: Any = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "savefig.transparent": True,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _INK, "grid.alpha": 0.18,
    "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "legend.frameon": False, "font.family": "DejaVu Sans", "figure.constrained_layout.use": True,
}  # fmt: skip


def require_matplotlib() -> None:
    """Raise :class:`EtpError` with the command to install matplotlib if it cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise EtpError('the plots need matplotlib: pip install "etp-graph[demo]".') from error


def _figure(columns: int, width: float) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, drawn without a window, so that no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.2), dpi=160)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])


def plot_curve(result: DemoResult, out: Path) -> str | None:
    """Plot accuracy against speed-up, right after surgery and after a few epochs of fine-tuning.

    Returns:
        The file name in ``out``; ``None`` if no outcome has a curve.
    """
    import matplotlib as mpl

    methods = [m for m in result.config.methods if any(o.curve for o in result.of(m))]
    if not methods:
        return None
    epochs = result.config.recipe.curve_epochs
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2, 7.4)
        titles = ("right after surgery", f"after {epochs} epoch{'s' if epochs != 1 else ''} of fine-tuning")
        for ax, stage, title in zip(axes, ("pruned", "finetuned"), titles, strict=True):
            for method in methods:
                _draw_curve(ax, result, method, stage)
            dense = 100 * statistics.fmean(o.dense for o in result.outcomes)
            ax.axhline(dense, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.annotate("dense", (0.99, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
            ax.set_xscale("log", base=2)
            ticks = result.config.recipe.curve
            ax.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
            ax.set_title(title)
            ax.set_xlabel("speed-up (MACs)")
        axes[0].set_ylabel("test accuracy, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
        figure.savefig(out / "accuracy-against-speed-up.png")
    return "accuracy-against-speed-up.png"


def _draw_curve(ax: Any, result: DemoResult, method: MethodName, stage: str) -> None:
    by_target: dict[float, list[Point]] = {}
    for outcome in result.of(method):
        for point in outcome.curve:
            by_target.setdefault(point.speed_up, []).append(point)
    x = sorted(by_target)
    values = [[100 * getattr(point, stage) for point in by_target[s]] for s in x]
    mean = [statistics.fmean(v) for v in values]
    colour = COLOURS.get(method, _INK)
    ax.plot(x, mean, marker="o", markersize=4, linewidth=1.8, color=colour, label=LABELS[method])
    if any(len(v) > 1 for v in values):
        ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0)


def plot_norms(result: DemoResult, out: Path) -> str | None:
    """Plot the norm of each unit against its distance from the pivot, at several epochs of the first seed.

    Source: ETP (Modi et al. 2025), figure 3.

    Returns:
        The file name in ``out``; ``None`` if no outcome has norms.
    """
    import matplotlib as mpl

    found: dict[MethodName, tuple[GroupNorms, ...]] = {
        m: runs[0].norms for m in result.config.methods if (runs := result.of(m)) and runs[0].norms
    }
    if not found:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(len(found), 3.7 * len(found))
        for ax, (method, snapshots) in zip(axes, found.items(), strict=True):
            for number, snapshot in enumerate(snapshots):
                order = sorted(range(len(snapshot.norm)), key=lambda i, s=snapshot: s.distance[i])  # type: ignore[misc]
                alpha = 0.25 + 0.75 * number / max(len(snapshots) - 1, 1)
                ax.plot(
                    [snapshot.distance[i] for i in order], [snapshot.norm[i] for i in order], marker="o",
                    markersize=3, linewidth=0.6, color=COLOURS.get(method, _INK), alpha=alpha,
                    label=f"epoch {snapshot.epoch}",
                )  # fmt: skip
            ax.set_title(f"{LABELS[method]}: {snapshots[0].group}, {len(snapshots[0].norm)} units")
            ax.set_xlabel("distance from the pivot")
            ax.legend(loc="upper center", ncols=len(snapshots), columnspacing=1.0, handlelength=1.2)
        axes[0].set_ylabel("norm of the unit")
        top = max(max(snapshot.norm) for snapshots in found.values() for snapshot in snapshots)
        axes[0].set_ylim(0, 1.22 * top)  # room for the legends
        figure.savefig(out / "norms-against-distance.png")
    return "norms-against-distance.png"
