"""Criteria: model + plan -> one score per unit; the units with the lowest scores go first.

Every criterion reads the parameters (and gradients) of the model, or what a collector recorded of its activations,
changes nothing, and returns a float tensor ``[plan.n_units]`` on the model's device that is finite and not negative.
Scores do not depend on the order of slices, and follow a permutation of the units (but for ``random`` and the torque
in index order, where the position of a unit is what the score is about). Scores of locked groups mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ._activation import activation
from ._bn_scale import bn_scale
from ._f_statistic import f_statistic
from ._fpgm import fpgm
from ._hrank import hrank
from ._lamp import lamp
from ._magnitude import magnitude
from ._random import random
from ._taylor import taylor
from ._torque import etp, torque
from ._whc import whc

CRITERIA: Mapping[str, Callable[..., Tensor]] = {
    "etp": etp,
    "torque": torque,
    "magnitude": magnitude,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "whc": whc,
    "lamp": lamp,
    "taylor": taylor,
    "activation": activation,
    "hrank": hrank,
    "f_statistic": f_statistic,
    "random": random,
}
"""Every criterion of the library, by name."""

COLLECTED = ("taylor", "activation", "hrank", "f_statistic")
"""The criteria that need batches of data, recorded by :func:`etp_graph.collect.watch`."""
