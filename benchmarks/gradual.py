"""Single weights or whole units: the experiment of Zhu & Gupta 2017 on the LSTM of :mod:`benchmarks.tasks.ptb`.

Masks on single weights rise along the cubic schedule while the network trains (*large-sparse*), and a narrow network
with as many nonzero parameters trains from scratch for as long (*small-dense*). Between the two stands what this
library does: whole units go along the same schedule, at the same steps (*large-pruned-by-units*). The unpruned network
with the same extra training is the control. No contestant has anything to choose, but for the
learning rate of the narrow network: that of the wide one is too low for it. It is chosen on the validation part.

``python -m benchmarks.gradual --seeds 0 1 2``. Each run is one JSON line in
``benchmarks/results/runs/gradual.jsonl``; a run that has a line is not repeated. The page is made anew every time.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.optim import Optimizer

import etp_graph as etp
from etp_graph.errors import BudgetError, EtpError
from etp_graph.schedules import Cubic

from .contestants import UNPRUNED
from .gradual_page import page
from .masks import Masks, target
from .measure import commit, conditions, nonzero, p50_latencies, parameters
from .protocol import TUNING_SEED
from .run import GRADUAL, RUNS, Record, read
from .tasks import SCALES, Scale, TaskUnavailableError
from .tasks.ptb import Ptb
from .training import checkpoint, train

TASK = "ptb"
METHODS = (UNPRUNED, "large-sparse", "large-pruned-by-units", "small-dense")
SPARSITIES = (0.5, 0.75, 0.9)
EVERY = 10
"""Steps between two updates of the masks, or two removals of units."""
SCHEDULE = Cubic()
FORMAT = 1
Trial = dict[str, Any]
"""A learning rate that was tried, and the metric on the validation part (``None``: training failed)."""
RATES = (1.0, 4.0, 8.0)
"""Learning rates that small-dense tries, as multiples of the one of the wide network, which is too low for it."""
TRIAL = 0.5
"""Share of the steps that a trial takes."""
_ROUNDS = {"smoke": 2, "cpu": 60, "paper": 100}
Raise = Callable[[float], object]
"""Is told which share of the way from the dense network to the target has to be done now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. ``sparsity``: share of the weights without which the network has to do; the unpruned control has 0."""

    task: str
    scale: str
    method: str
    sparsity: float
    seed: int


def with_width(task: Ptb, width: int) -> nn.Module:
    """The task's model with another width of embedding and layers, and fresh weights as suit that width."""
    small = copy.copy(task)
    small.width = width
    return small.build()


def widest(task: Ptb, params: int) -> int:
    """The largest width with at most so many parameters. Raises :class:`BudgetError` if there is none."""
    for width in range(task.width, 0, -1):
        with torch.device("meta"):
            if parameters(with_width(task, width)) <= params:
                return width
    raise BudgetError(f"params={params}: the model has more at any width.")


class Experiment:
    """All runs on one task, from one checkpoint. ``trials``: those of small-dense, by sparsity."""

    def __init__(self, task: Ptb) -> None:
        self.task = task
        self.dense = checkpoint(task)
        self.trials: dict[float, list[Trial]] = {}
        self._read: dict[str, float] = {}

    def run(self, config: Config) -> Record:
        """One run as a record, ready for JSON."""
        begin = perf_counter()
        record: Record = {
            "format": FORMAT, "config": asdict(config), "title": self.task.title, "metric": asdict(self.task.metric),
            "recipe": asdict(self.task.recipe), "schedule": SCHEDULE.to_dict(), "every": EVERY,
            "checkpoint": self.task.checkpoint_note, "conditions": conditions(), "commit": commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        try:
            model = self.network(config)
            record |= {"status": "ok", **self._measured(model, config)}
        except FloatingPointError as error:
            record |= {"status": "failed", "reason": str(error)}
        except EtpError as error:  # out of reach: a property of the network and the sparsity
            record |= {"status": "not possible", "reason": f"{type(error).__name__}: {error}"}
        return {**record, "seconds": round(perf_counter() - begin, 1)}

    def network(self, config: Config) -> nn.Module:
        """What the contestant makes of the checkpoint, or of fresh weights."""
        if config.method == "small-dense":
            return self._small(config.sparsity, self.small_rate(config.sparsity), config.seed)
        model = copy.deepcopy(self.dense)
        if config.method == UNPRUNED:
            self._train(model, config.seed)
        elif config.method == "large-sparse":
            masks = Masks(model)
            self._train(model, config.seed, lambda share: masks.raise_to(config.sparsity * share))
            masks.remove()
        else:
            self._units(model, config)
        return model

    def _train(
        self, model: nn.Module, seed: int, raise_to: Raise = lambda share: None,
        attach: Callable[[Optimizer], object] = lambda optimizer: None,
    ) -> None:  # fmt: skip
        """The phase in which the schedule rises, and the one after it."""
        recipe = self.task.recipe
        rising = recipe.sparse_steps

        def after_step(step: int) -> None:
            if step % EVERY == 0 or step == rising:
                raise_to(SCHEDULE(step / rising))

        train(
            self.task, model, steps=rising, peak=recipe.sparse_rate, seed=seed, start=0, attach=attach,
            after_step=after_step,
        )  # fmt: skip
        train(self.task, model, steps=recipe.finetune_steps, peak=recipe.finetune_rate, seed=seed, start=rising)

    def _units(self, model: nn.Module, config: Config) -> None:
        """Every group loses the same share of its units, those with the smallest weights, as the matrices do."""
        dense, goal = parameters(model), target(model, config.sparsity)
        optimizers: list[Optimizer] = []

        def cut(share: float) -> None:
            plan = etp.trace(model, self.task.example(), prune=self.task.prune, ignore=self.task.ignore, check=False)
            scores = etp.criteria.magnitude(model, plan, p=1)
            budget = etp.Budget(params=dense - int(share * (dense - goal)), scope="local")
            selection = etp.allocate(model, plan, scores, budget=budget)
            etp.prune_(model, plan, selection, optimizer=optimizers[-1])

        self._train(model, config.seed, cut, optimizers.append)

    def _small(self, sparsity: float, peak: float, seed: int, share: float = 1.0) -> nn.Module:
        """Fresh weights; as many steps as the checkpoint and the two phases took together, in one phase."""
        recipe = self.task.recipe
        width = widest(self.task, target(self.dense, sparsity))
        torch.manual_seed(seed)
        model = with_width(self.task, width).to(self.task.device)
        steps = round(share * (recipe.dense_steps + recipe.sparse_steps + recipe.finetune_steps))
        train(self.task, model, steps=steps, peak=peak, seed=seed, start=0)
        return model

    def small_rate(self, sparsity: float) -> float:
        """The learning rate whose trial is best on the validation part."""
        if sparsity not in self.trials:
            self.trials[sparsity] = [self._trial(sparsity, by * self.task.recipe.dense_rate) for by in RATES]
        done = [trial for trial in self.trials[sparsity] if trial["val"] is not None]
        if not done:
            raise FloatingPointError("training diverged in every trial")
        best = max if self.task.metric.higher else min
        return float(best(done, key=lambda trial: trial["val"])["rate"])

    def _trial(self, sparsity: float, peak: float) -> Trial:
        try:
            model = self._small(sparsity, peak, TUNING_SEED, TRIAL)
        except FloatingPointError:
            return {"rate": peak, "val": None}
        return {"rate": peak, "val": self.task.evaluate(model, "val")}

    def _measured(self, model: nn.Module, config: Config) -> Record:
        """Metrics, size and time of the finished network; nothing is chosen by them."""
        if not self._read:
            self._read = {part: self.task.evaluate(self.dense, part) for part in ("val", "test")}
        inputs = self.task.latency_inputs()
        return {
            "val": {"dense": self._read["val"], "final": self.task.evaluate(model, "val")},
            "test": {"dense": self._read["test"], "final": self.task.evaluate(model, "test")},
            "trials": self.trials[config.sparsity] if config.method == "small-dense" else [],
            "target": target(self.dense, config.sparsity),
            "nonzero": [nonzero(self.dense), nonzero(model)], "params": [parameters(self.dense), parameters(model)],
            "latency": p50_latencies([self.dense, model], inputs, rounds=_ROUNDS[self.task.scale]),
        }  # fmt: skip


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
    same = json.loads(json.dumps(asdict(task.recipe)))
    return {
        record["config"]["sparsity"]: record["trials"]
        for record in records
        if record["config"]["scale"] == task.scale and record["recipe"] == same and record.get("trials")
    }


def run_all(todo: Sequence[Config], out: Path, scale: Scale, *, console: Console) -> int:
    """Run what has no line yet and write its line; the number of runs."""
    records = read(out)
    have = {Config(**record["config"]) for record in records}
    missing = [config for config in todo if config not in have]
    if not missing:
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task("checkpoint", total=len(todo), completed=len(todo) - len(missing))
        experiment = Experiment(Ptb(scale))
        experiment.trials = earlier_trials(records, experiment.task)
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradual", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="all")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="X")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--results", type=Path, default=RUNS / f"{GRADUAL}.jsonl", help="the JSON lines")
    parser.add_argument("--out", type=Path, default=Path(f"docs/results/{GRADUAL}.md"), help="the page")
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
    records = [one for one in read(options.results) if one["config"]["scale"] == options.scale]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(records), encoding="utf8")
    console.print(f"{done} runs, {len(todo) - done} were there; wrote {options.out}", highlight=False)


if __name__ == "__main__":
    main()
