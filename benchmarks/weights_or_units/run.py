"""Single weights or whole units: the experiment of Zhu & Gupta 2017 on the LSTM of :mod:`benchmarks.tasks.ptb`.

Masks on single weights rise along the cubic schedule while the network trains (*large-sparse*), and a narrow network
with as many nonzero parameters trains from scratch for as long (*small-dense*). Between the two stands what this
library does: whole units go along the same schedule, at the same steps (*large-pruned-by-units*). The unpruned network
with the same extra training is the control. The learning rate is the one thing to choose: on the
validation part, among as many for the checkpoint as for each narrow network.

``python -m benchmarks weights-or-units --seeds 0 1 2``. Each run is one JSON line in
``benchmarks/results/runs/gradual.jsonl``; a run that has a line is not repeated. The page is made anew every time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.contestant_names import SMALL, UNPRUNED
from benchmarks.common.records import GRADUAL, PAGES, RUNS, Record, read_records
from benchmarks.contest.run import progress
from benchmarks.tasks import SCALES, Scale, TaskUnavailableError
from benchmarks.tasks.base import concerns
from benchmarks.tasks.ptb import Ptb
from benchmarks.weights_or_units.contestants import METHODS, TASK, Config, Experiment, Trial
from benchmarks.weights_or_units.page import page

SPARSITIES = (0.5, 0.75, 0.9)


def configs(scale: str, methods: Sequence[str], sparsities: Sequence[float], seeds: Iterable[int]) -> list[Config]:
    """Seed after seed, so that an interrupted series has all contestants of the seeds that it has."""
    found = [
        Config(task=TASK, scale=scale, method=method, sparsity=0.0 if method == UNPRUNED else sparsity, seed=seed)
        for seed in seeds
        for sparsity in sparsities
        for method in methods
    ]
    return list(dict.fromkeys(found))


def earlier_trials(records: Iterable[Record], task: Ptb) -> dict[float, list[Trial]]:
    """The trials of runs under the same recipe: they have a seed of their own and would give the same again."""
    same = concerns(json.loads(json.dumps(asdict(task.recipe))), UNPRUNED)
    return {
        record["config"]["sparsity"]: record["trials"]
        for record in records
        if record["config"]["scale"] == task.scale
        and concerns(record["recipe"], UNPRUNED) == same
        and record["config"]["method"] == SMALL
        and record.get("trials")
    }


def run_all(todo: Sequence[Config], out: Path, scale: Scale, *, console: Console) -> int:
    """Run what has no line yet and write its line; the number of runs."""
    records = read_records(out)
    have = {Config(**record["config"]) for record in records}
    missing = [config for config in todo if config not in have]
    if not missing:
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress(console) as bar:
        line = bar.add_task("checkpoint", total=len(todo), completed=len(todo) - len(missing))
        experiment = Experiment(Ptb(scale))
        experiment.trials = earlier_trials(records, experiment.given)
        for config in missing:
            what = f"{config.method} {config.sparsity:.0%} seed {config.seed}"
            bar.update(line, description=what)
            record = experiment.run(config)
            with out.open("a", encoding="utf8") as file:
                file.write(json.dumps(record) + "\n")
            bar.advance(line)
            console.print(f"{what}: {_summary(record)}", highlight=False)
    return len(missing)


def _summary(record: Record) -> str:
    """The validation part only: whoever watches the runs has nothing to choose by."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    return (
        f"{record['metric']['name']} on the validation part {record['val']['final']:.4g}; "
        f"{record['nonzero'][1]:,} nonzero; {record['seconds']:.0f} s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks weights-or-units", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="all")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="X")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--results", type=Path, default=RUNS / f"{GRADUAL}.jsonl", help="the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES / f"{GRADUAL}.md", help="the page")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options: Any = parser.parse_args(arguments)
    if not all(0 < sparsity < 1 for sparsity in options.sparsities):
        parser.error(f"--sparsities {options.sparsities}: shares lie between 0 and 1")
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    todo = configs(options.scale, options.methods, options.sparsities, options.seeds)
    try:
        done = run_all(todo, options.results, options.scale, console=console)
    except TaskUnavailableError as error:
        parser.exit(2, f"{TASK}: {error}\n")
    records = [one for one in read_records(options.results) if one["config"]["scale"] == options.scale]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(records), encoding="utf8")
    console.print(f"{done} runs, {len(todo) - done} were there; wrote {options.out}", highlight=False)
