"""Group sparsity: the same force on every unit, or more on the less important ones."""

from __future__ import annotations

from .. import forces
from .method import Method

PRESETS = (
    Method(
        name="depgraph", source="DepGraph: Fang et al. 2023, eq. 5, in this library's own implementation",
        force=forces.Growing(), beta=5e-4, mode="gradient", kappa="one", criterion="magnitude", normalize="max",
    ),
    Method(
        name="group-lasso", source="Yuan & Lin 2006: the same force on every unit",
        force=forces.Uniform(), beta=3e-4, mode="prox", criterion="magnitude",
    ),
)  # fmt: skip
