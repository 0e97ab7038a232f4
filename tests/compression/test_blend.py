"""The blend of old and new weights is the one whose outputs are closest to those of the dense model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.collect import Divergence
from etp_graph.errors import ScoreError


class Classifier(nn.Module):
    """Small network with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read, self.last = nn.Linear(8, 24), nn.Linear(24, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.read(self.first(x).relu()).relu())


class FirstTokenDecides(nn.Module):
    """Unit 2 equals unit 0 on all tokens but the first one, where it is zero; only the first one is read.

    Least squares over all tokens replaces unit 2 by unit 0, which is wrong on the first token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.units, self.classes = nn.Linear(2, 3), nn.Linear(3, 4)
        with torch.no_grad():
            self.units.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 1.0], [1.0, 10.0]]))
            self.units.bias.copy_(torch.tensor([0.0, 0.0, -10.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.units(x).relu())[:, 0]


def tokens() -> list[Tensor]:
    """Return batches [8, 16, 2]: a value in (0, 1), and 0 for the first token, 1 for the others."""
    values = [torch.rand(8, 16, 2) for _ in range(3)]
    for one in values:
        one[:, :, 1] = 1
        one[:, 0, 1] = 0
    return values


def last_unit_first(model: nn.Module, plan: etp.Plan) -> Tensor:
    return torch.arange(plan.n_units, 0, -1).float()


@pytest.mark.parametrize("share", [0.7, 0.4, 0.25])
@pytest.mark.parametrize("seed", range(3))
def test_the_blend_is_the_best_of_those_that_were_tried(share: float, seed: int) -> None:
    torch.manual_seed(seed)
    dense, data = Classifier(), [torch.randn(16, 8) for _ in range(3)]
    model = copy.deepcopy(dense)
    found = etp.oneshot_(model, data, params=share, criterion="random")
    measure = Divergence(dense, data)
    assert found.blends[found.blend] == min(found.blends.values())
    assert measure(model) == pytest.approx(found.blends[found.blend], rel=1e-4)
    for blend, value in found.blends.items():
        other = copy.deepcopy(dense)
        only = etp.oneshot_(other, data, params=share, criterion="random", blend=blend)
        assert only.blends == {} and only.blend == blend
        assert measure(other) == pytest.approx(value, rel=1e-4)


def test_new_weights_that_are_wrong_where_it_counts_are_not_taken() -> None:
    dense, data = FirstTokenDecides(), tokens()
    models = {blend: copy.deepcopy(dense) for blend in (1.0, 0.0, "chosen")}
    for blend, model in models.items():
        chosen = {} if blend == "chosen" else {"blend": blend}
        found = etp.oneshot_(model, data, params=0.8, criterion=last_unit_first, prune="all", **chosen)
        assert found.selection.n_removed == 1
    assert found.blend == 0 and list(found.blends) == [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(models["chosen"](data[0]), dense(data[0]), rtol=0, atol=1e-6)
    assert not torch.allclose(models[1.0](data[0]), dense(data[0]), atol=0.01)


def test_trials_end_where_a_smaller_blend_is_worse() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.Linear(16, 3))  # 16 units that span 4 dimensions
    found = etp.oneshot_(model, [torch.randn(64, 8)], params=0.7, criterion="random", ignore="0")
    assert found.blend == 1 and list(found.blends) == [1.0, 0.75]
    assert found.blends[1.0] < 1e-6 < found.blends[0.75]


@pytest.mark.parametrize("call", range(4, 14))
def test_a_model_that_fails_in_a_trial_is_as_before(call: int) -> None:
    model, data, calls = FirstTokenDecides(), tokens(), 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())

    def count(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise RuntimeError("a fault of the user's")

    plan = etp.trace(model, data[0], prune="all")
    model.register_forward_pre_hook(count)
    with pytest.raises((RuntimeError, etp.EtpError), match="a fault of the user's"):
        etp.oneshot_(model, data, params=0.8, criterion=last_unit_first, plan=plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_outputs_that_cannot_be_compared_get_the_largest_blend() -> None:
    class Infinite(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).index_fill(1, torch.tensor([0]), -torch.inf)

    found = etp.oneshot_(Infinite(), [torch.randn(16, 8)], params=0.7, blend=(0.25, 0.5))
    assert found.blend == 0.5 and found.blends == {}


class Boxes(Classifier):
    """Returns as many rows as it finds."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found[found[:, 0] > 0]


class WithHidden(Classifier):
    """Its first output has units, so that it gets another width."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).relu()
        return {"hidden": hidden, "out": self.last(self.read(hidden).relu())}


@pytest.mark.parametrize("kind", [Boxes, WithHidden])
def test_outputs_of_another_shape_get_the_largest_blend(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2000, 8)
    outputs = "out" if kind is WithHidden else None
    plan = etp.trace(model, x, outputs=outputs, check=kind is WithHidden)
    found = etp.oneshot_(model, [x], params=0.5, plan=plan)
    assert found.blend == 1 and found.blends == {}
    assert found.selection.n_removed > 0


def test_a_single_output_is_compared_by_its_error() -> None:
    class Reward(Classifier):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)[:, :1]}

    found = etp.oneshot_(Reward(), [torch.randn(64, 8)], params=0.5, criterion="magnitude")
    assert min(found.blends.values()) > 1e-6


def test_with_fewer_blocks_the_blend_is_still_measured_from_the_dense_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.back = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.back(self.wide(x).relu())

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), nn.Linear(8, 3))
    model, data = copy.deepcopy(dense), [torch.randn(64, 8)]
    measure = Divergence(dense, data)
    found = etp.oneshot_(model, data, params=0.6, blocks=1, criterion="magnitude")
    assert found.removed_blocks
    assert measure(model) == pytest.approx(found.blends[found.blend], rel=1e-4)


def test_classes_in_another_dimension_are_compared_there() -> None:
    from etp_graph.collect import OwnLabels

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.last(self.first(x).relu())}

    dense, data = Pixels(), [torch.randn(4, 3, 9, 9)]
    model = copy.deepcopy(dense)
    found = etp.oneshot_(model, data, params=0.6, loss=OwnLabels(dim=1))
    assert Divergence(dense, data, dim=1)(model) == pytest.approx(found.blends[found.blend], rel=1e-4)


@pytest.mark.parametrize("blend", [np.float32(0.5), [0.5], (0.5,)])
def test_numbers_of_numpy_and_lists_are_blends(blend: Any) -> None:
    assert etp.oneshot_(Classifier(), [torch.randn(16, 8)], params=0.7, blend=blend).blend == 0.5


@pytest.mark.parametrize("blend", [(), 2, -0.5, (0.5, "half"), float("nan"), None, "0.5"])
def test_bad_blends_change_nothing(blend: object) -> None:
    model = Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ScoreError, match="blend"):
        etp.oneshot_(model, [torch.randn(16, 8)], params=0.7, blend=blend)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
