"""The presets of the library: methods of the literature and variants of this library's own, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from etp_graph import forces, schedules

from ._method import Method
from ._registry import register

_PRESETS = (
    # Exponential Torque Pruning.
    Method(
        name="etp",
        source="ETP: Modi et al. 2025; by rank of importance, as a proximal step as strong as the budget asks for, on "
        "the units of least need and least effect on the loss (Molchanov et al. 2019), the same share of every group",
        force=forces.Exponential(), beta="auto", order="importance", mode="prox", kappa="mean",
        acts_on="losers", chosen_by="need-taylor", criterion="etp", scope="local", rank="score_per_sqrt_cost",
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
    # Torque-based structured pruning.
    Method(
        name="torque", source="Torque: Gupta et al. 2024, eq. 9-12",
        force=forces.Linear(), beta=1e-3, order="index", mode="gradient", kappa="one", criterion="etp",
    ),
    Method(
        name="torque-l1", source="Torque: Gupta et al. 2024, eq. 13: the L1 version",
        force=forces.LinearL1(), beta=1e-5, order="index", mode="gradient", kappa="one", criterion="etp",
    ),
    Method(
        name="torque-published",
        source="Torque: Gupta et al. 2024, eq. 13: L1 torque on filters by index; filters of the least mean |w| go, by "
        "one threshold for all layers, of which each keeps 30 % (table 1)",
        force=forces.LinearL1(), beta=1e-6, order="index", mode="gradient", kappa="one", acts_on="filters",
        criterion="filter_magnitude", max_ratio=0.7,
    ),
    Method(
        name="torque-published-mf5",
        source="Torque: Gupta et al. 2024, as torque-published, but each layer keeps 5 filters (figure 2)",
        force=forces.LinearL1(), beta=1e-6, order="index", mode="gradient", kappa="one", acts_on="filters",
        criterion="filter_magnitude", min_units=5,
    ),
    # Group sparsity: the same force on every unit, or more on the less important ones.
    Method(
        name="depgraph", source="DepGraph: Fang et al. 2023, eq. 5, in this library's own implementation",
        force=forces.Growing(), beta=5e-4, mode="gradient", kappa="one", criterion="magnitude", normalize="max",
    ),
    Method(
        name="group-lasso", source="Yuan & Lin 2006: the same force on every unit",
        force=forces.Uniform(), beta=3e-4, mode="prox", criterion="magnitude",
    ),
    # Network Slimming.
    Method(
        name="network-slimming", source="Network Slimming: Liu et al. 2017: L1 on the scales of batch norms",
        force=forces.Lasso(), beta=1e-4, mode="gradient", kappa="one", acts_on="scales", criterion="bn_scale",
    ),
    # Growing regularization: weight decay that rises until the units which it acts on are gone.
    Method(
        name="greg1", source="GReg-1: Wang et al. 2021, section 3.2: growing L2 on units chosen by L1 norm",
        force=forces.Ridge(), beta=1.0, mode="gradient", kappa="one", strength=schedules.WarmUp(end=1.0),
        acts_on="losers", criterion="magnitude", p=1, scope="local",
    ),
    Method(
        name="greg2", source="GReg-2: Wang et al. 2021, section 3.3: growing L2 on all units until they separate",
        force=forces.Ridge(), beta=1.0, mode="gradient", kappa="one", strength=schedules.WarmUp(end=1.0),
        acts_on="losers", select_at=0.25, criterion="magnitude", p=1, scope="local",
    ),
    # The same with the growth of the authors' code: λ to 1 in 100,000 iterations, then 10,000 to stabilize.
    Method(
        name="greg1-published",
        source="GReg-1: Wang et al. 2021, as its authors' code: λ grows to 1 in 100,000 of 110,000 iterations",
        force=forces.Ridge(), beta=1.0, mode="gradient", kappa="one", strength=schedules.WarmUp(end=100 / 110),
        acts_on="losers", criterion="filter_magnitude", scope="local",
    ),
    Method(
        name="greg2-published",
        source="GReg-2: Wang et al. 2021, as its authors' code: λ grows to 0.01 on all units in 10,000 of 119,000 "
        "iterations, then on the chosen ones to 1 in 99,000",
        force=forces.Ridge(), beta=1.0, mode="gradient", kappa="one",
        strength=schedules.PiecewiseLinear(points=((0.0, 0.0), (10 / 119, 0.01), (109 / 119, 1.0))),
        acts_on="losers", select_at=10 / 119, criterion="filter_magnitude", scope="local",
    ),
    # Soft filter pruning.
    Method(
        name="sfp", source="SFP: He et al. 2018, algorithm 1: filters at zero train on, one rate for all groups",
        soft_every=100, criterion="magnitude", scope="local",
    ),
    # Criteria that compare filters with one another; no sparse phase.
    Method(
        name="fpgm", source="FPGM: He et al. 2019, eq. 6: filters near the geometric median go",
        criterion="fpgm", scope="local",
    ),
    Method(
        name="whc", source="WHC: Chen et al. 2023: norm times weighted dissimilarity",
        criterion="whc", scope="local",
    ),
    # Criteria that batches of data decide; no sparse phase, but one to collect them.
    Method(name="hrank", source="HRank: Lin et al. 2020, eq. 5: rank of feature maps", criterion="hrank",
           scope="local"),
    Method(name="taylor", source="Taylor: Molchanov et al. 2019, eq. 8: squared sum of gradient times weight",
           criterion="taylor"),
    Method(name="f-statistic", source="Fisher 1925: class-conditional screening, variance between over within classes",
           criterion="f_statistic"),
    # Norms of units, and chance; no sparse phase.
    Method(name="l1", source="Li et al. 2017, over all slices of a unit", criterion="magnitude", p=1),
    Method(name="l1-uniform", source="Li et al. 2017, the same share of every group", criterion="magnitude", p=1,
           scope="local"),
    # Gradual pruning: units are set to zero while the model trains, without a force.
    Method(
        name="l1-gradual",
        source="Zhu & Gupta 2017, eq. 1: units of the least L1 norm are set to zero along the cubic schedule, the same "
        "share of every group",
        force=forces.Uniform(), beta="auto", mode="mask", kappa="one", acts_on="losers", chosen_by="criterion",
        criterion="magnitude", p=1, scope="local",
    ),
    Method(
        name="taylor-gradual",
        source="Molchanov et al. 2019, eq. 8, with gradients of training: units of the least effect on the loss are "
        "set to zero along the cubic schedule of Zhu & Gupta 2017",
        force=forces.Uniform(), beta="auto", mode="mask", kappa="one", acts_on="losers", chosen_by="criterion",
        criterion="taylor",
    ),
    Method(name="random", source="random units: the control that every method has to beat", criterion="random"),
)  # fmt: skip

for _preset in _PRESETS:
    register(_preset)

_CHANGED: Mapping[str, tuple[Mapping[str, Any], ...]] = {"etp": ({"scope": "global"},)}
"""Name of a preset -> the settings that differed in former versions."""


def former_versions(method: Method) -> tuple[Method, ...]:
    """Return what a preset was in former versions of the library; nothing if the method is no preset."""
    return tuple(replace(method, **changed) for changed in _CHANGED.get(method.name, ()) if method in _PRESETS)
