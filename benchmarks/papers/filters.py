"""Train a VGG-19 under the forces of the papers, and record what becomes of its filters.

``python -m benchmarks paper-figures`` trains from random weights, without any force, under Torque's with its three
strengths, under ETP's, and by Network Slimming. It records the accuracy right after cutting more and more parameters
(Torque, figure 2), the mean weight of every filter (figures 4 and 5), and the norms of two filters over the steps (ETP,
figures 1 and 3). Each network is one JSON line; one that has a line is not trained again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import nn

import etp_graph as etp
from benchmarks.common.machine import commit, machine_conditions, parameters
from benchmarks.common.records import PAGES, Record, append_record, read_records
from benchmarks.contest.contestants import library_method
from benchmarks.contest.strength import drift, reference
from benchmarks.contest.training import train
from benchmarks.papers import filters_page
from benchmarks.papers.norms_figure import DISTANCES, OF_UNITS
from benchmarks.tasks import SCALES, TaskUnavailableError, make
from benchmarks.tasks.base import Task
from etp_graph.errors import BudgetError
from etp_graph.methods import Method
from etp_graph.units import Units

RESULTS = Path("benchmarks/results/paper-figures.jsonl")
TASK = "cifar10-vgg19"
SHARES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98)
"""Of the parameters, that are removed."""
EVERY = 20
"""Steps between two looks at the norms."""
_EPOCH = 391
"""Steps of 128 of 50,000 images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Force:
    """A network of the figures.

    Attributes:
        name: of the line.
        method: the method of this library; ``None``: no force, and the criterion of Torque.
        strength: as published; 0: that of ``alike``.
        drift: Σ η / (1 - momentum) of the published schedule. The strength is multiplied by it and divided by that of
            the schedule here, so that the whole pull on a weight is the published one.
        alike: the force whose push this one has.
    """

    name: str
    method: str | None = None
    strength: float = 0.0
    drift: float = 10 * _EPOCH * (100 * 0.1 + 50 * 0.01 + 50 * 0.001)
    alike: str = ""


FORCES = (
    Force(name="no force"),
    *(Force(name=f"Torque {value:g}", method="torque-published-mf5", strength=value) for value in (1e-6, 1e-7, 1e-8)),
    Force(name="ETP", method="index-exponential", alike="Torque 1e-06"),
    Force(
        name="Network Slimming 0.0001", method="network-slimming", strength=1e-4,
        drift=10 * _EPOCH * (80 * 0.1 + 40 * 0.01 + 40 * 0.001),
    ),
)  # fmt: skip


class Network:
    """One network: built with seed 0, trained, and looked at."""

    def __init__(self, task: Task, force: Force, steps: int) -> None:
        self.task, self.force = copy.copy(task), force
        self.task.recipe = replace(
            task.recipe, sparse_steps=steps, sparse_rate=task.recipe.dense_rate, weight_decay=1e-4, precision="bf16"
        )
        torch.manual_seed(0)
        self.model = self.task.build().to(self.task.device)
        self.plan = etp.trace(self.model, self.task.example(), check=False)
        self.method = self._method(force)

    def _method(self, force: Force) -> Method | None:
        """The method with the strength that gives the published pull on this schedule."""
        if force.method is None:
            return None
        method = library_method(force.method)
        assert method is not None
        if not force.alike:
            return replace(method, beta=force.strength * force.drift / drift(self.task))
        alike = self._method(next(other for other in FORCES if other.name == force.alike))
        assert alike is not None
        assert alike.beta is not None
        push = alike.beta / reference(self.task, self.model, self.plan, alike)
        return replace(method, beta=push * reference(self.task, self.model, self.plan, method))

    def train(self) -> list[list[float]]:
        """Train from random weights; the norms of the two filters, [looks, 2]."""
        recipe, seen = self.task.recipe, list[list[float]]()
        units, span = Units(self.model, self.plan), self._span()
        last = span.stop - span.start - 1
        at = [span.start + round(distance / (OF_UNITS - 1) * last) for distance in DISTANCES]

        def look(step: int) -> None:
            if step % EVERY == 0:
                norms = units.square_norms(self.model).detach().sqrt()
                seen.append([round(float(norms[unit]), 5) for unit in at])

        regularizer = None
        if self.method is not None:
            regularizer = self.method.regularizer(self.model, self.plan, steps=recipe.sparse_steps)
        attach = (lambda optimizer: None) if regularizer is None else regularizer.attach
        look(0)
        train(
            self.task, self.model, steps=recipe.sparse_steps, peak=recipe.sparse_rate, seed=0, start=0, attach=attach,
            after_step=look,
        )  # fmt: skip
        if regularizer is not None:
            regularizer.detach()
        return seen

    def _span(self) -> slice:
        """The units of the first layer of 256 filters of the whole network (the fifth convolution)."""
        name = self.convolutions()[4][0]
        return next(span for group, span in self.plan.spans() if group.name == name)

    def convolutions(self) -> list[tuple[str, nn.Conv2d]]:
        """The convolutions, in their order."""
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.Conv2d)]

    def filters(self) -> list[list[float]]:
        """The mean absolute weight of every filter, convolution after convolution."""
        return [[round(float(v), 7) for v in m.weight.detach().abs().mean((1, 2, 3))] for _, m in self.convolutions()]

    def curve(self) -> list[list[float]]:
        """[share of the parameters removed, accuracy right after], until no more can be removed."""
        judge = self.method or library_method("torque-published-mf5")
        assert judge is not None
        self.model.eval()
        scores, total, points = judge.scores(self.model, self.plan), parameters(self.model), []
        for share in SHARES:
            pruned = copy.deepcopy(self.model)
            try:
                budget = judge.with_rules(etp.Budget(params=round((1 - share) * total)))
                etp.prune_(pruned, self.plan, etp.allocate(pruned, self.plan, scores, budget=budget))
            except BudgetError:
                break
            points.append([1 - parameters(pruned) / total, self.task.evaluate(pruned, "test")])
        return [[round(value, 4) for value in point] for point in points]


def measure(task: Task, force: Force, config: dict[str, Any]) -> Record:
    """Train one network, and return its line."""
    begin = perf_counter()
    network = Network(task, force, config["steps"])
    norms = network.train()
    return {
        "config": config, "title": task.title, "strength": None if network.method is None else network.method.beta,
        "published": force.strength or None, "accuracy": round(task.evaluate(network.model.eval(), "test"), 4),
        "curve": network.curve(), "filters": network.filters(), "norms": norms, "every": EVERY,
        "seconds": round(perf_counter() - begin, 1), "commit": commit(), "conditions": machine_conditions(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paper-figures", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--passes", type=int, default=10, metavar="N", help="over the training images; default 10")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder of the page and the figures")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    options: Any = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    there = [record["config"] for record in read_records(options.results)]
    try:
        task = make(TASK, options.scale)
    except TaskUnavailableError as error:
        parser.exit(2, f"{TASK}: {error}\n")
    for force in FORCES:
        steps = options.passes * task.steps_per_pass
        config = {"force": force.name, "scale": options.scale, "steps": steps, "seed": 0}
        if config not in there:
            record = measure(task, force, config)
            append_record(options.results, record)
            console.print(f"{force.name}: accuracy {record['accuracy']}, {record['seconds']:.0f} s", highlight=False)
    for path in filters_page.write(read_records(options.results), options.out):
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
