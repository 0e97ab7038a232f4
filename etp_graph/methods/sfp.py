"""Soft filter pruning."""

from __future__ import annotations

from .method import Method

PRESETS = (
    Method(
        name="sfp", source="SFP: He et al. 2018, algorithm 1: filters at zero train on, one rate for all groups",
        soft_every=100, criterion="magnitude", scope="local",
    ),
)  # fmt: skip
