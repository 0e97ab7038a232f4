"""Criteria that compare filters with one another; no sparse phase."""

from __future__ import annotations

from .method import Method

PRESETS = (
    Method(
        name="fpgm", source="FPGM: He et al. 2019, eq. 6: filters near the geometric median go",
        criterion="fpgm", scope="local",
    ),
    Method(
        name="whc", source="WHC: Chen et al. 2023: norm times weighted dissimilarity",
        criterion="whc", scope="local",
    ),
)  # fmt: skip
