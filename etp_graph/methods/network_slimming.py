"""Network Slimming."""

from __future__ import annotations

from .. import forces
from .method import Method

PRESETS = (
    Method(
        name="network-slimming", source="Network Slimming: Liu et al. 2017: L1 on the scales of batch norms",
        force=forces.Lasso(), beta=1e-4, mode="gradient", kappa="one", acts_on="scales", criterion="bn_scale",
    ),
)  # fmt: skip
