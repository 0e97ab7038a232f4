"""Criteria that batches of data decide; no sparse phase, but one to collect them."""

from __future__ import annotations

from .method import Method

PRESETS = (
    Method(name="hrank", source="HRank: Lin et al. 2020, eq. 5: rank of feature maps", criterion="hrank",
           scope="local"),
    Method(name="taylor", source="Taylor: Molchanov et al. 2019, eq. 8: squared sum of gradient times weight",
           criterion="taylor"),
    Method(name="f-statistic", source="Fisher 1925: class-conditional screening, variance between over within classes",
           criterion="f_statistic"),
)  # fmt: skip
