"""Command line ``etp-graph``: inspect, verify, prune, report and demo. The only module that prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from etp_graph import __version__
from etp_graph._config import require, require_choice
from etp_graph._text import si
from etp_graph.budget import Budget, allocate
from etp_graph.errors import BudgetError, CheckpointError, EtpError, ScoreError
from etp_graph.graph import trace
from etp_graph.model import copy_model
from etp_graph.plan import cost, cost_table
from etp_graph.plan.drawing import layers_text, svg
from etp_graph.report import write_report
from etp_graph.surgery import prune_
from etp_graph.verification import compare_outputs, verify

from ._imports import import_extension
from ._models import BuiltModel, build_model
from ._options import (
    Compensate,
    Criterion,
    Data,
    Debug,
    DemoData,
    Ignore,
    Imports,
    Kinds,
    KvTokens,
    MinUnits,
    Model,
    Outputs,
    RandomWeights,
    RemoveBlocks,
    RoundTo,
    Scope,
    Shapes,
    TargetValues,
    Threads,
    Uniform,
    criterion_names,
    parse_by_kind,
    parse_targets,
    with_targets,
)
from ._pruning import PruningRun, rank_of, with_amount

app = typer.Typer(
    name="etp-graph",
    help="Structured pruning of PyTorch models by Exponential Torque: smaller, faster, and proven equivalent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _friendly(*, threads: int | None, debug: bool, imports: Sequence[str] | None = None) -> Iterator[None]:
    """Set the number of threads and import ``imports``; turn an :class:`EtpError` into its message and exit code 1.

    With ``debug`` the error is raised, so that Python shows the traceback.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        for module in imports or ():
            import_extension(module)
        yield
    except EtpError as error:
        if debug:
            raise
        Console(stderr=True, highlight=False).print("[bold red]error:[/]", end=" ")
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"etp-graph {__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Structured pruning of PyTorch models by Exponential Torque: smaller, faster, and proven equivalent."""


@app.command()
def inspect(
    model: Model,
    input_shape: Shapes = None,
    ignore: Ignore = None,
    kind: Kinds = None,
    outputs: Outputs = None,
    imports: Imports = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file, as JSON.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer of every group instead.")] = False,
    svg_file: Annotated[Path | None, typer.Option("--svg", help="Draw all layers; needs graphviz.")] = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Print the plan of a model: which units can be removed together, and which groups are locked and why."""
    with _friendly(threads=threads, debug=debug, imports=imports):
        found = build_model(model, input_shapes=input_shape or ())
        plan = trace(found.model, found.inputs, prune=kind, ignore=ignore or (), outputs=outputs or None)
        typer.echo(layers_text(plan) if layers else str(plan))
        if svg_file is not None:
            _write(svg_file, svg(plan))
        if json_file is not None:
            _write(json_file, plan.to_json())


@app.command("verify")
def verify_command(
    model: Model,
    input_shape: Shapes = None,
    ignore: Ignore = None,
    kind: Kinds = None,
    outputs: Outputs = None,
    imports: Imports = None,
    seed: Annotated[int, typer.Option(help="Of the units removed and of the random weights.")] = 0,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Check on copies that the pruned model has the same outputs and gradients as the masked model."""
    with _friendly(threads=threads, debug=debug, imports=imports):
        found = build_model(model, input_shapes=input_shape or ())
        # check=False: the check in trace would lock a wrong group, and verify could not report it.
        plan = trace(found.model, found.inputs, prune=kind, ignore=ignore or (), outputs=outputs or None, check=False)
        result = verify(found.model, plan, found.inputs, seed=seed)
        typer.echo(f"{found.text}: {len(plan.prunable)} of {len(plan.groups)} groups prunable, inputs {found.shapes}")
        typer.echo(str(result))


@app.command()
@with_targets
def prune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pruned model.", show_default=False)],
    target: TargetValues = None,
    method: Criterion = None,
    scope: Scope = "global",
    uniform: Uniform = False,
    data: Data = None,
    compensate: Compensate = True,
    remove_blocks: RemoveBlocks = 0,
    round_to: RoundTo = None,
    min_units: MinUnits = None,
    kv_tokens: KvTokens = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the model, a safetensors file.")] = None,
    random_weights: RandomWeights = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model saved in --out.")] = False,
    input_shape: Shapes = None,
    ignore: Ignore = None,
    kind: Kinds = None,
    outputs: Outputs = None,
    imports: Imports = None,
    threads: Threads = None,
    debug: Debug = False,
    **targets: Any,
) -> None:
    """Prune a model once, check it against the masked model, and save it."""
    with _friendly(threads=threads, debug=debug, imports=imports):
        method = method or ("l2" if data is None else "fisher")
        require_choice("--method", method, criterion_names(data=data is not None), ScoreError)
        rules = {"round_to": parse_by_kind("--round-to", round_to or ()), "kv_tokens": kv_tokens,
                 "min_units": parse_by_kind("--min-units", min_units or ()), "rank": rank_of(method)}  # fmt: skip
        budget = _budget(targets, target or (), {"scope": scope, "uniform": uniform, **rules})
        found = build_model(model, input_shapes=input_shape or ())
        _set_weights(found, weights, random_weights=random_weights)
        run = PruningRun(found, out, data=data, plain=uniform and found.is_huggingface, overwrite=overwrite)
        dense, costs = copy_model(found.model), {}
        find: dict[str, Any] = {"prune": kind, "ignore": ignore or (), "outputs": outputs or None}
        if remove_blocks:
            first = trace(found.model, run.inputs, **find)
            budget, costs = with_amount(budget, first), {"dense": first.dense}
            typer.echo(run.remove_blocks(remove_blocks))
        plan = run.restrict(trace(found.model, run.inputs, **find))
        proof = verify(found.model, plan, run.inputs)
        scores = run.scores(method, plan)
        selection = allocate(found.model, plan, scores, budget=budget, example_inputs=run.inputs)
        pruned = cost(found.model, plan, selection)
        changed = run.compensate(dense, plan, selection) if compensate else ""
        whole = copy_model(found.model) if remove_blocks or changed else dense
        prune_(found.model, plan, selection)
        error = compare_outputs(found.model, whole, plan, selection, run.inputs)
        table = cost_table({**costs, "shorter" if remove_blocks else "dense": plan.dense, "pruned": pruned})
        saved = run.save()
        typer.echo(table if selection.latency is None else f"{table}\n\nlatency: {selection.latency}")
        typer.echo(f"\n{proof}; with these weights and this selection {error:.1e} ({si(selection.n_removed)} units)")
        typer.echo(changed + run.comparison(dense) + saved)


@app.command()
def demo(
    speed_up: Annotated[float, typer.Option("--speed-up", help="Dense MACs over pruned MACs.")] = 8.0,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Number of repetitions; default: 3, or 1 with --quick.")
    ] = None,
    data: Annotated[DemoData, typer.Option(help="digits need no download.")] = DemoData.DIGITS,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images and epochs.")] = False,
    validation: Annotated[
        bool, typer.Option("--validation", help="Measure on the validation images and do not read the test images.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for models, report and plots.")] = Path("etp-demo"),
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Compress one network with DepGraph, Torque and ETP from the same checkpoint, and compare the results."""
    # A second thread does not speed up training on 8x8 images, and slows it down on a busy machine.
    if threads is None and data is DemoData.DIGITS:
        threads = 1
    with _friendly(threads=threads, debug=debug):
        from etp_graph.demo import DemoConfig, run_demo

        Budget(speed_up=speed_up)  # raises BudgetError for a bad value before training
        config = DemoConfig.preset(data.value, quick=quick, speed_up=speed_up, seeds=seeds, validation=validation)
        run_demo(config, out, console=Console())


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What compress(checkpoint=DIR) or save wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("report.html"),
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write a report of a compression as one HTML file: metrics, costs, units that stayed, and norms."""
    with _friendly(threads=None, debug=debug, imports=imports):
        typer.echo(f"wrote {write_report(folder, out)}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf8")
    except OSError as error:
        raise EtpError(f"{path}: cannot be written ({error}). Check the folder and its permissions.") from error


def _budget(options: Mapping[str, float | None], texts: Sequence[str], rules: Mapping[str, Any]) -> Budget:
    """Return the budget of the options for built-in targets, of ``--target NAME=VALUE``, and of the rules."""
    given = {name: value for name, value in options.items() if value is not None}
    others = parse_targets(texts)
    twice = sorted(given.keys() & others.keys())
    names = ", ".join(f"--{name.replace('_', '-')}" for name in twice)
    require(not twice, f"found --target {', '.join(twice)} and {names}: give one of them.", BudgetError)
    return replace(
        Budget.of(None, given | others), **{name: value for name, value in rules.items() if value is not None}
    )


def _set_weights(found: BuiltModel, weights: Path | None, *, random_weights: bool) -> None:
    """Load the weights, or raise :class:`EtpError` if there are none and random ones were not asked for."""
    if weights is not None:
        _load_weights(found.model, weights)
        return
    require(
        random_weights or not found.random,
        f"{found.text} has random weights: give --weights FILE (safetensors), a folder that holds them, or "
        "--random-weights to prune them all the same.",
        EtpError,
    )
    if not found.is_huggingface:
        typer.echo("no --weights: the weights are those that the model was built with.", err=True)


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}). Nothing is downloaded: give a local file. Weights of "
            "another form become one with safetensors.torch.save_file."
        ) from error
    try:
        model.load_state_dict(loaded)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: these weights do not fit {type(model).__name__}: {error}") from error


if __name__ == "__main__":
    app()
