"""Compensation is exact where removed units are combinations of kept ones, and least squares where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.recovery import compensate_, reestimate_batch_norms_


def first_units_go(plan: etp.Plan, name: str, count: int) -> etp.Selection:
    """Return the selection that removes the first units of one group."""
    group = plan[name]
    keep = torch.ones(group.n_units, dtype=torch.bool)
    keep[:count] = False
    return etp.Selection({name: keep})


class Heads(nn.Module):
    """A projection whose units a packed attention reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.attention(h, h, h)[0])


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), Conv1D(3, 12))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), (40, 6), "0"),
    "without bias": (lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3, bias=False)), (40, 6), "0"),
    "rows of Conv1D": (conv1d, (40, 6), "0"),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)), (4, 10, 6), "0"),
    "padded convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)),
        (4, 2, 9, 9), "0",
    ),
    "strided and dilated": (
        lambda: nn.Sequential(nn.Conv1d(2, 12, 3), nn.ReLU(), nn.Conv1d(12, 3, 3, stride=2, dilation=2)),
        (8, 2, 40), "0",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 3, 3, stride=2)),
        (4, 2, 9, 9), "0",
    ),
    "volume": (lambda: nn.Sequential(nn.Conv3d(2, 12, 1), nn.ReLU(), nn.Conv3d(12, 3, 2)), (4, 2, 4, 4, 4), "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_twins_of_kept_units_are_made_good_exactly(name: str) -> None:
    build, shape, group = NETS[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    for tensor in model[0].parameters():
        tensor.data[:4] = tensor.data[4:8]  # after the ReLU, too, unit i equals unit i + 4
    expected = model(x)
    plan = etp.trace(model, x)
    selection = first_units_go(plan, group, 4)
    done = compensate_(model, plan, selection, [x], ridge=0)
    etp.prune_(model, plan, selection)
    assert len(done.layers) == 1 and not done.skipped
    assert done.layers[0].before > 1e-2 > 1e-6 > done.layers[0].after
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-8)


def test_a_sample_of_the_pixels_is_enough() -> None:
    build, shape, group = NETS["padded convolution"]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    for tensor in model[0].parameters():
        tensor.data[:4] = tensor.data[4:8]
    expected, plan = model(x), etp.trace(model, x)
    selection = first_units_go(plan, group, 4)
    compensate_(model, plan, selection, [x], ridge=0, places=200)  # of 324, for 72 features
    etp.prune_(model, plan, selection)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-8)


def test_parameters_that_share_one_vector_are_told_apart() -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    x, models = torch.randn(40, 6), [build(), build()]
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(models[1].parameters()), models[1].parameters())
    for model in models:
        plan = etp.trace(model, x)
        selection = etp.Selection({name: torch.arange(6) > 1 for name in ("0", "2")})
        assert len(compensate_(model, plan, selection, [x]).layers) == 2
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


class Halves(nn.Module):
    """One weight that is read as a whole and by its first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return torch.cat([self.last(h), F.linear(h, self.last.weight[:2], self.last.bias[:2])], -1)


def test_a_weight_that_is_read_as_a_whole_and_in_parts_stays() -> None:
    model, x = Halves(), torch.randn(40, 6)
    plan, before = etp.trace(model, x), model.last.weight.clone()
    done = compensate_(model, plan, first_units_go(plan, "first", 3), [x])
    assert torch.equal(model.last.weight, before)
    assert done.skipped == {"last.weight": "it is read as a whole and in parts"}


def test_weights_on_the_meta_device_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(4, 6)
    plan = etp.trace(model, x)
    with pytest.raises((etp.ScoreError, etp.PlanError), match="meta"):
        compensate_(model.to("meta"), plan, first_units_go(plan, "0", 3), [x])


def test_constant_units_go_into_the_bias() -> None:
    model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(40, 6)
    model[0].weight.data[:4] = 0
    model[0].bias.data[:4] = 2.0
    expected = model(x)
    plan = etp.trace(model, x)
    selection = first_units_go(plan, "0", 4)
    compensate_(model, plan, selection, [x])
    etp.prune_(model, plan, selection)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_the_solution_is_that_of_least_squares_on_the_samples() -> None:
    model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double(), torch.randn(90, 6).double()
    plan = etp.trace(model, x)
    selection = first_units_go(plan, "0", 3)
    hidden, target = model[:2](x), model(x)
    compensate_(model, plan, selection, list(x.split(30)), ridge=0)
    etp.prune_(model, plan, selection)
    design = torch.cat([hidden[:, 3:], torch.ones(90, 1).double()], 1)
    expected = design @ torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(model(x), expected)


def test_packed_projections_are_seen() -> None:
    model, x = Heads().double(), torch.randn(9, 20, 6).double()
    model.first.weight.data[:2], model.first.bias.data[:2] = 0, 1.0
    expected = model(x)
    plan = etp.trace(model, x, prune="all")
    selection = first_units_go(plan, "first", 2)
    compensate_(model, plan, selection, [x], ridge=0)
    etp.prune_(model, plan, selection)
    torch.testing.assert_close(model(x), expected)


def test_padded_tokens_are_left_out() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(1, 30, (6, 8))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    plan = etp.trace(model, {"input_ids": ids, "attention_mask": mask}, check=False)
    name = next(g.name for g in plan.prunable if g.kind == "neurons")
    selection = first_units_go(plan, name, 6)
    weights = []
    for filler in (3, 7):
        own, batch = BertModel(config, add_pooling_layer=False).eval(), ids.clone()
        own.load_state_dict(model.state_dict())
        batch[:, 5:] = filler
        compensate_(own, plan, selection, [{"input_ids": batch, "attention_mask": mask}])
        weights.append(own.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.equal(weights[0], model.encoder.layer[0].output.dense.weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 12), nn.Linear(12, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids))


def test_a_weight_that_is_an_embedding_too_stays() -> None:
    model, ids = Tied(), torch.randint(9, (2, 5))
    plan = etp.trace(model, ids, prune="all")
    before = model.embed.weight.clone()
    done = compensate_(model, plan, first_units_go(plan, plan.prunable[0].name, 3), [ids])
    assert torch.equal(model.embed.weight, before)
    assert list(done.skipped) == ["embed.weight"] and "embedding" in str(done)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([torch.randn(2, 7)], "batch 1: the model does not run on it"),
        ([torch.full((4, 6), float("nan"))], "NaN"),
    ],
)
def test_bad_batches_change_nothing(batches: Any, message: str) -> None:
    model, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(4, 6)
    plan = etp.trace(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(etp.ScoreError, match=message):
        compensate_(model, plan, first_units_go(plan, "0", 3), batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fewer_samples_than_inputs_are_no_obstacle() -> None:
    model, x = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(3, 6)
    plan = etp.trace(model, x)
    selection = first_units_go(plan, "0", 8)
    compensate_(model, plan, selection, [x])
    etp.prune_(model, plan, selection)
    assert model(x).isfinite().all()


def test_batch_norms_take_the_statistics_of_the_batches() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    x = 3 + 2 * torch.randn(8, 2, 9, 9)
    assert reestimate_batch_norms_(model.train(), [x]) == 1
    hidden = model[0](x)
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, hidden.var((0, 2, 3)))
    assert model.training and model[1].momentum == 0.1


def test_no_batches_leave_the_batch_norms() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    model[1].running_mean.fill_(5.0)
    with pytest.raises(etp.ScoreError, match="batches is empty"):
        reestimate_batch_norms_(model, [])
    assert bool((model[1].running_mean == 5).all())
