"""The force of a pruning method inside a training loop."""

from __future__ import annotations

from ._regularizer import Regularizer
from ._settings import Beta, ChosenBy, ForceSettings, Kappa, Mode, Order, RegularizerSettings

__all__ = [
    "Beta",
    "ChosenBy",
    "ForceSettings",
    "Kappa",
    "Mode",
    "Order",
    "Regularizer",
    "RegularizerSettings",
]
