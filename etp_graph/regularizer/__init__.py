"""The force of a pruning method inside a training loop."""

from __future__ import annotations

from ._joint_steps import JointSteps, Optimizers, inner_optimizers
from ._regularizer import Regularizer
from ._settings import Beta, ChosenBy, ForceSettings, Kappa, Mode, Order, RegularizerSettings

__all__ = [
    "Beta",
    "ChosenBy",
    "ForceSettings",
    "JointSteps",
    "Kappa",
    "Mode",
    "Optimizers",
    "Order",
    "Regularizer",
    "RegularizerSettings",
    "inner_optimizers",
]
