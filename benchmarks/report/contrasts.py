"""Say what each part of `etp` earns: differences between two methods that differ in one thing, on every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import figures as plots
from benchmarks.common.markdown import as_row
from benchmarks.common.records import Record
from benchmarks.common.statistics import Cell, Difference, cells, paired


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Two methods that differ in one thing.

    Attributes:
        part: the thing.
        left, right: the methods; the difference is left minus right.
        what: what is the same, and what is not.
    """

    part: str
    left: str
    right: str
    what: str


CONTRASTS = (
    Contrast(
        part="the force", left="etp", right="etp-hard",
        what="units chosen by the same rule at the same times: pushed to zero, or set to zero when chosen",
    ),
    Contrast(
        part="its shape", left="etp", right="etp-uniform-force",
        what="units chosen by the same rule at the same times: an exponential or a uniform force",
    ),
    Contrast(
        part="the choice", left="etp-hard", right="l1-gradual",
        what="no force, the same share everywhere, at the same times: the units of `etp`, or those of the least norm",
    ),
    Contrast(
        part="the allocation", left="etp", right="etp-global",
        what="units of one score: every group loses the same share of them, or scores are compared across groups",
    ),
    Contrast(
        part="the force, with scores across groups", left="etp-global", right="etp-global-hard",
        what="as above, with `etp-global`",
    ),
    Contrast(
        part="its shape, with scores across groups", left="etp-global", right="etp-global-uniform-force",
        what="as above, with `etp-global`",
    ),
    Contrast(
        part="the choice across groups", left="etp-global-hard", right="l1-gradual",
        what="no force: the units of `etp-global`, or the same share everywhere by norm, at the same times",
    ),
    Contrast(
        part="the time", left="l1-gradual", right="l1-uniform",
        what="the same share everywhere by norm: in steps along the cubic schedule, or at once",
    ),
    Contrast(
        part="the effect on the loss", left="taylor-gradual", right="l1-gradual",
        what="no force, in steps: chosen by Taylor, or by norm",
    ),
)  # fmt: skip
"""What a reader needs to tell the parts of `etp` from each other."""

STAGES = {"pruned": "right after surgery", "finetuned": "fine-tuned"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A contrast on one task at one speed-up.

    Attributes:
        contrast: what is compared.
        task: title of the task.
        speed_up: dense over pruned MACs.
        stage: ``pruned`` or ``finetuned``.
        gain: left minus right, turned so that positive means that the left one is better; of metrics in percent in
            points, of others relative to the right one, in percent.
    """

    contrast: Contrast
    task: str
    speed_up: float
    stage: str
    gain: Difference


def effects(pages: Mapping[str, Sequence[Record]]) -> list[Effect]:
    """Every contrast on every task and speed-up with three common seeds or more."""
    found = []
    for contrast in CONTRASTS:
        for records in pages.values():
            metric = records[0]["metric"]
            ok = {(cell.method, cell.speed_up): cell for cell in cells(records) if cell.ok}
            for (method, speed_up), left in ok.items():
                right = ok.get((contrast.right, speed_up))
                if method != contrast.left or right is None:
                    continue
                for stage in STAGES:
                    gain = _gain(left, right, stage, metric)
                    if gain is not None:
                        found.append(Effect(
                            contrast=contrast, task=records[0]["title"], speed_up=speed_up, stage=stage, gain=gain,
                        ))  # fmt: skip
    return found


def _gain(left: Cell, right: Cell, stage: str, metric: Mapping[str, Any]) -> Difference | None:
    """Left minus right after a stage, in points or percent, positive towards the better side."""
    values, others = left.by_seed(stage), right.by_seed(stage)
    sign = 1 if metric["higher"] else -1
    if metric["percent"]:
        return paired(
            {seed: 100 * sign * value for seed, value in values.items()},
            {seed: 100 * sign * value for seed, value in others.items()}, higher=True,
        )  # fmt: skip
    both = values.keys() & others.keys()
    return paired(
        {seed: 100 * sign * (values[seed] / others[seed] - 1) for seed in both}, dict.fromkeys(both, 0.0), higher=True
    )


def table(found: Sequence[Effect]) -> list[str]:
    """The effects as a table, contrast after contrast."""
    columns = ("part", "task", "speed-up", "right after surgery", "fine-tuned", "seeds")
    lines = [as_row(columns), "| --- | --- | ---: | --- | --- | ---: |"]
    rows: dict[tuple[str, str, float], dict[str, Effect]] = {}
    for effect in found:
        rows.setdefault((effect.contrast.part, effect.task, effect.speed_up), {})[effect.stage] = effect
    for (part, task, speed_up), stages in rows.items():
        shown = [_text(stages.get(stage)) for stage in STAGES]
        lines.append(as_row((part, task, f"{speed_up:g}x", *shown, str(max(one.gain.n for one in stages.values())))))
    return lines


def _text(effect: Effect | None) -> str:
    return "-" if effect is None else f"{effect.gain.text()}, {effect.gain.mark}"


def plot(found: Sequence[Effect], folder: Path) -> str | None:
    """Draw the effects after both stages with their intervals, a panel for each contrast. The file's name."""
    import matplotlib as mpl

    shown = [contrast for contrast in CONTRASTS if any(effect.contrast is contrast for effect in found)]
    if not shown:
        return None
    with mpl.rc_context({**plots.STYLE, "axes.grid.axis": "x"}):
        figure, panels = plots.new_figure(columns=min(3, len(shown)), rows=-(-len(shown) // 3))
        for ax, contrast in zip(panels, shown, strict=False):
            _panel(ax, [effect for effect in found if effect.contrast is contrast], contrast)
        for ax in panels[len(shown) :]:
            ax.set_axis_off()
        figure.savefig(folder / "contrasts.png", metadata={"Software": None})
    return "contrasts.png"


def _panel(ax: Any, effects: Sequence[Effect], contrast: Contrast) -> None:
    names = list(dict.fromkeys(f"{effect.task.partition(' on ')[0]}, {effect.speed_up:g}x" for effect in effects))
    for effect in effects:
        y = names.index(f"{effect.task.partition(' on ')[0]}, {effect.speed_up:g}x")
        last = effect.stage == "finetuned"
        colour = plots.COLOURS["etp"] if last else plots.INK
        ax.errorbar(
            effect.gain.mean, y + (0.12 if last else -0.12), xerr=effect.gain.half_width, color=colour, marker="o",
            markersize=4, markerfacecolor=colour if last else "none", capsize=2, linewidth=1.2,
        )  # fmt: skip
    ax.axvline(0, color=plots.INK, linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_title(f"{contrast.part}: {contrast.left} - {contrast.right}")
    ax.set_xlabel("gain, points or %")
