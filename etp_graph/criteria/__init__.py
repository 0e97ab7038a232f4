"""Criteria: model + plan -> one score per unit; the units with the lowest scores go first.

Every criterion reads the parameters (and gradients) of the model, or what a collector recorded of its activations,
changes nothing, and returns a float tensor ``[plan.n_units]`` on the model's device that is finite and not negative.
Scores do not depend on the order of slices, and follow a permutation of the units (but for ``random`` and the torque
in index order, where the position of a unit is what the score is about). Scores of locked groups mean nothing.
"""

from __future__ import annotations

from ._activation import activation
from ._bn_scale import bn_scale
from ._common import Normalize
from ._f_statistic import f_statistic
from ._fpgm import fpgm
from ._hrank import hrank
from ._lamp import lamp
from ._magnitude import magnitude
from ._random import random
from ._registry import COLLECTED, CRITERIA
from ._taylor import taylor
from ._torque import Forced, etp, torque
from ._whc import whc

__all__ = [
    "COLLECTED",
    "CRITERIA",
    "Forced",
    "Normalize",
    "activation",
    "bn_scale",
    "etp",
    "f_statistic",
    "fpgm",
    "hrank",
    "lamp",
    "magnitude",
    "random",
    "taylor",
    "torque",
    "whc",
]
