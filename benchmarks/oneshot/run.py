"""Prune a ResNet-56, a BERT and a GAT without training, by this and other methods, on equal terms.

``python -m benchmarks oneshot`` calibrates on 256 training examples. Each method prunes to a speed-up, and nothing is
made good, or batch norms are measured anew, or the layers that read removed units get new weights. The test part is
read at the end of each run. Each run is one JSON line; a run that has a line is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.records import PAGES, Record, append_record, read_records
from benchmarks.contest.training import checkpoint
from benchmarks.oneshot.methods import MADE_GOOD, METHODS, Experiment
from benchmarks.oneshot.page import DENSE, page
from benchmarks.tasks import Scale, TaskUnavailableError, make

RESULTS = Path("benchmarks/results/oneshot.jsonl")

TASKS: dict[str, tuple[Scale, tuple[float, ...]]] = {
    "cora": ("full", (3.0, 6.0, 12.0)), "sst2": ("cpu", (1.5, 2.0, 3.0)),
    "cifar10-resnet56": ("full", (1.25, 1.5, 2.0)),
}  # fmt: skip
"""Scale and speed-ups."""


def configs(task: str, methods: Sequence[str], speed_ups: Sequence[float], seeds: Sequence[int]) -> Iterator[Any]:
    """The runs of a task; what needs batch norms is left out later, where there are none."""
    for seed in seeds:
        for method in methods:
            for speed_up in speed_ups:
                for made_good in MADE_GOOD:
                    yield {"task": task, "method": method, "speed_up": speed_up, "made_good": made_good, "seed": seed}


def run_task(name: str, scale: Scale, todo: Sequence[Any], results: Path, console: Console) -> int:
    """Run what has no line yet and write its line; the number of runs."""
    have = [record["config"] for record in read_records(results)]
    missing = [config for config in todo if config not in have]
    if not missing:
        return 0
    task, n = make(name, scale), 0
    experiment: Experiment | None = None
    for config in missing:
        if experiment is None or experiment.seed != config["seed"]:
            model = checkpoint(task, config["seed"] if task.own_checkpoints else 0)
            experiment = Experiment.of(task, model, config["seed"])
            dense = {"task": name, "method": DENSE, "seed": config["seed"]}
            if dense not in have:
                value = task.evaluate(model, "test")
                append_record(
                    results, {"config": dense, "title": task.title, "metric": task.metric.name, "value": value}
                )
        if config["made_good"] == "norms" and not experiment.has_norms():
            continue
        record = run_one(experiment, config)
        append_record(results, record)
        n += 1
        console.print(f"{config}: {record['value']:.4f}, {record['seconds']:.0f} s", highlight=False)
    return n


def run_one(experiment: Experiment, config: Any) -> Record:
    """The record of one run."""
    begin = perf_counter()
    model = experiment.prune(METHODS[config["method"]], config["speed_up"], config["made_good"])
    seconds = perf_counter() - begin
    return {
        "config": config, "value": experiment.task.evaluate(model, "test"), "seconds": round(seconds, 1),
        "params": [sum(p.numel() for p in one.parameters()) for one in (experiment.model, model)],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    what = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks oneshot", description=what)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help="all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="all")
    parser.add_argument("--speed-ups", nargs="+", type=float, metavar="X", help="default: each task's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    parser.add_argument("--scale", choices=("smoke", "cpu", "full"), help="of all tasks; default: each task's own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES / "oneshot.md", help="the page")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    options: Any = parser.parse_args(arguments)
    if not all(speed_up > 1 for speed_up in options.speed_ups or ()):
        parser.error(f"--speed-ups {options.speed_ups}: each is greater than 1")
    torch.set_num_threads(options.threads)
    console, done = Console(stderr=True), 0
    for name in options.tasks:
        scale, speed_ups = TASKS[name]
        todo = list(configs(name, options.methods, options.speed_ups or speed_ups, options.seeds))
        try:
            done += run_task(name, options.scale or scale, todo, options.results, console)
        except TaskUnavailableError as error:
            console.print(f"{name} is left out: {error}", highlight=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(read_records(options.results)), encoding="utf8")
    console.print(f"{done} runs; wrote {options.out}", highlight=False)


if __name__ == "__main__":
    main()
