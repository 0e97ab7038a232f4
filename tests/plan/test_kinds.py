"""Kinds of units are chosen by name, and everything else stays."""

from __future__ import annotations

import pytest
import torch

import etp_graph as etp
from etp_graph.plan import KINDS
from etp_graph.plan._kinds import ON_REQUEST
from tests.support.zero_units import zero_units_

transformers = pytest.importorskip("transformers")


def bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40, vocab_size=31
    )
    model = transformers.BertForSequenceClassification(config).eval()
    return model, {"input_ids": torch.randint(31, (2, 5))}


def prunable(plan: etp.Plan) -> set[str]:
    return {group.kind for group in plan.prunable}


def test_defaults_leave_out_what_is_on_request() -> None:
    model, inputs = bert()
    assert prunable(etp.trace(model, inputs)) == {"heads", "neurons"}
    assert prunable(etp.trace(model, inputs, prune="all")) == {"heads", "neurons", "head_dims", "stream"}
    assert set(KINDS) >= ON_REQUEST


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("stream",), ("heads", "stream"), ("head_dims",)])
def test_only_the_kinds_that_are_asked_for(kinds: tuple[str, ...]) -> None:
    model, inputs = bert()
    plan = etp.trace(model, inputs, prune=kinds)
    assert set(kinds) == prunable(plan)
    etp.verify(model, plan, inputs)


def test_a_single_kind_may_be_a_string() -> None:
    model, inputs = bert()
    assert prunable(etp.trace(model, inputs, prune="heads")) == {"heads"}


@pytest.mark.parametrize("prune", ["layers", (), ("heads", "attention")])
def test_unknown_kinds_are_refused_with_the_list(prune: object) -> None:
    model, inputs = bert()
    with pytest.raises(etp.PlanError, match="head_dims"):
        etp.trace(model, inputs, prune=prune)  # type: ignore[arg-type]


def test_ignore_takes_names_and_patterns() -> None:
    model, inputs = bert()
    plan = etp.trace(model, inputs, ignore="bert.encoder.layer.0.*")
    assert plan.prunable
    assert all("layer.0." not in group.name for group in plan.prunable)


def test_the_reason_of_a_kind_on_request_is_the_remedy() -> None:
    model, inputs = bert()
    reasons = [group.locked for group in etp.trace(model, inputs).groups if group.kind == "stream"]
    assert reasons
    assert all(reason is not None and "prune=[..., 'stream']" in reason for reason in reasons)


def test_heads_and_their_dimensions_may_go_together() -> None:
    model, inputs = bert()
    plan = etp.trace(model, inputs, prune=("heads", "head_dims"))
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group.locked is None:
            keep[span.start] = False
    selection = etp.Selection.from_flat(plan, keep)
    expected = etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    attention = model.bert.encoder.layer[0].attention
    assert attention.self.value.weight.shape == (3 * 5, 24)
    assert attention.output.dense.weight.shape == (24, 3 * 5)
    assert attention.self.scaling == 6**-0.5, "the scale belongs to the trained weights"
    assert sum(p.numel() for p in model.parameters()) == expected.params


def test_removing_heads_and_neurons_that_are_zero_changes_nothing() -> None:
    model, inputs = bert()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plan = etp.trace(model, inputs)
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group.locked is None:
            keep[span.start : span.start + group.n_units // 2] = False
    dense = model(**inputs).logits
    zero_units_(model, plan, keep)
    zeroed = model(**inputs).logits
    etp.prune_(model, plan, etp.Selection.from_flat(plan, keep))
    assert not torch.allclose(zeroed, dense, atol=1e-3)
    assert torch.allclose(model(**inputs).logits, zeroed, atol=1e-5)
