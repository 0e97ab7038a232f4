"""Exponential Torque Pruning."""

from __future__ import annotations

from .. import forces
from .method import Method

PRESETS = (
    Method(
        name="etp",
        source="ETP: Modi et al. 2025; by rank of importance, as a proximal step as strong as the budget asks for, on "
        "the units of least need and least effect on the loss (Molchanov et al. 2019) for what they cost",
        force=forces.Exponential(), beta="auto", order="importance", mode="prox", kappa="mean",
        acts_on="losers", chosen_by="need-taylor", criterion="etp", rank="score_per_sqrt_cost",
    ),
    Method(
        name="etp-paper",
        source="ETP: Modi et al. 2025, eq. 8-10, with lambda = exp(5/N): index order, pivot 0, a term of the loss",
        force=forces.Exponential(), beta=1e-3, order="index", mode="loss", kappa="one", criterion="etp",
    ),
    Method(
        name="etp-heaviside", source="ETP: Modi et al. 2025, eq. 6; by rank of importance, as a proximal step",
        force=forces.Heaviside(), beta=1e-2, order="importance", mode="prox", criterion="etp",
    ),
)  # fmt: skip
