"""Runs of the comparison, each contestant on the same terms (:mod:`benchmarks.contest.protocol`).

``python -m benchmarks contest cifar10 --methods etp tp-groupnorm dense --speed-ups 2.5 --seeds 0 1``. Each run is one
JSON line in ``benchmarks/results/runs/TASK.jsonl``; a run that has a line is not repeated.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.contestant_names import DISTILLED, UNPRUNED
from benchmarks.common.records import RUNS, Record
from benchmarks.contest.contestants import known
from benchmarks.contest.gate import GATED, pairs_of
from benchmarks.contest.ledger import Ledger
from benchmarks.contest.protocol import AT, TUNING_SEED, Config, Protocol
from benchmarks.contest.tuning import Trial
from benchmarks.tasks import CONDITIONS, SCALES, TASKS, Scale, TaskUnavailableError, make

METHODS = ("dense", "small-dense", "random", "l1-uniform", "tp-groupnorm", "torque", "etp")
"""What is run where nothing else is asked for."""


def configs(
    task: str, scale: str, methods: Sequence[str], speed_ups: Iterable[float], seeds: Iterable[int]
) -> list[Config]:
    """Seed after seed, so that an interrupted series has all methods of the seeds that it has."""
    found: dict[Any, Config] = {}
    speeds = list(speed_ups)
    for seed in seeds:
        for speed_up in speeds:
            for method in methods:
                factor = 1.0 if method.removesuffix(DISTILLED) == UNPRUNED else speed_up
                config = Config(task=task, scale=scale, method=method, speed_up=factor, seed=seed)
                found.setdefault(config.key, config)
    return list(found.values())


def progress(console: Console) -> Progress:
    """The bar over the runs of a series; silent unless on a terminal."""
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def run_all(todo: Sequence[Config], out: Path, *, console: Console, blind: bool = False, resumable: bool = True) -> int:
    """Run what has no line yet and write its line; return the number of runs.

    Args:
        todo: runs of one task at one scale.
        out: file of the lines.
        console: is told of each run.
        blind: the test part is never read.
        resumable: whether a run that was killed continues at its last pass over the data.
    """
    ledger = Ledger(out)
    missing = [config for config in todo if ledger.find(config) is None]
    if not missing:
        return 0
    done = 0
    with progress(console) as bar:
        line = bar.add_task("checkpoint", total=len(todo), completed=len(todo) - len(missing))
        protocol = Protocol(make(missing[0].task, scale_of(missing[0].scale)), blind=blind, resumable=resumable)
        for config in control_first(missing, ledger, protocol):
            bar.update(line, description=describe(config))
            done += run_one(protocol, config, ledger, console=console)
            bar.advance(line)
    return done


def control_first(missing: Sequence[Config], ledger: Ledger, protocol: Protocol) -> list[Config]:
    """The runs, with the dense control before all others where its recipe has to be judged and nobody has yet."""
    first = missing[0]
    if protocol.blind or first.scale not in GATED or ledger.controls(first, protocol.task.recipe):
        return list(missing)
    control = replace(first, method=UNPRUNED, speed_up=1.0)
    return [control, *(config for config in missing if config.key != control.key)]


def run_one(protocol: Protocol, config: Config, ledger: Ledger, *, console: Console) -> bool:
    """One run, unless its recipe is refused; whether there is a new line."""
    recipe = protocol.task.recipe
    reason = ledger.refusal(config, recipe)
    if reason is not None and config.method != UNPRUNED:
        console.print(f"{describe(config)}: not run, the recipe is refused: {reason}", highlight=False, markup=False)
        return False
    trials = ledger.trials(config, recipe)

    def keep(trial: Trial) -> None:
        ledger.write_trial(config, recipe, trial)
        protocol.forget(config.tuned_as(recipe), trial.push)

    controls = pairs_of(ledger.controls(config, recipe))
    record = protocol.run(config, trials=trials, keep=keep, controls=controls)
    ledger.write_run(record)
    protocol.forget(config)
    console.print(f"{describe(config)}: {_summary(record)}", highlight=False, markup=False)
    return True


def describe(config: Config) -> str:
    """The run in a few words."""
    return f"{config.task} {config.method} {config.speed_up:g}x seed {config.seed}"


def _summary(record: Record) -> str:
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    part = "test" if "test" in record else "val"
    stages = ", ".join(f"{stage} {value:.4g}" for stage, value in record[part].items())
    latency = f"{record['latency'][0] / record['latency'][1]:.2f}x p50; " if "latency" in record else ""
    return (
        f"{record['metric']['name']} {stages}; {record['speed_up']:.2f}x MACs, {latency}"
        f"push {record['push']}; {record['seconds']:.0f} s"
    )


def is_known(name: str) -> bool:
    """Whether a run may have this name: a contestant, also with a strength behind it (``torque@0.6``)."""
    base, at, push = name.partition(AT)
    try:
        return base in known() and (not at or float(push) > 0)
    except ValueError:
        return False


def _names() -> str:
    return (
        ", ".join(name for name in known() if not name.endswith(DISTILLED))
        + f"; each also with {DISTILLED} behind it, and then with "
        f"a strength that is not tuned ({AT}0.6)"
    )


def scale_of(name: str) -> Scale:
    """The scale of this name."""
    return next(scale for scale in SCALES if scale == name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks contest", description=(__doc__ or "").splitlines()[0],
        epilog="In place of a task: recipe, queue or status; each has its own --help.",
    )  # fmt: skip
    parser.add_argument("task", choices=[*TASKS, *CONDITIONS])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=_names())
    parser.add_argument("--speed-ups", nargs="+", type=float, metavar="X", help="dense over pruned MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--out", type=Path, help=f"default {RUNS}/TASK.jsonl")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    options = parser.parse_args(arguments)
    unknown = sorted({name for name in options.methods if not is_known(name)})
    if unknown:
        parser.error(f"unknown methods {unknown}; known are {_names()}")
    if TUNING_SEED in options.seeds:
        parser.error(f"seed {TUNING_SEED} is that of the tuning trials")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the process that checks the peers
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    try:
        speed_ups = options.speed_ups or make(options.task, options.scale).speed_ups
        todo = configs(options.task, options.scale, options.methods, speed_ups, options.seeds)
        out = options.out or RUNS / f"{options.task}.jsonl"
        done = run_all(todo, out, console=console)
    except TaskUnavailableError as error:
        parser.exit(2, f"{options.task}: {error}\n")
    console.print(f"{done} runs, {len(todo) - done} were there; {out}", highlight=False)
