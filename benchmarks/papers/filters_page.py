"""Draw the papers' figures on filters, and write their page, from the lines of ``paper-figures``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import figures as plots
from benchmarks.common.markdown import as_row
from benchmarks.common.records import Record
from benchmarks.papers.norms_figure import DISTANCES, OF_UNITS

LAYER = 14
"""The convolution that Torque's figure 5 shows, from 1."""
NAME = "paper-figures"
DEAD = 1e-3
"""A filter counts as zero below this share of the mean of its network's filters without any force."""
_SHORT = 0.02
"""A curve is said to hold as long as the accuracy right after surgery is at most this below that before."""

_HEAD = """# The papers' figures

This record repeats the figures of the papers on ETP and Torque that show what becomes of filters. {title}
is trained from random weights for {steps:,} steps under each force. Nothing is fine-tuned.

- Measure: `python -m benchmarks paper-figures`. One seed.
- Results: `benchmarks/results/paper-figures.jsonl`.

## Findings

{findings}

## Limits

- The network is narrower and its training shorter than in the papers (200 epochs). Every strength is multiplied so that
  the whole pull on a weight over the training is the published one. The pull of a single step is therefore stronger.
- ETP states no strength: here it has the push of Torque's largest (see `benchmarks/contest/strength.py`). λ is
  exp(5 / (N - 1)) for N filters.
- One seed. The test images are read for each point of a curve; nothing is chosen by them.
- `python -m benchmarks reproduce figure3 --task TASK` draws the norms of two filters for other tasks.

## Accuracy without fine-tuning (Torque, figure 2)

{curve_table}

![Accuracy right after surgery]({images}/{name}-curve.png)

*Filters of the least mean weight go, by one threshold for all layers, of which each keeps five; with Network Slimming
channels of the smallest scale go.*

## Norms of filters (Torque, figure 4)

![Histogram of filter norms]({images}/{name}-norms.png)

*The mean absolute weight of all filters, divided by the mean over the network without force.*

## Which filters survive (Torque, figure 5)

![Filters of one layer]({images}/{name}-survivors.png)

*Convolution {layer}: the mean absolute weight of each filter by its index, over the largest of its network.*

## Two filters over the training (ETP, figures 1 and 3)

![Norms over the steps]({images}/{name}-training.png)

*The filters at the distances 150 and 254 of 256, or at the same share of the way in a narrower layer. The paper has
.134 at the end under Torque at 254, and 0 under ETP.*

## How it was run

{conditions}
"""


def write(records: Sequence[Record], out: Path) -> list[Path]:
    """Write the page and its figures; what was written."""
    if not records:
        return []
    (out / "images").mkdir(parents=True, exist_ok=True)
    drawn = [
        _draw(records, out, "curve", _curve), _draw(records, out, "norms", _norms),
        _draw(records, out, "survivors", _survivors, columns=len(records)),
        _draw(records, out, "training", _training, columns=2),
    ]  # fmt: skip
    path = out / f"{NAME}.md"
    path.write_text(page(records), encoding="utf8")
    return [*drawn, path]


def page(records: Sequence[Record]) -> str:
    """The page, a pure function of the lines."""
    first = records[0]
    return _HEAD.format(
        title=first["title"], steps=first["config"]["steps"], findings="\n".join(_findings(records)), images="images",
        name=NAME, layer=LAYER, curve_table="\n".join(_table(records)), conditions="\n".join(_conditions(records)),
    )  # fmt: skip


def _findings(records: Sequence[Record]) -> list[str]:
    lines = []
    plain = next((one for one in records if one["published"] is None and one["strength"] is None), None)
    for record in records:
        held = [share for share, accuracy in record["curve"] if accuracy >= record["accuracy"] - _SHORT]
        zero = "" if plain is None else f" {100 * _dead(record, plain):.0f} % of its filters are zero."
        shown = f"{100 * max(held):.0f} % of the parameters" if held else "less than a tenth of the parameters"
        lines.append(
            f"- {record['config']['force']}: {100 * record['accuracy']:.1f} % before surgery; {shown} can go for at "
            f"most {100 * _SHORT:.0f} points.{zero}"
        )
    return lines


def _dead(record: Record, plain: Record) -> float:
    every = [value for layer in record["filters"] for value in layer]
    usual = [value for layer in plain["filters"] for value in layer]
    return sum(value < DEAD * sum(usual) / len(usual) for value in every) / len(every)


def _table(records: Sequence[Record]) -> list[str]:
    columns = ("force", "strength here", "before surgery", "removed: accuracy right after")
    lines = [as_row(columns), "| --- | ---: | ---: | --- |"]
    for record in records:
        points = "; ".join(f"{100 * share:.0f} %: {100 * accuracy:.1f}" for share, accuracy in record["curve"])
        strength = "-" if record["strength"] is None else f"{record['strength']:.2g}"
        lines.append(as_row((record["config"]["force"], strength, f"{100 * record['accuracy']:.1f}", points)))
    return lines


def _conditions(records: Sequence[Record]) -> list[str]:
    lines = [
        f"- {sum(record['seconds'] for record in records) / 60:.0f} minutes in all.",
        "- SGD with Nesterov momentum 0.9 and weight decay 1e-4, batches of 128, one cycle of the learning rate up to "
        "0.05, flips and crops, bfloat16 autocast where the processor has it. Networks are evaluated in float32.",
    ]
    facts = [{**record["conditions"], "commit": record["commit"]} for record in records]
    return lines + [f"- {name}: {', '.join(dict.fromkeys(one.get(name, '-') for one in facts))}" for name in facts[0]]


def _draw(
    records: Sequence[Record], out: Path, kind: str, draw: Callable[[Sequence[Any], Sequence[Record]], None],
    *, columns: int = 1,
) -> Path:  # fmt: skip
    import matplotlib as mpl

    with mpl.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(columns=min(columns, 3), rows=-(-columns // 3))
        draw(axes, records)
        path = out / "images" / f"{NAME}-{kind}.png"
        figure.savefig(path, metadata={"Software": None})
    return path


def _curve(axes: Sequence[Any], records: Sequence[Record]) -> None:
    for record in records:
        points = [(0.0, record["accuracy"]), *record["curve"]]
        shares, accuracies = zip(*points, strict=True)
        axes[0].plot(
            [100 * share for share in shares], [100 * value for value in accuracies], marker="o", markersize=3,
            linewidth=1.4, label=record["config"]["force"],
        )  # fmt: skip
    axes[0].set_xlabel("parameters removed, %")
    axes[0].set_ylabel("accuracy without fine-tuning, %")
    axes[0].legend()


def _norms(axes: Sequence[Any], records: Sequence[Record]) -> None:
    plain = [value for layer in records[0]["filters"] for value in layer]
    mean = sum(plain) / len(plain)
    bins = [0.1 * number for number in range(26)]
    for record in records:
        every = [min(value / mean, 2.5) for layer in record["filters"] for value in layer]
        axes[0].hist(every, bins=bins, histtype="step", linewidth=1.4, label=record["config"]["force"])
    axes[0].set_yscale("symlog")
    axes[0].set_xlabel("mean absolute weight of a filter, relative")
    axes[0].set_ylabel("filters")
    axes[0].legend()


def _survivors(axes: Sequence[Any], records: Sequence[Record]) -> None:
    for ax, record in zip(axes, records, strict=False):
        layer = record["filters"][min(LAYER, len(record["filters"])) - 1]
        largest = max(*layer, 1e-12)
        ax.bar(range(len(layer)), [value / largest for value in layer], width=1.0, color=plots.COLOURS["etp"])
        ax.set_title(record["config"]["force"])
        ax.set_xlabel("filter")
    for ax in axes[len(records) :]:
        ax.set_axis_off()


def _training(axes: Sequence[Any], records: Sequence[Record]) -> None:
    for number, (ax, distance) in enumerate(zip(axes, DISTANCES, strict=True)):
        for record in records:
            steps = [record["every"] * look for look in range(len(record["norms"]))]
            ax.plot(steps, [look[number] for look in record["norms"]], linewidth=1.2, label=record["config"]["force"])
        ax.set_title(f"the filter at the distance {distance} of {OF_UNITS}")
        ax.set_xlabel("step")
    axes[0].set_ylabel("norm of the filter")
    axes[0].legend()
