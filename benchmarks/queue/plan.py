"""The planned runs: which tasks, methods, speed-ups and seeds, in the order in which they are taken up.

A method that nobody has written yet stands here by its name; the queue passes it over until it is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common.contestant_names import DISTILLED, ONESHOT, SMALL, UNPRUNED
from benchmarks.contest.protocol import Config
from benchmarks.tasks.base import Scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One question and the runs that answer it.

    Attributes:
        name: short, for the command line.
        title: the question.
        task: of all runs.
        methods: contestants; the unpruned control belongs to every experiment. Those that need no tuning come first,
            because they cost a fifth of the others.
        speed_ups: dense over pruned MACs.
        n_seeds: seeds 0, 1, ...
        scale: of the task.
    """

    name: str
    title: str
    task: str
    methods: tuple[str, ...]
    speed_ups: tuple[float, ...]
    n_seeds: int = 3
    scale: Scale = "full"

    def runs_of(self, seed: int) -> list[Config]:
        """All runs of a seed, the control first and then method after method."""
        control = Config(task=self.task, scale=self.scale, method=UNPRUNED, speed_up=1.0, seed=seed)
        others = [
            Config(task=self.task, scale=self.scale, method=method, speed_up=speed_up, seed=seed)
            for method in self.methods
            for speed_up in self.speed_ups
        ]
        return [control, *others]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A run and the experiment that asks for it first."""

    experiment: Experiment
    config: Config


_UNTUNED = ("etp", "etp-hard", "l1-uniform", "l1-gradual", "etp-uniform-force", "etp-global", "taylor-gradual")
_TUNED = ("tp-groupnorm-local", "torque-published", "tp-groupnorm")
_GRAPH = (*_UNTUNED, "taylor", "fpgm", "random", "depgraph", "torque-published")
_CLAIM = ("index-uniform", "index-linear", "index-base", "index-exponential")
_TWICE = ("etp-hard", "l1-uniform")
"""What is run with phases of twice the length: the best methods, with units of `etp` and without."""

PLAN: tuple[Experiment, ...] = (
    Experiment(
        name="E1", title="ResNet-20: does the force bring anything beyond the choice?", task="cifar10",
        methods=(*_UNTUNED, ONESHOT, *_TUNED), speed_ups=(5.0,),
    ),
    Experiment(
        name="M1", title="BERT on MRPC: the same question with AdamW, and distillation", task="mrpc",
        methods=(*_UNTUNED, ONESHOT, f"etp{DISTILLED}", f"taylor-gradual{DISTILLED}", "depgraph", "torque-published"),
        speed_ups=(8.0,),
    ),
    Experiment(
        name="E4", title="LSTM: the same question with recurrent units", task="ptb",
        methods=(*_UNTUNED, "depgraph", "torque-published", SMALL), speed_ups=(5.0,),
    ),
    Experiment(
        name="G1", title="GAT on Cora: all methods on a small graph", task="cora", methods=_GRAPH,
        speed_ups=(36.0, 9.0),  # at 3x and 9x the first seed had all methods within a point of each other
    ),
    Experiment(
        name="E5", title="The papers' claim: random weights, order by index, accuracy right after surgery",
        task="cifar10-scratch", methods=tuple(f"{name}@{push:g}" for name in _CLAIM for push in (0.6, 2.0)),
        speed_ups=(5.0,),
    ),
    Experiment(
        name="T2", title="Table 2 of ETP, whole: Informer on ETTh1", task="ett",
        methods=("etp", "etp-hard", "l1-uniform", "depgraph", "torque-published", "tp-groupnorm"),
        speed_ups=(6.5, 25.0, 14.5, 10.5, 4.0, 2.5),
    ),
    Experiment(
        name="E2", title="ResNet-56 at the speed-up of ETP's table 1", task="cifar10-resnet56",
        methods=("etp", "etp-hard", "l1-uniform", "taylor-gradual", "tp-groupnorm-local"), speed_ups=(2.93,),
    ),
    *(
        Experiment(
            name=f"D{number}", title=f"Do phases of twice the length change anything? {task}", task=f"{task}-twice",
            methods=_TWICE, speed_ups=(speed_up,), n_seeds=1,
        )
        for number, (task, speed_up) in enumerate((("cifar10", 5.0), ("mrpc", 8.0), ("ptb", 5.0), ("cora", 9.0)), 1)
    ),
    Experiment(
        name="E3", title="BERT on SST-2: gradual Taylor and distillation", task="sst2",
        methods=("etp", "etp-hard", "taylor-gradual", "l1-uniform", f"etp{DISTILLED}", f"taylor-gradual{DISTILLED}"),
        speed_ups=(6.0,),
    ),
    Experiment(
        name="G2", title="GAT on tolokers with all edges", task="tolokers", methods=(*_UNTUNED, "taylor"),
        speed_ups=(9.0,),
    ),
)  # fmt: skip
"""The experiments, the ones first whose runs are short and whose question decides most.

The last two are long and ask what others ask: they come when all others are done.
"""


GPU_PLAN: tuple[Experiment, ...] = (
    Experiment(
        name="P1", title="ResNet-56 with the schedule of the papers", task="cifar10-resnet56", scale="paper",
        methods=("etp", "etp-hard", "l1-uniform", "taylor-gradual", "tp-groupnorm-local", "torque-published"),
        speed_ups=(2.57,),
    ),
    Experiment(
        name="P2", title="VGG-19 with the schedule of the papers", task="cifar100", scale="paper",
        methods=("etp", "etp-hard", "l1-uniform", "taylor-gradual", "tp-groupnorm-local", "torque-published"),
        speed_ups=(8.92,),
    ),
)  # fmt: skip
"""What only a GPU does in hours; the queue takes these up where they are named."""


def planned_runs(experiments: Sequence[Experiment]) -> list[Planned]:
    """All runs, each once: the first seed of every experiment, then the second, and so on.

    The first seed of everything says more than all seeds of one thing.
    """
    found: dict[tuple[str, str, str, float, int], Planned] = {}
    for seed in range(max((experiment.n_seeds for experiment in experiments), default=0)):
        for experiment in experiments:
            if seed < experiment.n_seeds:
                for config in experiment.runs_of(seed):
                    found.setdefault(config.key, Planned(experiment=experiment, config=config))
    return list(found.values())


def chosen(names: Sequence[str] | None, tasks: Sequence[str] | None) -> list[Experiment]:
    """The experiments of these names and these tasks; without names all of :data:`PLAN`."""
    return [
        experiment for experiment in ((*PLAN, *GPU_PLAN) if names else PLAN)
        if (not names or experiment.name in names) and (not tasks or experiment.task in tasks)
    ]  # fmt: skip


BY_NAME: Mapping[str, Experiment] = {experiment.name: experiment for experiment in (*PLAN, *GPU_PLAN)}
