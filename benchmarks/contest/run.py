"""Runs of the comparison, each contestant on the same terms (:mod:`benchmarks.contest.protocol`).

``python -m benchmarks contest cifar10 --methods etp tp-groupnorm dense --speed-ups 2.5 --seeds 0 1``. Each run is one
JSON line in ``benchmarks/results/runs/TASK.jsonl``; a run that has a line is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.contestant_names import DISTILLED, UNPRUNED
from benchmarks.common.records import RUNS, Record, read_records
from benchmarks.contest.contestants import known
from benchmarks.contest.protocol import TUNING_SEED, Config, Protocol, Trial
from benchmarks.tasks import SCALES, TASKS, Recipe, Scale, TaskUnavailableError, make
from benchmarks.tasks.base import concerns

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


def earlier_trials(config: Config, records: Iterable[Record], recipe: Recipe) -> list[Trial]:
    """The trials of another seed under the same recipe: tuning has a seed of its own, it would give the same again."""
    same = concerns(json.loads(json.dumps(asdict(recipe))), config.method)
    for record in records:
        if (
            concerns(record["recipe"], config.method) == same
            and record.get("trials")
            and Config(**{**record["config"], "seed": config.seed}).key == config.key
        ):
            return [Trial(**trial) for trial in record["trials"]]
    return []


def progress(console: Console) -> Progress:
    """The bar over the runs of a series; silent unless on a terminal."""
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def run_all(todo: Sequence[Config], out: Path, *, console: Console, blind: bool = False) -> int:
    """Run what has no line yet and write its line; the number of runs. ``blind``: the test part is never read."""
    records = read_records(out)
    have = {Config(**record["config"]).key for record in records}
    missing = [config for config in todo if config.key not in have]
    if not missing:
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress(console) as bar:
        line = bar.add_task("checkpoint", total=len(todo), completed=len(todo) - len(missing))
        protocol = Protocol(make(missing[0].task, _scale(missing[0].scale)), blind=blind)
        for config in missing:
            what = f"{config.task} {config.method} {config.speed_up:g}x seed {config.seed}"
            bar.update(line, description=what)
            record = protocol.run(config, trials=earlier_trials(config, records, protocol.task.recipe))
            with out.open("a", encoding="utf8") as file:
                file.write(json.dumps(record) + "\n")
            records.append(json.loads(json.dumps(record)))
            bar.advance(line)
            console.print(f"{what}: {_summary(record)}", highlight=False, markup=False)
    return len(missing)


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


def _names() -> str:
    return (
        ", ".join(name for name in known() if not name.endswith(DISTILLED)) + f"; each also with {DISTILLED} behind it"
    )


def _scale(name: str) -> Scale:
    return next(scale for scale in SCALES if scale == name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks contest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=_names())
    parser.add_argument("--speed-ups", nargs="+", type=float, metavar="X", help="dense over pruned MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--out", type=Path, help=f"default {RUNS}/TASK.jsonl")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.methods) - set(known()))
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
