"""Criteria: functions of a model and its plan that return one score per unit. Units of low score are removed first.

Every criterion reads the parameters and gradients of the model, or statistics that a collector recorded, and changes
nothing. It returns a float tensor ``[plan.n_units]`` on the model's device, finite and not negative. Scores of locked
groups have no meaning.

Scores do not depend on the order of slices. If the units of a group are permuted, their scores are permuted in the same
way, except for ``random`` and the torque in index order, which depend on the position of a unit in its group.
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
"""All criteria of the library, by name."""

COLLECTED = ("taylor", "activation", "hrank", "f_statistic")
"""Names of the criteria that need batches of data, which :func:`etp_graph.collect.watch` records."""
