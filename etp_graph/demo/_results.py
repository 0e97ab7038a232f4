"""What goes into the comparison and what comes out: a recipe, and the outcome of each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MethodName = Literal["dense", "random", "depgraph", "torque", "etp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast every method trains, and how strong the forces are.

    Attributes:
        dense_epochs: of the network that all methods begin with; 0 where it comes with its weights.
        sparse_epochs: with the force, before surgery.
        finetune_epochs: after surgery.
        dense_lr: peak of the learning rate for the dense network; also ``sparse_lr`` and ``finetune_lr``.
        sparse_lr: see ``dense_lr``.
        finetune_lr: see ``dense_lr``.
        batch_size: images of one step.
        strengths: β of ``torque``, ``reg`` of ``depgraph``; ``etp`` has none.
        curve: further speed-ups. The network after the sparse phase is cut to each; for ``etp``, whose force follows
            from the target, a sparse phase leads to each.
        curve_epochs: epochs of fine-tuning for each point of that curve.
    """

    dense_epochs: int
    sparse_epochs: int
    finetune_epochs: int
    dense_lr: float = 0.1
    sparse_lr: float = 0.05
    finetune_lr: float = 0.02
    batch_size: int = 64
    strengths: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    curve_epochs: int = 3

    @property
    def epochs(self) -> int:
        """Epochs that every method trains for, from the dense checkpoint on."""
        return self.sparse_epochs + self.finetune_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Another speed-up: accuracy right after surgery, and after a few epochs."""

    speed_up: float
    pruned: float
    finetuned: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNorms:
    """Norms of the units of one group against their distance from the pivot, after some epochs of the sparse phase."""

    group: str
    epoch: int
    distance: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOutcome:
    """What one method made of the checkpoint. Accuracies are shares of the test images.

    Attributes:
        method: name of the method.
        seed: of initialisation and data order.
        dense: accuracy of the checkpoint.
        sparse: after sparse training, before surgery.
        pruned: right after surgery.
        finetuned: at the end.
        macs: of the result, for one image.
        params: of the result.
        speed_up: MACs of the checkpoint over those of the result.
        seconds: for sparse training, surgery and fine-tuning.
        latency_ratio: p50 latency of the checkpoint over that of the result; 0 until it is measured.
        curve: other speed-ups.
        norms: unit norms while training.
    """

    method: MethodName
    seed: int
    dense: float
    sparse: float
    pruned: float
    finetuned: float
    macs: int
    params: int
    speed_up: float
    seconds: float
    latency_ratio: float = 0.0
    curve: tuple[Point, ...] = ()
    norms: tuple[GroupNorms, ...] = ()


_DIGITS = {"depgraph": 1e-2, "torque": 3e-3}

_CIFAR = {"depgraph": 3e-2, "torque": 5e-3}

# The long schedule was not tuned: the quick strengths over the ratio of the steps, 5265 to 141, so that the whole
# push of the sparse phase stays the same.
_CIFAR_LONG = {name: value / 37 for name, value in _CIFAR.items()}

Preset = tuple[Recipe, int | None, int | None]
"""A recipe, the number of training images and of test images; ``None``: all."""

PRESETS: dict[tuple[str, bool], Preset] = {
    ("digits", False): (Recipe(dense_epochs=20, sparse_epochs=15, finetune_epochs=10, strengths=_DIGITS), None, None),
    ("digits", True): (
        Recipe(dense_epochs=12, sparse_epochs=10, finetune_epochs=6, strengths=_DIGITS, curve_epochs=1), None, None,
    ),
    ("cifar10", False): (
        Recipe(
            dense_epochs=0, sparse_epochs=15, finetune_epochs=25, sparse_lr=0.02, finetune_lr=0.05, batch_size=128,
            strengths=_CIFAR_LONG,
        ),
        None, None,
    ),
    ("cifar10", True): (
        Recipe(
            dense_epochs=0, sparse_epochs=3, finetune_epochs=8, sparse_lr=0.02, finetune_lr=0.05, strengths=_CIFAR,
            curve_epochs=1,
        ),
        3_000, 2_000,
    ),
}  # fmt: skip
"""By data set, and whether it is the quick form."""

LABELS: dict[MethodName, str] = {
    "dense": "dense control",
    "random": "random units",
    "depgraph": "DepGraph",
    "torque": "Torque",
    "etp": "ETP",
}
"""The methods as they are called in tables and plots."""

DataName = Literal["digits", "cifar10"]

METHODS: tuple[MethodName, ...] = ("dense", "random", "depgraph", "torque", "etp")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Everything that a run of the demo depends on.

    Attributes:
        data: ``digits`` (8x8, a small residual network that is trained first) or ``cifar10`` (ResNet-20 with its
            published weights).
        speed_up: dense MACs over pruned MACs.
        seeds: number of repetitions, each with its own initialisation and data order.
        recipe: epochs, learning rates and strengths.
        methods: what is compared, in the order of the table.
        train_limit: training images; ``None``: all.
        test_limit: test images; ``None``: all.
        latency_batch: images in the batch whose latency is measured.
        latency_rounds: how often it is measured.
        quick: whether this is the short form, for the command in the report.
    """

    data: DataName = "digits"
    speed_up: float = 8.0
    seeds: int = 3
    recipe: Recipe
    methods: tuple[MethodName, ...] = METHODS
    train_limit: int | None = None
    test_limit: int | None = None
    latency_batch: int = 64
    latency_rounds: int = 30
    quick: bool = False

    @classmethod
    def preset(
        cls, data: str = "digits", *, quick: bool = False, speed_up: float = 8.0, seeds: int | None = None
    ) -> DemoConfig:
        """The documented defaults; ``quick`` means one seed unless ``seeds`` is given, and a short schedule."""
        recipe, train_limit, test_limit = PRESETS[data, quick]
        return cls(
            data="cifar10" if data == "cifar10" else "digits", speed_up=float(speed_up),
            seeds=seeds or (1 if quick else 3), recipe=recipe, train_limit=train_limit, test_limit=test_limit,
            quick=quick,
        )  # fmt: skip

    @property
    def command(self) -> str:
        """The command line of this configuration."""
        quick = " --quick" if self.quick else ""
        return f"etp-graph demo --data {self.data} --speed-up {self.speed_up:g} --seeds {self.seeds}{quick}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What :func:`run_demo` found.

    Attributes:
        config: what was run.
        outcomes: one for each seed and method.
        macs: of the dense network.
        params: of the dense network.
        seconds: of the whole demo.
        environment: versions and hardware.
    """

    config: DemoConfig
    outcomes: tuple[MethodOutcome, ...]
    macs: int
    params: int
    seconds: float
    environment: dict[str, str]

    def of(self, method: MethodName) -> list[MethodOutcome]:
        """The outcomes of one method, a seed each."""
        return [outcome for outcome in self.outcomes if outcome.method == method]
