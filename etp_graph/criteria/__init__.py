"""Criteria: functions of a model and its plan that return one score per unit. Units of low score are removed first.

Every criterion reads the parameters and gradients of the model, or statistics that a collector recorded, and changes
nothing. It returns a float tensor ``[plan.n_units]`` on the model's device, finite and not negative. Scores of locked
groups have no meaning.

Scores do not depend on the order of slices. If the units of a group are permuted, their scores are permuted in the same
way, except for ``random`` and the torque in index order, which depend on the position of a unit in its group.

Each criterion is one file of this package or of ``from_activations``, which registers itself. A criterion of your own
is a function that ``register`` or ``register_criterion`` adds to the table.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from ._bn_scale import bn_scale
from ._common import Normalize
from ._filter_magnitude import filter_magnitude
from ._fpgm import fpgm
from ._lamp import lamp
from ._magnitude import magnitude
from ._random import random
from ._registry import COLLECTED, CRITERIA, Criterion, Score, find_criterion, register, register_criterion, temporary
from ._sensitivity import sensitivity
from ._taylor import taylor
from ._torque import Forced, etp, torque
from ._whc import whc
from .from_activations._activation import activation
from .from_activations._f_statistic import f_statistic
from .from_activations._fisher import fisher
from .from_activations._flap import flap
from .from_activations._hrank import hrank
from .from_activations._kron_obs import kron_obs
from .from_activations._obs import obs
from .from_activations._reap import reap
from .from_activations._wanda import wanda

__all__ = [
    "COLLECTED",
    "CRITERIA",
    "Criterion",
    "Forced",
    "Normalize",
    "Score",
    "activation",
    "bn_scale",
    "etp",
    "f_statistic",
    "filter_magnitude",
    "find_criterion",
    "fisher",
    "flap",
    "fpgm",
    "hrank",
    "kron_obs",
    "lamp",
    "magnitude",
    "obs",
    "random",
    "reap",
    "register",
    "register_criterion",
    "sensitivity",
    "taylor",
    "temporary",
    "torque",
    "wanda",
    "whc",
]

# A new file registers its criterion without a line here; the imports above tell type checkers the names.
for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Score:
    """Return the registered criterion of this name."""
    if name not in CRITERIA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; criteria are {', '.join(CRITERIA)}")
    return CRITERIA[name]
