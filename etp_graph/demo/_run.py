"""Demo: compare several methods over several seeds, and write models, a report and plots to a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from etp_graph.checkpoint import save
from etp_graph.demo.zoo.data import CLASSES, Split, cifar10, digits, load_weights
from etp_graph.demo.zoo.machine import machine_record
from etp_graph.demo.zoo.models import SmallResNet, resnet20
from etp_graph.demo.zoo.training import Augment, crop_flip
from etp_graph.errors import EtpError
from etp_graph.latency import benchmark

from ._contest import Contest
from ._results import DemoConfig, DemoResult, MethodOutcome


def run_demo(config: DemoConfig, out: Path, *, console: Console | None = None) -> DemoResult:
    """Run the comparison, print its table, and write models, ``report.md``, ``results.json`` and plots to ``out``.

    Args:
        config: the configuration; :meth:`DemoConfig.preset` returns the documented defaults.
        out: the output folder. Models that an earlier run wrote to it are replaced.
        console: console for the table and the progress bars; default: print nothing.

    Raises:
        EtpError: data or an optional library is missing (the message says what to install), the folder cannot be
            written, or the speed-up is out of reach.
    """
    from ._plots import require_matplotlib
    from ._report import table, write_report

    start = perf_counter()
    require_matplotlib()  # fail now, and not after training
    _make_folder(out)
    split, build, augment = _task(config)
    if config.validation:
        split = replace(split, test_x=split.val_x, test_y=split.val_y)
    outcomes: list[MethodOutcome] = []
    macs = params = 0
    with _progress(console, _epochs(config)) as tick:
        for seed in range(config.seeds):
            contest = Contest(
                build, split, config.recipe, speed_up=config.speed_up, seed=seed, augment=augment,
                tick=partial(_labelled, tick, f"seed {seed + 1}/{config.seeds}"),
            )  # fmt: skip
            macs, params = contest.macs, sum(p.numel() for p in contest.checkpoint.parameters())
            outcomes += _one_seed(config, contest, out)
    result = DemoResult(
        config=config, outcomes=tuple(outcomes), macs=macs, params=params, seconds=perf_counter() - start,
        environment=_environment(),
    )  # fmt: skip
    write_report(result, out)
    if console is not None:
        console.print(table(result))
        console.print(
            f"{result.seconds:.0f} s; models, report.md, results.json and plots are in {out}/", soft_wrap=True
        )
    return result


def _one_seed(config: DemoConfig, contest: Contest, out: Path) -> list[MethodOutcome]:
    """Run every method on the checkpoint of one seed, then measure the latency of all models together."""
    found: list[MethodOutcome] = []
    models = [contest.checkpoint]
    for method in config.methods:
        outcome, model = contest.run(method)
        save(model, out / f"{method}-seed{contest.seed}", overwrite=True)
        found.append(outcome)
        models.append(model)
    batch = contest.split.test_x[: config.latency_batch].to(contest.device)
    dense, *others = benchmark(models, batch, repetitions=config.latency_rounds)
    return [
        replace(outcome, latency_ratio=dense.p50_ms / own.p50_ms) for outcome, own in zip(found, others, strict=True)
    ]


def _environment() -> dict[str, str]:
    """Return versions, hardware and the number of threads, for the report."""
    libraries = ("torch", "torch-pruning", "numpy", "scikit-learn")
    build = torch.__version__  # names the build, too, such as +cu130
    return {**machine_record(libraries), "torch": build, "threads": str(torch.get_num_threads())}


def _task(config: DemoConfig) -> tuple[Split, Callable[[], nn.Module], Augment | None]:
    """Return the images, a function that creates the network, and the augmentation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.data == "digits":
        split = digits()
        limit, test = config.train_limit, config.test_limit
        # Images are sorted by class, so a prefix would miss classes; take evenly spaced images instead.
        small = replace(
            split,
            train_x=_spread(split.train_x, limit), train_y=_spread(split.train_y, limit),
            test_x=_spread(split.test_x, test), test_y=_spread(split.test_y, test),
        )  # fmt: skip
        return small, lambda: SmallResNet().to(device), None
    build = partial(_pretrained, device)
    build()  # raises if the weights are missing, before the images are decoded
    return cifar10(limit=config.train_limit, test_limit=config.test_limit), build, crop_flip


def _spread(tensor: Tensor, limit: int | None) -> Tensor:
    """Return ``limit`` evenly spaced entries along the first axis; ``None``: all."""
    if limit is None or limit >= len(tensor):
        return tensor
    return tensor[torch.linspace(0, len(tensor) - 1, limit).long()]


def _pretrained(device: torch.device) -> nn.Module:
    model = resnet20(num_classes=CLASSES)
    load_weights(model, "resnet20_cifar10")
    return model.to(device)


def _epochs(config: DemoConfig) -> int:
    """Return the number of epochs of the whole run, for the progress bar."""
    recipe = config.recipe
    curves = sum(method in ("depgraph", "torque", "etp") for method in config.methods) * recipe.curve_epochs
    curves += ("etp" in config.methods) * recipe.sparse_epochs
    each = recipe.epochs * len(config.methods) + curves * len(recipe.curve)
    return config.seeds * (recipe.dense_epochs + each)


def _labelled(tick: Callable[[str, int], None], label: str, what: str, epochs: int) -> None:
    tick(f"{label}: {what}", epochs)


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a progress bar over all epochs; without a terminal, print a line on stderr for each stage.

    Yields:
        A function ``tick(description, epochs)`` that advances the progress.
    """
    columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lines = None if console is None or console.is_terminal else Console(stderr=True)
    with Progress(*columns, console=console, disable=console is None or lines is not None, transient=True) as bar:
        task = bar.add_task("reading the images", total=total)
        done, stage = 0, ""

        def tick(what: str, epochs: int) -> None:
            nonlocal done, stage
            bar.update(task, description=what, advance=epochs)
            if lines is not None and what != stage:
                lines.print(f"{100 * done // total:3} % {what}", highlight=False, markup=False)
            done, stage = done + epochs, what

        yield tick


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EtpError(f"{out}: cannot be made a folder ({error}). Choose another --out.") from error
