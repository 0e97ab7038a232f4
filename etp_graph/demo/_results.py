"""Input and output of the comparison: a training recipe, and the outcome of each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MethodName = Literal["dense", "random", "depgraph", "torque", "etp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Epochs, learning rates and strengths of the comparison, the same for every method.

    Attributes:
        dense_epochs: epochs of training the dense network that all methods start from; 0 if it is pretrained.
        sparse_epochs: epochs with the force, before surgery.
        finetune_epochs: epochs after surgery.
        dense_lr: peak learning rate of training the dense network.
        sparse_lr: peak learning rate of the sparse phase.
        finetune_lr: peak learning rate of fine-tuning.
        batch_size: number of images in a batch.
        strengths: strength of the force by method: β of ``torque``, ``reg`` of ``depgraph``; ``etp`` has none.
        curve: further speed-ups, for the curve of accuracy against speed-up. The network after the sparse phase is
            pruned to each. The strength of ``etp`` follows from the target, so it has a sparse phase for each.
        curve_epochs: epochs of fine-tuning for each point of the curve.
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
        """Return the number of epochs of every method, from the dense checkpoint on."""
        return self.sparse_epochs + self.finetune_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Accuracies at one speed-up of the curve: right after surgery, and after a few epochs of fine-tuning."""

    speed_up: float
    pruned: float
    finetuned: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNorms:
    """Norm and distance from the pivot of each unit of one group, after some epochs of the sparse phase."""

    group: str
    epoch: int
    distance: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOutcome:
    """Accuracies, costs and times of one method. Accuracies are shares of the test images.

    Attributes:
        method: name of the method.
        seed: seed of initialisation and data order.
        dense: accuracy of the checkpoint.
        sparse: accuracy after the sparse phase, before surgery.
        pruned: accuracy right after surgery.
        finetuned: accuracy after fine-tuning.
        macs: MACs of the pruned network, for one image.
        params: parameters of the pruned network.
        speed_up: MACs of the checkpoint over MACs of the pruned network.
        seconds: time of sparse training, surgery and fine-tuning.
        latency_ratio: p50 latency of the checkpoint over that of the pruned network; 0 until it is measured.
        curve: accuracies at other speed-ups.
        norms: unit norms during the sparse phase.
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

# Not tuned: the quick strengths, divided by the ratio of the numbers of steps (5265 to 141), so that strength times
# steps stays the same.
_CIFAR_LONG = {name: value / 37 for name, value in _CIFAR.items()}

Preset = tuple[Recipe, int | None, int | None]
"""A recipe, the number of training images, and the number of test images; ``None``: all images."""

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
"""Presets by name of the data set, and by whether it is the quick form."""

LABELS: dict[MethodName, str] = {
    "dense": "dense control",
    "random": "random units",
    "depgraph": "DepGraph",
    "torque": "Torque",
    "etp": "ETP",
}
"""Names of the methods in tables and plots."""

DataName = Literal["digits", "cifar10"]

METHODS: tuple[MethodName, ...] = ("dense", "random", "depgraph", "torque", "etp")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Configuration of a run of the demo.

    Attributes:
        data: ``digits`` (8x8, a small residual network that is trained first) or ``cifar10`` (ResNet-20 with its
            published weights).
        speed_up: dense MACs over pruned MACs.
        seeds: number of repetitions, each with its own initialisation and data order.
        recipe: epochs, learning rates and strengths.
        methods: the methods to compare, in the order of the table.
        train_limit: number of training images; ``None``: all.
        test_limit: number of test images; ``None``: all.
        latency_batch: number of images in the batch for measuring latency.
        latency_rounds: number of latency measurements of each model.
        quick: True for the short form; used only for the command in the report.
        validation: measure on the validation images. The test images are not read.
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
    validation: bool = False

    @classmethod
    def preset(
        cls,
        data: str = "digits",
        *,
        quick: bool = False,
        speed_up: float = 8.0,
        seeds: int | None = None,
        validation: bool = False,
    ) -> DemoConfig:
        """Return the documented defaults. ``quick``: a short schedule, and one seed unless ``seeds`` is given."""
        recipe, train_limit, test_limit = PRESETS[data, quick]
        return cls(
            data="cifar10" if data == "cifar10" else "digits", speed_up=float(speed_up),
            seeds=seeds or (1 if quick else 3), recipe=recipe, train_limit=train_limit, test_limit=test_limit,
            quick=quick, validation=validation,
        )  # fmt: skip

    @property
    def command(self) -> str:
        """Return the command line of this configuration."""
        quick = " --quick" if self.quick else ""
        part = " --validation" if self.validation else ""
        return f"etp-graph demo --data {self.data} --speed-up {self.speed_up:g} --seeds {self.seeds}{quick}{part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Result of :func:`run_demo`.

    Attributes:
        config: configuration of the run.
        outcomes: one outcome for each seed and method.
        macs: MACs of the dense network.
        params: parameters of the dense network.
        seconds: time of the whole demo.
        environment: versions and hardware.
    """

    config: DemoConfig
    outcomes: tuple[MethodOutcome, ...]
    macs: int
    params: int
    seconds: float
    environment: dict[str, str]

    def of(self, method: MethodName) -> list[MethodOutcome]:
        """Return the outcomes of one method, one for each seed."""
        return [outcome for outcome in self.outcomes if outcome.method == method]
