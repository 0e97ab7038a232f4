"""What a task of the comparison is: a model, real data in three parts, a training recipe and a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.common.contestant_names import begins_fresh
from benchmarks.common.precision import Precision

Scale = Literal["smoke", "cpu", "full", "paper"]
Part = Literal["val", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What is measured. ``higher``: whether more is better; ``percent``: shown as 100 times the value."""

    name: str
    higher: bool = True
    percent: bool = False

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` is better than ``b``."""
        return a > b if self.higher else a < b


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast every method trains on a task; the same for all of them.

    Attributes:
        dense_steps: optimizer steps of the checkpoint that all methods begin with; 0: its weights are given.
        sparse_steps: before surgery, with the force of the method, if it has one.
        finetune_steps: after surgery. A method without a force takes the steps of both phases after surgery.
        scratch_steps: of the small dense network: as many as the checkpoint and both phases took, where it was trained.
        dense_rate, sparse_rate, finetune_rate: peaks of the learning rate.
        batch_size: examples of a step.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adamw``.
        weight_decay: of the optimizer.
        clip: largest norm of the gradient; 0: not clipped.
        tune_share: share of both phases that a tuning trial takes.
        pushes: the strengths that are tried, as dimensionless pushes (:mod:`benchmarks.contest.strength`).
        tuned_at: the speed-up whose trials choose a strength for all speed-ups; 0: each has trials of its own.
        extensions: how many further pushes may be tried beyond an edge of ``pushes`` while the best one lies there.
        precision: of the forward and backward pass of a training step; ``bf16`` is autocast with weights in fp32,
            and fp32 where a CPU would emulate it; the lines say which it was.
            Networks are always evaluated in fp32.
    """

    dense_steps: int
    sparse_steps: int
    finetune_steps: int
    scratch_steps: int
    dense_rate: float
    sparse_rate: float
    finetune_rate: float
    batch_size: int
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    clip: float = 0.0
    tune_share: float = 0.3
    pushes: tuple[float, ...] = (0.05, 0.2, 0.8, 3.0)
    extensions: int = 0
    tuned_at: float = 0.0
    precision: Precision = "fp32"

    def trial(self) -> Recipe:
        """The recipe of a tuning trial: the same phases, shorter."""
        return replace(
            self,
            sparse_steps=max(1, round(self.sparse_steps * self.tune_share)),
            finetune_steps=max(1, round(self.finetune_steps * self.tune_share)),
            # A short one would favour high rates too much.
            scratch_steps=max(1, round(self.scratch_steps * max(0.5, self.tune_share))),
        )


def concerns(recipe: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What of a recipe a method depends on: the steps of the small dense network concern no other.

    Lines from before a setting existed were run with its default.
    """
    defaults = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
    whole = {**defaults, **recipe}
    whole["pushes"] = list(whole["pushes"])  # as JSON gives them back
    return {name: value for name, value in whole.items() if name != "scratch_steps" or begins_fresh(method)}


CALIBRATION, CALIBRATED_AT_ONCE = 256, 64
"""Examples that calibrate pruning without training, and those of one batch."""


class TaskUnavailableError(Exception):
    """Data, weights or a library of the task are not at hand; the message says which."""


class Task(ABC):
    """A task at one scale. Examples are numbered; the parts for choosing and for the final figure are kept apart.

    Attributes:
        name: of the task, and of its results.
        title: what it is, for the page.
        metric: what is measured.
        recipe: the training of all methods.
        speed_ups: dense over pruned MACs, where nothing else is asked for.
        prune: kinds of units, see :func:`etp_graph.trace`; ``None``: the usual ones.
        ignore: modules whose units all stay.
        own_checkpoints: every seed begins with a checkpoint of its own, where little else depends on the seed.
        classes: whether the model's output are logits over classes in its last dimension.
        checkpoint_note: what the checkpoint is.
        data: names the training data, where a task has others than it once had: a cached checkpoint knows them.
    """

    name: str
    title: str
    metric: Metric
    recipe: Recipe
    speed_ups: tuple[float, ...]
    prune: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    classes = True
    own_checkpoints = False
    checkpoint_note = "trained by this benchmark with seed 0 and cached"
    data = ""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    @property
    def device(self) -> torch.device:
        """Where networks and data are: on a GPU at the scales of whole data sets, if there is one."""
        large = self.scale in ("full", "paper")
        return torch.device("cuda" if large and torch.cuda.is_available() else "cpu")

    def place(self) -> None:
        """Move all data to the device."""
        for name, value in vars(self).items():
            setattr(self, name, _moved(value, self.device))

    @property
    @abstractmethod
    def n_train(self) -> int:
        """Number of training examples; validation examples are not among them."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with fresh weights, drawn from the global generator."""

    def start(self) -> nn.Module:
        """The model before the checkpoint's training: given weights where there are any."""
        return self.build()

    @abstractmethod
    def example(self) -> Any:
        """Inputs of one example, on which costs are counted."""

    def latency_inputs(self) -> Any:
        """Inputs with which latency is measured; they come from the training set."""
        return self.example()

    @abstractmethod
    def inputs(self, chosen: Tensor) -> Any:
        """What the model takes for the training examples ``chosen`` [n], as they are."""

    @abstractmethod
    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """The training loss on the examples ``chosen`` [n]; the generator varies them (augmentation)."""

    def labels(self, chosen: Tensor) -> Tensor | None:
        """The class of each sample of a forward on these examples; ``None`` where samples have none."""
        return None

    @abstractmethod
    def evaluate(self, model: nn.Module, part: Part) -> float:
        """The metric on a part, in eval mode."""

    def details(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Further metrics, for the record; nothing is chosen by them."""
        return {}

    def calibration(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Training examples that calibrate pruning without training, drawn by the generator, batch by batch."""
        order = torch.randperm(self.n_train, generator=generator)
        return order[:CALIBRATION].split(CALIBRATED_AT_ONCE)

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps of one pass over the training examples (an epoch)."""
        return self.n_train // min(self.recipe.batch_size, self.n_train)

    def order_of_pass(self, generator: torch.Generator) -> Tensor:
        """The order of the training examples in one pass, [n_train]; consecutive ones make a batch."""
        return torch.randperm(self.n_train, generator=generator)

    def batches(self, *, seed: int, start: int, steps: int) -> Iterator[Tensor]:
        """The examples of the steps ``start`` to ``start + steps``: a function of the seed and the number of the step.

        Every pass over the data has an order of its own; the last, smaller batch of a pass is left out.
        """
        size = min(self.recipe.batch_size, self.n_train)
        per_pass = self.steps_per_pass
        order, number = torch.empty(0), -1
        for step in range(start, start + steps):
            if step // per_pass != number:
                number = step // per_pass
                order = self.order_of_pass(torch.Generator().manual_seed(1_000_003 * seed + number))
            first = step % per_pass * size
            yield order[first : first + size]


def _moved(value: Any, device: torch.device) -> Any:
    """The value with all tensors in it (and graphs of torch-geometric) on the device."""
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(inner, device) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value.to(device) if isinstance(value, Tensor) or hasattr(value, "edge_index") else value


def require(condition: bool, message: str) -> None:
    """Raise :class:`TaskUnavailableError` unless the condition holds."""
    if not condition:
        raise TaskUnavailableError(message)
