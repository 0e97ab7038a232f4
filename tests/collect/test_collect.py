"""Collectors: what they saw is what loops over units say, and they say what they did not see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etp_graph import collect, criteria, trace
from etp_graph.collect import Observations
from etp_graph.collect._watch_points import watch_points
from etp_graph.errors import PlanError, ScoreError
from tests.support.models.toy import Toy, toy_plan
from tests.support.recorded_batches import COLLECTED, batches, recorded

FOUND = {"activation", "flap", "hrank", "f_statistic", "obs", "wanda"}


def toy(dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(0)
    model = Toy().to(dtype).eval()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model


def read(model: Toy, x: Tensor) -> Tensor:
    """What conv2 reads: the units of the first group."""
    return model.norm(model.conv1(x)).relu()


def f_of(values: list[float], classes: list[int]) -> float:
    """F of a one-way analysis of variance, by its definition."""
    of = {c: [v for v, k in zip(values, classes, strict=True) if k == c] for c in set(classes)}
    mean = {c: sum(v) / len(v) for c, v in of.items()}
    grand = sum(values) / len(values)
    between = sum(len(v) * (mean[c] - grand) ** 2 for c, v in of.items()) / (len(of) - 1)
    within = sum((x - mean[c]) ** 2 for c, v in of.items() for x in v) / (len(values) - len(of))
    return between / within if between else 0.0  # a unit that is silent in all samples


def test_statistics_are_those_of_the_maps_that_the_next_layer_reads() -> None:
    model, plan = toy(), toy_plan()
    with collect.activations(model, plan) as record:
        for x, y in batches(torch.float64):
            record.labels(y)
            model(x)
    assert set(record.values) == FOUND
    with torch.no_grad():
        maps = torch.cat([read(model, x) for x, _ in batches(torch.float64)])
    classes = torch.cat([y for _, y in batches()]).tolist()
    for u in range(8):
        own = maps[:, u]
        assert float(record.values["activation"][u]) == pytest.approx(float(own.abs().mean()))
        ranks = [int(np.linalg.matrix_rank(one.numpy())) for one in own]
        assert float(record.values["hrank"][u]) == pytest.approx(sum(ranks) / len(ranks))
        wanted = f_of([float(one.mean()) for one in own], classes)
        assert float(record.values["f_statistic"][u]) == pytest.approx(wanted, rel=1e-6)


def test_maps_that_the_next_layer_no_longer_sees_are_watched_where_they_are_written() -> None:
    model, plan = toy(), toy_plan()
    found = {(site.module, site.side) for site in watch_points(model, plan)}
    assert found == {("conv2", "input"), ("conv2", "output")}
    record = recorded(model, plan, "activation")
    with torch.no_grad():
        maps = torch.cat([model.conv2(read(model, x)) for x, _ in batches(torch.float64)])
    torch.testing.assert_close(record.values["activation"][8:14], maps.abs().mean((0, 2, 3)))


def test_batches_of_any_size_give_the_same_record() -> None:
    model, plan = toy(), toy_plan()
    x, y = (torch.cat(parts) for parts in zip(*batches(torch.float64), strict=True))
    with collect.activations(model, plan) as one:
        one.labels(y)
        model(x)
    with collect.activations(model, plan) as many:
        for i in range(0, 24, 5):
            many.labels(y[i : i + 5])
            model(x[i : i + 5])
    for name in FOUND:
        torch.testing.assert_close(many.values[name], one.values[name], equal_nan=True)


def test_taylor_is_the_root_mean_square_over_batches() -> None:
    model, plan = toy(), toy_plan()
    found = criteria.taylor(model, plan, record=recorded(model, plan, "taylor"))
    squares = []
    for x, y in batches(torch.float64):
        model.zero_grad()
        model(x).square().mean(1).mul(y + 1.0).sum().backward()
        squares.append(criteria.taylor(model, plan).square())
    torch.testing.assert_close(found, torch.stack(squares).mean(0).sqrt())


def test_several_backwards_of_one_forward_are_one_batch() -> None:
    model, plan = toy(), toy_plan()
    x = batches(torch.float64)[0][0]
    with collect.gradients(model, plan) as record:
        out = model(x)
        out[:, 0].sum().backward(retain_graph=True)
        out[:, 1].sum().backward()
    model.zero_grad()
    model(x)[:, :2].sum().backward()
    torch.testing.assert_close(criteria.taylor(model, plan, record=record), criteria.taylor(model, plan))


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_when_the_block_ends(fails: bool) -> None:
    model, plan = toy(), toy_plan()
    for criterion in COLLECTED:
        try:
            with collect.watch(model, plan, criterion):
                if fails:
                    raise RuntimeError
        except RuntimeError:
            pass
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(not p._backward_hooks for p in model.parameters())


def test_heads_and_neurons_have_the_rank_of_their_tokens_times_width() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=6, vocab_size=20
    )
    model = transformers.BertModel(config).double().eval()
    x = torch.randint(20, (3, 5))
    plan = trace(model, x)
    inputs: dict[str, Tensor] = {}
    for name in ("encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"):
        keep = lambda m, args, name=name: inputs.__setitem__(name, args[0].detach())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(keep)
    with collect.activations(model, plan, "hrank") as record, torch.no_grad():
        model(x)
    scores = criteria.hrank(model, plan, record=record, normalize="none")
    heads, neurons = inputs.values()
    for group, span in plan.spans():
        if group.kind == "heads":
            wanted = torch.linalg.matrix_rank(heads.unflatten(-1, (4, 4)).transpose(1, 2)).double().mean(0)
            assert scores[span].tolist() == wanted.tolist()
            assert max(scores[span]) == 4
        elif group.kind == "neurons" and group.locked is None:
            assert scores[span].tolist() == (neurons != 0).any(1).double().mean(0).tolist()


def test_units_of_unequal_width_and_vectors() -> None:
    """Linear, over a sample without tokens: the rank of a neuron says whether it is active at all."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    plan = trace(model, torch.randn(1, 3))
    with torch.no_grad():
        model[0].bias[1] = -100.0
    with collect.activations(model, plan, "hrank", "activation") as record:
        model(torch.randn(6, 3))
        model(torch.randn(3))  # a single sample without a batch dimension
    assert record.values["hrank"][1] == record.values["activation"][1] == 0


@pytest.mark.parametrize("name", COLLECTED)
def test_records_that_are_missing_empty_or_of_others_are_told_apart(name: str) -> None:
    model, plan, score = toy(), toy_plan(), criteria.CRITERIA[name]
    if name != "taylor":
        with pytest.raises(ScoreError, match=r"collect\.activations.*record=record"):
            score(model, plan)
    with collect.watch(model, plan, name) as record:
        pass
    with pytest.raises(ScoreError, match="is empty: run at least one batch"):
        score(model, plan, record=record)
    with pytest.raises(ScoreError, match="has 'other'"):
        score(model, plan, record=Observations({"other": torch.ones(19)}))
    with pytest.raises(ScoreError, match="knows 3 units, the plan 19"):
        score(model, plan, record=Observations({name: torch.ones(3)}))
    with pytest.raises(ScoreError, match=r"'conv1'.*check the model for NaN"):
        score(model, plan, record=Observations({name: torch.full((19,), torch.nan)}))


def labelled(y: Tensor, *, forwards: int = 1) -> Observations:
    """The record of so many forwards of one batch, whose labels are told once."""
    model = toy()
    with collect.activations(model, toy_plan(), "f_statistic") as record:
        record.labels(y)
        for _ in range(forwards):
            model(batches(torch.float64)[0][0])
    return record


def test_labels_belong_to_one_forward() -> None:
    y = batches()[0][1]
    assert set(labelled(y).values) == {"f_statistic"}
    with pytest.raises(ScoreError, match=r"no labels: call labels\(y\)"):
        labelled(y, forwards=2)
    with pytest.raises(ScoreError, match="3 labels"):
        labelled(y[:3])
    for bad in (y.double(), y.unsqueeze(1), -y - 1, [1, 2]):
        with pytest.raises(ScoreError, match="integer tensor"):
            Observations().labels(bad)  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="of 1 classes"):
        labelled(torch.zeros_like(y))


def test_classes_that_a_unit_ignores_or_separates() -> None:
    """A dead unit tells nothing; a unit without variance within classes tells all, and that is a finite number."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Identity(), nn.Linear(3, 2))
    plan = trace(model, torch.randn(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    y = torch.arange(10) % 2
    with collect.activations(model, plan, "f_statistic") as record:
        record.labels(y)
        model(torch.stack([y.float(), torch.randn(10)], 1))
    scores = criteria.f_statistic(model, plan, record=record)[:3]
    assert scores[0] == 0
    assert scores[1] > 1e6
    assert 0 < scores[2] < 1e6
    assert bool(scores.isfinite().all())


def test_what_cannot_be_watched_is_named() -> None:
    model, plan = toy(), toy_plan()
    with pytest.raises(ScoreError, match="no statistic 'rank'"), collect.activations(model, plan, "rank"):
        pass
    bare = trace(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.randn(1, 2))
    with pytest.raises(PlanError), collect.activations(model, bare):
        pass
    blind = replace(plan, groups=tuple(replace(g, attributes=()) for g in plan.groups))
    with pytest.raises(ScoreError, match="'conv1', 'conv2'"):
        watch_points(model, blind)


def test_activations_that_are_not_finite_are_named() -> None:
    model, plan = toy(), toy_plan()
    with torch.no_grad():
        model.conv1.weight[2] = torch.nan
    with pytest.raises(ScoreError, match="conv1"):
        criteria.activation(model, plan, record=recorded(model, plan, "activation"))
    with pytest.raises(ScoreError, match="conv2"):
        recorded(model, plan, "hrank")
