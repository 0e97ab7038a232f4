"""Norms of units, and chance; no sparse phase."""

from __future__ import annotations

from .method import Method

PRESETS = (
    Method(name="l1", source="Li et al. 2017, over all slices of a unit", criterion="magnitude", p=1),
    Method(name="l1-uniform", source="Li et al. 2017, the same share of every group", criterion="magnitude", p=1,
           scope="local"),
    Method(name="random", source="random units: the control that every method has to beat", criterion="random"),
)  # fmt: skip
