"""What the tracer finds in small modules: the groups, what is locked and why, and that it is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import etp_graph as etp
from tests.support.models.constructs import CASES, Case, image


def with_company(case: Case) -> nn.Module:
    """The case's module beside two layers of their own, so that something can be pruned even if the case is locked."""
    net = case.net()
    net.extra = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    inner = net.run
    net.run = lambda n, *inputs: (inner(n, *inputs), n.extra(torch.ones(1, 6, dtype=n.extra[0].weight.dtype)))
    return net


@pytest.mark.parametrize("name", CASES)
def test_groups_locks_and_equivalence(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    net = with_company(case)
    inputs = case.inputs or (image(),)
    plan = etp.trace(net, inputs, check=False)
    own = [group for group in plan.groups if not group.name.startswith("extra")]
    assert {group.name: group.n_units for group in own if group.locked is None} == case.units
    locked = {group.name: group.locked for group in own if group.locked is not None}
    assert locked.keys() == case.locked.keys()
    for group, reason in locked.items():
        assert reason is not None
        assert case.locked[group] in reason
    found = etp.verify(net, plan, inputs)
    assert found.error < 1e-10
    assert found.effect > 1e-3
