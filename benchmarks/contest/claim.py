"""The papers' own claim, as contestants: what does the exponential force do for filters that are ordered by index?

All of these push whole filters towards zero in the order of their index (Torque: Gupta et al. 2024; ETP: Modi et al.
2025, eq. 8-10), and the filters of the least mean weight go, by one threshold for all layers, of which each keeps five.
Only the force differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from etp_graph import forces, methods
from etp_graph.forces import Force
from etp_graph.methods import Method

_WIDEST = 64
"""Channels of the last stage of a CIFAR ResNet: there one base for all layers equals ``index-exponential``."""
_FORCES: Mapping[str, Force] = {
    "index-uniform": forces.Uniform(),
    "index-linear": forces.Linear(),
    "index-base": forces.Exponential(base=round(2.718281828 ** (5 / _WIDEST), 4)),
    "index-exponential": forces.Exponential(),
}
CLAIM: Mapping[str, Method] = {
    name: replace(
        methods.get("torque-published-mf5"), name=name, force=force,
        source="the papers' claim: filters by index, removed by mean weight, with another force",
    )
    for name, force in _FORCES.items()
}  # fmt: skip
"""The four forces, each tuned like every strength, or with a strength that a plan gives."""
