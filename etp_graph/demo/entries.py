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
class Norms:
    """Norms of the units of one group against their distance from the pivot, after some epochs of the sparse phase."""

    group: str
    epoch: int
    distance: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
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
    norms: tuple[Norms, ...] = ()
