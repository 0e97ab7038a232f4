"""Plans and selections: JSON both ways, fingerprints, and errors that name what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import etp_graph as etp
from etp_graph.plan import Group, as_tensor
from etp_graph.plan._groups import as_index
from tests.support.models.toy import Toy, toy_plan


def test_the_tracer_finds_the_plan_that_was_written_by_hand() -> None:
    traced, hand = etp.trace(Toy(), torch.randn(1, 3, 8, 8)), toy_plan()

    def content(plan: etp.Plan) -> list[object]:
        return [
            (g.name, g.kind, g.n_units, g.locked, {
                (s.tensor, s.axis, tuple(as_tensor(s.index).tolist()), tuple(as_tensor(s.unit).tolist()))
                for s in g.slices
            }, {(a.module, a.name, a.item, tuple(as_tensor(a.unit).tolist())) for a in g.attributes})
            for g in plan.groups
        ]  # fmt: skip

    found, wanted = content(traced), content(hand)
    linear = {("linear", "out_features", None, (0, 1, 2, 3, 4))}  # the hand-written plan leaves locked groups bare
    assert found[:2] == wanted[:2]
    assert found[2][:4] == wanted[2][:4] and found[2][5] == linear  # type: ignore[index]
    assert traced.ops == hand.ops
    assert traced.tensors == hand.tensors


def test_json_both_ways() -> None:
    plan = etp.trace(Toy(), torch.randn(1, 3, 8, 8))
    again = etp.Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json() and hash(again) == hash(plan)
    assert str(again) == str(plan)
    keep = etp.Selection({"conv1": torch.arange(8) > 2})  # type: ignore[dict-item]
    back = etp.Selection.from_json(keep.to_json())
    assert torch.equal(back.keep["conv1"], keep.keep["conv1"])
    assert torch.equal(back.flat(plan), keep.flat(plan)) and keep.n_removed == 3


def test_the_fingerprint_follows_the_content_but_not_the_device() -> None:
    plan = toy_plan()
    assert plan.fingerprint == toy_plan().fingerprint == plan.to("meta").fingerprint
    assert plan.lock({"conv1": "why not"}).fingerprint != plan.fingerprint
    assert plan != plan.to("meta")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', "null", json.dumps({"groups": 3})])
def test_other_texts_are_not_plans(text: str) -> None:
    with pytest.raises(etp.PlanError):
        etp.Plan.from_json(text)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": [3, [7]]}', '{"a": [-1, []]}', "null"])
def test_other_texts_are_not_selections(text: str) -> None:
    with pytest.raises(etp.SelectionError):
        etp.Selection.from_json(text)


def test_constraints_are_checked_with_a_remedy() -> None:
    blocks = Group(name="norm", kind="channels", n_units=8, slices=(), blocks=4)
    blocks.check_keep(torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]) > 0)
    with pytest.raises(etp.SelectionError, match=r"'norm'.*\[2, 1, 1, 1\].*4 blocks.*same number"):
        blocks.check_keep(torch.tensor([1, 1, 0, 1, 1, 0, 1, 0]) > 0)
    with pytest.raises(etp.SelectionError, match="multiple of 4"):
        replace(blocks, blocks=1, multiple=4).check_keep(torch.arange(8) < 5)
    with pytest.raises(etp.SelectionError, match="at least 3"):
        replace(blocks, blocks=1, min_units=3).check_keep(torch.arange(8) < 2)
    with pytest.raises(etp.SelectionError, match="bool"):
        blocks.check_keep(torch.ones(8))


def test_locking_names_the_group() -> None:
    assert toy_plan().lock({"conv2": "because"})["conv2"].locked == "because"
    with pytest.raises(etp.PlanError, match="nobody"):
        toy_plan().lock({"nobody": "because"})


def test_indices_stay_ranges_where_they_can() -> None:
    assert as_index(torch.arange(3, 9)) == range(3, 9)
    odd = as_index([1, 3, 5])
    assert isinstance(odd, torch.Tensor) and odd.tolist() == [1, 3, 5]
    assert as_tensor(range(2, 5)).tolist() == [2, 3, 4]


def test_flat_vectors_are_cut_at_the_offsets() -> None:
    plan = toy_plan()
    assert plan.offsets == (0, 8, 14, 19) and plan.n_units == 19
    flat = torch.arange(19) % 2 == 0
    selection = etp.Selection.from_flat(plan, flat)
    assert torch.equal(selection.flat(plan), flat)
    with pytest.raises(etp.SelectionError, match=r"\[19\]"):
        etp.Selection.from_flat(plan, flat[:-1])
