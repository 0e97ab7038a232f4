"""Table, report and JSON results of the demo."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from etp_graph._text import si
from etp_graph.errors import EtpError

from ._results import LABELS, DemoConfig, DemoResult, MethodOutcome

COLUMNS = ("method", "before surgery", "right after", "fine-tuned", "params", "MACs", "speed-up", "p50 latency")

_WEIGHTS = {
    "digits": "a small residual network, trained on scikit-learn's digits",
    "cifar10": "ResNet-20 with its published CIFAR-10 weights",
}


def rows(result: DemoResult) -> list[tuple[str, ...]]:
    """Return the cells of :data:`COLUMNS` for the checkpoint and for each method.

    Accuracies are in percent, as mean ± standard deviation over the seeds.
    """
    checkpoint = _percent(result.of(result.config.methods[0]), lambda o: o.dense)
    found: list[tuple[str, ...]] = [
        ("dense", checkpoint, "-", "-", si(result.params), si(result.macs), "1.00x", "1.00x")
    ]
    for method in result.config.methods:
        runs = result.of(method)
        cut = method != "dense"
        found.append((
            LABELS[method],
            _percent(runs, lambda o: o.sparse),
            _percent(runs, lambda o: o.pruned) if cut else "-",
            _percent(runs, lambda o: o.finetuned),
            si(round(_mean(runs, lambda o: o.params))),
            si(round(_mean(runs, lambda o: o.macs))),
            f"{_mean(runs, lambda o: o.speed_up):.2f}x",
            f"{_mean(runs, lambda o: o.latency_ratio):.2f}x",
        ))  # fmt: skip
    return found


def table(result: DemoResult) -> Table:
    """Return the comparison as a table for a terminal."""
    config = result.config
    seeds = f"{config.seeds} seed{'s' if config.seeds > 1 else ''}"
    shown = Table(
        title=f"{config.data}: {_part(config)} accuracy in % at {config.speed_up:g}x fewer MACs, {seeds}",
        box=SIMPLE_HEAD, title_style="bold", title_justify="left", show_edge=False, padding=0,
    )  # fmt: skip
    for column in COLUMNS:
        # Two-line headers, so that the table fits into 80 columns.
        shown.add_column(column.replace(" ", "\n"), justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows(result):
        shown.add_row(*row, style="bold" if row[0] == LABELS["etp"] else None)
    return shown


def write_report(result: DemoResult, out: Path) -> None:
    """Write ``report.md``, ``results.json`` and the plots to the folder ``out``.

    Raises:
        EtpError: a file cannot be written, or matplotlib is missing.
    """
    from ._plots import plot_curve, plot_norms

    try:
        (out / "results.json").write_text(json.dumps(as_dict(result), indent=1), encoding="utf8")
        figures = [plot_curve(result, out), plot_norms(result, out)]
        (out / "report.md").write_text(markdown(result, [f for f in figures if f is not None]), encoding="utf8")
    except OSError as error:
        raise EtpError(f"{out}: cannot be written ({error}). Check space and permissions there.") from error


def as_dict(result: DemoResult) -> dict[str, object]:
    """Return every number of the run as JSON-compatible values."""
    config = asdict(result.config)
    config["recipe"] |= {"strengths": dict(result.config.recipe.strengths)}
    return {
        "command": result.config.command,
        "config": config,
        "environment": result.environment,
        "seconds": result.seconds,
        "dense": {"macs": result.macs, "params": result.params},
        "outcomes": [asdict(outcome) for outcome in result.outcomes],
    }


def markdown(result: DemoResult, figures: Sequence[str]) -> str:
    """Return the report as Markdown text."""
    config, recipe = result.config, result.config.recipe
    lines = [
        f"# {config.data}: the same checkpoint, {config.speed_up:g} times fewer multiply-adds",
        "",
        f"`{config.command}`, {result.seconds:.0f} s.",
        "",
        _line(COLUMNS),
        "|---|" + "---:|" * (len(COLUMNS) - 1),
        *(_line(row) for row in rows(result)),
        "",
        *_explanation(result),
        "",
    ]
    for name in figures:
        lines += [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})", ""]
    strengths = ", ".join(f"{name} {value:g}" for name, value in recipe.strengths.items())
    lines += [
        "## How it was run",
        "",
        f"- Start: {_WEIGHTS[config.data]}; {si(result.macs)} MACs, {si(result.params)} parameters.",
        f"- Every method: {recipe.sparse_epochs} + {recipe.finetune_epochs} epochs of the same images in the same "
        f"order, batches of {recipe.batch_size}, learning rates up to {recipe.sparse_lr:g} and {recipe.finetune_lr:g}.",
        f"- Strengths (fixed before the test images were read, on validation images): {strengths or 'none'}. That of "
        "ETP follows from the target.",
        *(f"- {name}: {value}" for name, value in result.environment.items()),
        "",
        "Models are in the folders `<method>-seed<k>`; `etp_graph.load(folder, build=...)` reads them. Those of "
        "DepGraph were cut by Torch-Pruning and load into a network of the same widths only.",
        "",
    ]
    return "\n".join(lines)


def _explanation(result: DemoResult) -> list[str]:
    seeds = result.config.seeds
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    config = result.config
    return [
        f"{_part(config).capitalize()} accuracy in percent, {spread}: before surgery (after sparse training), right "
        "after surgery, and after fine-tuning. MACs are counted by forward hooks on convolutions and linear layers, "
        f"alike for all methods. p50 latency: median of {config.latency_rounds} forwards of {config.latency_batch} "
        "images, dense over pruned, the models taking turns in one run.",
        "",
        "*dense* is the checkpoint that all methods begin with; *dense control* is never cut and trains for the same "
        "epochs; *random units* is cut at once and trains all of its epochs afterwards; *DepGraph* is Torch-Pruning's "
        "own pruner, importance and regularizer. Bands in the plot show the range over the seeds. Each point of "
        f"a curve has {config.recipe.curve_epochs} epochs of fine-tuning, and ETP's a sparse phase of its own; "
        "the others have one sparse phase, whose network is cut to each.",
    ]


def _part(config: DemoConfig) -> str:
    return "validation" if config.validation else "test"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(runs: Sequence[MethodOutcome], value: Callable[[MethodOutcome], float]) -> float:
    return statistics.fmean(value(run) for run in runs)


def _percent(runs: Sequence[MethodOutcome], value: Callable[[MethodOutcome], float]) -> str:
    values = [100 * value(run) for run in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"
