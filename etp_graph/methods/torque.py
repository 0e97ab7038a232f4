"""Torque-based structured pruning."""

from __future__ import annotations

from .. import forces
from .method import Method

PRESETS = (
    Method(
        name="torque", source="Torque: Gupta et al. 2024, eq. 9-12",
        force=forces.Linear(), beta=1e-3, order="index", mode="gradient", kappa="one", criterion="etp",
    ),
    Method(
        name="torque-l1", source="Torque: Gupta et al. 2024, eq. 13: the L1 version",
        force=forces.LinearL1(), beta=1e-5, order="index", mode="gradient", kappa="one", criterion="etp",
    ),
)  # fmt: skip
