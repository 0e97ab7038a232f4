"""Presets of the literature against the formulas of their papers, written as loops over the units of the toy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import etp_graph as etp
from etp_graph import methods
from tests.support.forced_toy import positions
from tests.support.models.toy import Toy, toy_plan
from tests.support.training_loops import X, toy

LAYERS = (slice(0, 8), slice(8, 14))
"""The units of the two groups that are not locked."""


def vectors(model: nn.Module) -> list[Tensor]:
    """All numbers of each unit of the open groups, side by side."""
    found: dict[int, list[Tensor]] = {}
    for unit, name, axis, at in positions(model, toy_plan()):
        found.setdefault(unit, []).append(model.get_parameter(name).detach().select(axis, at).flatten())
    return [torch.cat(found[unit]) for unit in range(14)]


def relative(values: list[float]) -> list[float]:
    """Divided by the mean of the group, as scores are before groups are compared."""
    means = [sum(values[span]) / len(values[span]) for span in LAYERS]
    return [value / means[unit >= 8] for unit, value in enumerate(values)]


def l1(w: list[Tensor]) -> list[float]:
    """Li et al. 2017, section 3.1: s = Σ|w|."""
    return [sum(abs(float(x)) for x in unit) for unit in w]


def fpgm(w: list[Tensor]) -> list[float]:
    """He et al. 2019, eq. 6: g(x) = Σ_j ‖x − F_j‖ over the filters of the layer."""
    return [sum(float((w[u] - w[v]).norm()) for v in range(*LAYERS[u >= 8].indices(14))) for u in range(14)]


def whc(w: list[Tensor]) -> list[float]:
    """Chen et al. 2023: ‖F_i‖ Σ_{j≠i} ‖F_j‖ (1 − |cos(F_i, F_j)|)."""
    found = []
    for u in range(14):
        total = 0.0
        for v in range(*LAYERS[u >= 8].indices(14)):
            if v != u:
                cosine = float(w[u] @ w[v]) / float(w[u].norm() * w[v].norm())
                total += float(w[v].norm()) * (1 - abs(cosine))
        found.append(float(w[u].norm()) * total)
    return found


@pytest.mark.parametrize(
    ("name", "formula", "scope"),
    [("l1", l1, "global"), ("l1-uniform", l1, "local"), ("l1-gradual", l1, "local"), ("fpgm", fpgm, "local"),
     ("whc", whc, "local"), ("greg1", l1, "local"), ("greg2", l1, "local")],
)  # fmt: skip
def test_scores_are_those_of_the_paper(name: str, formula: object, scope: str) -> None:
    model, method = toy(), methods.get(name)
    wanted = relative(formula(vectors(model)))  # type: ignore[operator]
    assert method.scores(model, toy_plan())[:14].tolist() == pytest.approx(wanted, rel=1e-4)
    assert method.scope == scope


@pytest.mark.parametrize("name", ["sfp", "group-lasso"])
def test_the_l2_norm_is_that_of_the_whole_unit(name: str) -> None:
    """He et al. 2018, eq. 4 with p = 2; Yuan & Lin 2006."""
    model = toy()
    wanted = relative([math.sqrt(sum(float(x) ** 2 for x in unit)) for unit in vectors(model)])
    assert methods.get(name).scores(model, toy_plan())[:14].tolist() == pytest.approx(wanted, rel=1e-4)


def test_network_slimming_has_one_threshold_on_gamma_over_all_layers() -> None:
    """Liu et al. 2017, section 3: the channels of smallest |γ| in the network, whatever their layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.9, -0.01, 0.8, 0.02, -0.7, 0.6]))
        model[4].weight.copy_(torch.tensor([0.5, 0.4, 0.3, -0.03, 0.2, 0.1]))
    plan, method = etp.trace(model, X[:1]), methods.get("network-slimming")
    scores = method.scores(model, plan)
    assert set(scores[:12].argsort()[:3].tolist()) == {1, 3, 9}
    assert method.scope == "global"


def test_group_lasso_is_its_proximal_step() -> None:
    """w <- w · max(0, 1 − η β √n / ‖w‖) for a unit of n numbers, at once for all its slices."""
    model, method = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), methods.get("group-lasso")
    plan = etp.trace(model, torch.randn(1, 3))
    first, second = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    bias = model[0].bias.detach().clone()
    found = replace(method, beta=0.05).regularizer(model, plan)
    assert found is not None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with found.attach(optimizer := SGD(model.parameters(), lr=0.5)):
        optimizer.step()
    for u in range(4):
        unit = torch.cat([first[u], bias[u : u + 1], second[:, u]])
        factor = max(0.0, 1 - 0.5 * 0.05 * math.sqrt(len(unit)) / float(unit.norm()))
        torch.testing.assert_close(model[0].weight[u], first[u] * factor)
        torch.testing.assert_close(model[2].weight[:, u], second[:, u] * factor)


def test_depgraph_pushes_by_importance_within_the_group() -> None:
    """Fang et al. 2023, eq. 4-5: γ = 2^(α (I_max − I) / (I_max − I_min)), on squared norms of the group."""
    model, plan, method = toy(), toy_plan(), replace(methods.get("depgraph"), beta=0.01)
    before = Toy()
    before.load_state_dict(model.state_dict())
    norms = [float(unit.norm()) for unit in vectors(model)]
    found = method.regularizer(model, plan)
    assert found is not None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with found.attach(optimizer := SGD(model.parameters(), lr=1.0)):
        optimizer.step()
    for u in range(8):
        gamma = 2 ** (4 * (max(norms[:8]) - norms[u]) / (max(norms[:8]) - min(norms[:8])))
        expected = before.conv1.weight[u] * (1 - 0.01 * gamma)
        torch.testing.assert_close(model.conv1.weight[u], expected, rtol=1e-4, atol=1e-6)


def test_hrank_is_the_mean_rank_of_the_feature_maps() -> None:
    """Lin et al. 2020, eq. 5: Σ_t Rank(o(t)) over images, of the maps behind norm and ReLU."""
    model, plan, method = toy().eval(), toy_plan(), methods.get("hrank")
    with torch.no_grad():
        maps = model.norm(model.conv1(X)).relu()
        ranks = [sum(int(torch.linalg.matrix_rank(image[c])) for image in maps) / len(X) for c in range(8)]
        with etp.collect.activations(model, plan, "hrank") as record:
            model(X)
    mean = sum(ranks) / 8
    found = method.scores(model, plan, record=record)[:8].tolist()
    assert found == pytest.approx([rank / mean for rank in ranks])
