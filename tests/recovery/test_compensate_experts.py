"""Compensation of packed experts: each gets new weights from the tokens that are sent to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import etp_graph as etp
from etp_graph.recovery import compensate_
from tests.support.models.mixtures import EXPERTS, MIXTURES, NEURONS, WIDTH, experts_of, mixture, tokens

TWINS = 8


def make_twins(experts: Any) -> None:
    """Let the first neurons of each expert be equal to the next ones."""
    first = torch.arange(TWINS)
    transposed = experts.gate_up_proj.shape[1] == WIDTH
    rows = experts.gate_up_proj.data.mT if transposed else experts.gate_up_proj.data  # [experts, 2 * neurons, d]
    places = (2 * first, 2 * first + 1) if transposed else (first, first + NEURONS)  # GptOss: they take turns
    step = 2 * TWINS if transposed else TWINS
    for place in places:
        rows[:, place] = rows[:, place + step]
        if getattr(experts, "gate_up_proj_bias", None) is not None:
            experts.gate_up_proj_bias.data[:, place] = experts.gate_up_proj_bias.data[:, place + step]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_twins_in_each_expert_are_made_good(family: str, implementation: str) -> None:
    model, data = mixture(family, implementation), tokens()
    name, experts = experts_of(model)
    make_twins(experts)
    expected = model(**data[0]).logits
    plan = etp.trace(model, data[0])
    keep = torch.arange(NEURONS) >= TWINS
    selection = etp.Selection({name: keep})
    plain = copy.deepcopy(model)
    done = compensate_(model, plan, selection, data, ridge=1e-6)
    assert [fit.layer for fit in done.layers] == [f"{name}.down_proj[{number}]" for number in range(EXPERTS)]
    assert not done.skipped and all(fit.after < 0.01 * fit.before for fit in done.layers)
    for one in (model, plain):
        etp.prune_(one, plan, selection)
    errors = [float((one(**data[0]).logits - expected).norm() / expected.norm()) for one in (model, plain)]
    assert errors[0] < 0.01 * errors[1]


def test_experts_without_tokens_keep_their_weights() -> None:
    model, data = mixture("Mixtral", "grouped_mm"), tokens()
    name, experts = experts_of(model)
    router = model.get_submodule(name.rpartition(".")[0]).gate
    chosen: list[Tensor] = []
    with torch.no_grad():
        router.weight[3] = 0
    hook = router.register_forward_hook(lambda *given: (given[2][0], *given[2][1:-1], given[2][-1].clamp_max(2)))
    experts.register_forward_pre_hook(lambda module, given: chosen.append(given[1]))
    plan = etp.trace(model, data[0], check=False)
    before = experts.down_proj.detach().clone()
    done = compensate_(model, plan, etp.Selection({name: torch.arange(NEURONS) >= TWINS}), data)
    hook.remove()
    assert int(torch.cat(chosen).max()) == 2
    assert [fit.layer[-3:] for fit in done.layers] == ["[0]", "[1]", "[2]"]
    assert torch.equal(experts.down_proj[3], before[3]) and not torch.equal(experts.down_proj[2], before[2])


def test_experts_whose_weights_are_gathered_are_named() -> None:
    model, data = mixture("Mixtral", "batched_mm"), tokens()
    name, _ = experts_of(model)
    plan = etp.trace(model, data[0])
    done = compensate_(model, plan, etp.Selection({name: torch.arange(NEURONS) >= TWINS}), data)
    assert not done.layers and "aten.index" in done.skipped[f"{name}.down_proj"]
