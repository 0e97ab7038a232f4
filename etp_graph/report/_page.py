"""Report of a compression as one HTML file, without scripts or references to other files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from etp_graph._text import percent
from etp_graph.errors import EtpError
from etp_graph.plan import LatencyFit, Quantity, described_quantity

from ._html import Html, bar, element, joined, line_chart, scatter, style, table
from ._story import MeasuredStage, NormHistogram, ReportData, Width, read_report_data

_LETTERS = {"dense": "d", "sparse": "s", "pruned": "p", "finetuned": "f"}

_KEY = "d: dense, s: after sparse training, p: right after surgery, f: after fine-tuning."


def write_report(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the report of a folder that ``compress(checkpoint=...)`` or :func:`etp_graph.save` wrote.

    Args:
        folder: the folder.
        out: the HTML file to write.

    Returns:
        The path of the HTML file.

    Raises:
        CheckpointError: the folder holds neither a run nor a saved model, or is damaged.
        EtpError: the file cannot be written.
    """
    text, file = page(read_report_data(folder)), Path(out)
    try:
        file.write_text(text, encoding="utf8", errors="backslashreplace")  # a path need not be UTF-8
    except (OSError, ValueError) as error:
        raise EtpError(f"{file}: cannot be written ({error}). Check the folder and its permissions.") from error
    return file


def page(story: ReportData) -> str:
    """Return the text of the HTML file."""
    sections = [
        *_summary(story),
        *_stages(story),
        *_widths(story.widths),
        *_latency(story.latency),
        *_norms(story),
        *_facts(story),
    ]
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", story.title),
        style(),
    )
    body = element("body", element("main", element("h1", story.title), *sections))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _summary(story: ReportData) -> Iterator[Html]:
    if story.unfinished:
        yield element("p", "This run is not finished: it shows the steps that are.", role="status")
    if not story.stages:
        return
    first, last = story.stages[0], story.stages[-1]
    tiles = [("metric, dense", _metric(first)), (f"metric, {last.name}", _metric(last))]
    tiles += [
        (_tile_title(quantity), _relation(quantity, first, last))
        for quantity in _counted(story.stages) if first.amounts.get(quantity.name) and last.amounts.get(quantity.name)
    ]  # fmt: skip
    units = [(width.before, width.after) for width in story.widths if not width.locked]
    if units and len(story.stages) > 1:
        tiles.append(("units removed", f"{sum(b - a for b, a in units):,} of {sum(b for b, _ in units):,}"))
    boxes = [element("div", element("dt", name), element("dd", value)) for name, value in tiles]
    yield element("dl", *boxes, class_="tiles")


def _metric(stage: MeasuredStage) -> str:
    if stage.metric is None:
        return "-"
    return f"{stage.metric:#.4g}" if 1e-3 <= abs(stage.metric) < 1e4 else f"{stage.metric:.4g}"


def _stages(story: ReportData) -> Iterator[Html]:
    stages = story.stages
    if not stages:
        return
    dense, quantities = stages[0], _counted(stages)
    rows = [
        (
            stage.name, _metric(stage),
            *(cell for each in quantities for cell in (_amount(each, stage), _relation(each, dense, stage))),
            "-" if stage.seconds is None else f"{stage.seconds:.1f}",
        )
        for stage in stages
    ]  # fmt: skip
    titles = [title for quantity in quantities for title in (quantity.words, quantity.ratio_title or "share")]
    yield element("h2", "Before and after")
    yield table(("stage", "metric", *titles, "seconds"), rows)
    yield element(
        "p",
        "The metric is what evaluate returned. MACs are predicted from the plan, for one forward with the example "
        "inputs. The speed-up is their ratio, not a measured time.",
        class_="soft",
    )
    letters = [_LETTERS.get(stage.name.partition(" ")[0], "?") for stage in stages]
    charts = []
    metrics = [stage.metric for stage in stages if stage.metric is not None]
    if len(metrics) == len(stages) > 1:
        charts.append(line_chart(letters, metrics, caption="metric"))
    for quantity in (each for each in quantities if each.name != "params"):
        amounts = [float(stage.amounts[quantity.name]) for stage in stages if quantity.name in stage.amounts]
        if len(amounts) == len(stages) > 1:
            charts.append(line_chart(letters, amounts, caption=f"{quantity.words}, predicted", zero=True))
    if charts:
        yield element("div", *charts, class_="charts")
        yield element("p", _KEY, class_="soft")


def _counted(stages: Sequence[MeasuredStage]) -> list[Quantity]:
    """Return the quantities that a stage counts, MACs and parameters first."""
    names = dict.fromkeys(["macs", "params", *(name for stage in stages for name in stage.amounts)])
    return [described_quantity(name) for name in names]


def _tile_title(quantity: Quantity) -> str:
    return f"{quantity.ratio_title} ({quantity.words})" if quantity.ratio_title else f"{quantity.words} left"


def _amount(quantity: Quantity, stage: MeasuredStage) -> str:
    amount = stage.amounts.get(quantity.name)
    return "-" if amount is None else quantity.write(amount)


def _relation(quantity: Quantity, dense: MeasuredStage, stage: MeasuredStage) -> str:
    """Return the ratio of the dense amount to that of the stage, or the share that is left; "-" if one is unknown."""
    whole, amount = dense.amounts.get(quantity.name), stage.amounts.get(quantity.name)
    if not whole or not amount:
        return "-"
    return f"{whole / amount:.2f}x" if quantity.ratio_title else percent(amount, whole)


def _widths(widths: Sequence[Width]) -> Iterator[Html]:
    if not widths:
        return
    yield element("h2", "The network")
    order = "execution" if any(width.kind for width in widths) else "the plan"
    text = f"One bar for each group of units, in the order of {order}. A bar is as wide as its units, and filled as far"
    yield element("p", f"{text} as they stayed.", class_="soft")
    widest = max(width.before for width in widths)
    rows = []
    for width in widths:
        words = f"{width.after} of {width.before} {width.kind or 'units'}{', locked' if width.locked else ''}"
        said = element("span", element("b", width.name), element("i", words, **_tip(width)))
        rows.append(element("li", said, bar(width.before, width.after, widest, label=f"{width.name}: {words}")))
    yield element("ol", *rows, class_="widths")


def _latency(fit: LatencyFit | None) -> Iterator[Html]:
    if fit is None:
        return
    yield element("h2", "Latency by layer")
    yield element("p", f"The whole model, median of forwards with the example inputs: {fit}.")
    if not fit.layers:
        return
    yield element(
        "p",
        "Each layer by itself, timed at several sizes and interpolated: the track is the dense layer, the filled part "
        "what is left of it. Their sums lack what happens between the layers.",
        class_="soft",
    )
    slowest = max(dense for dense, _ in fit.layers.values())
    rows = []
    for name, (dense, pruned) in fit.layers.items():
        words = f"{pruned:.3g} of {dense:.3g} ms"
        said = element("span", element("b", name), element("i", words))
        rows.append(element("li", said, bar(dense, min(pruned, dense), slowest, label=f"{name}: {words}")))
    yield element("ol", *rows, class_="widths")


def _tip(width: Width) -> dict[str, object]:
    return {"title": width.locked} if width.locked else {}


def _norms(story: ReportData) -> Iterator[Html]:
    if not story.norms:
        return
    yield element("h2", "Norm against distance")
    yield element(
        "p",
        "Each point is a unit at the end of sparse training: its distance from the pivot of its group, and its norm "
        "over all weights that it owns. Filled points stayed, rings were removed. A force that was strong enough "
        "leaves rings at zero.",
        class_="soft",
    )
    for number, groups in story.norms.items():
        if len(story.norms) > 1:
            yield element("h3", f"Round {number}")
        charts = [scatter(each.distance, each.norm, each.kept, caption=_caption(each)) for each in groups]
        yield element("div", *charts, class_="charts")


def _caption(norms: NormHistogram) -> str:
    shown = len(norms.norm)
    return norms.name if shown == norms.units else f"{norms.name}, {shown} of {norms.units} units"


def _facts(story: ReportData) -> Iterator[Html]:
    if story.facts:
        rows = [joined((element("dt", name), element("dd", value))) for name, value in story.facts.items()]
        yield element("details", element("summary", "Settings and versions"), element("dl", *rows, class_="facts"))
