"""Adapters around layers, such as LoRA of peft: their ranks stay, and what was cut is found after they are merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.surgery import current_record, get_record

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """Layer with an adapter of low rank, laid out as peft does it."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, layer: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base_layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return found

    def merged(self) -> nn.Module:
        with torch.no_grad():
            self.base_layer.weight += self.lora_B["default"].weight @ self.lora_A["default"].weight
        return self.base_layer


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def adapted(names: tuple[int, ...] = (0, 2)) -> nn.Sequential:
    model = build()
    for name in names:
        model[name] = Adapted(model[name])  # type: ignore[arg-type]
    return model.eval()


def prune(model: nn.Module) -> None:
    plan = etp.trace(model, X)
    keep = {group.name: torch.arange(group.n_units) % 3 > 0 for group in plan.prunable}
    etp.prune_(model, plan, etp.Selection(keep))


def test_ranks_are_no_units() -> None:
    model = adapted()
    plan = etp.trace(model, X)
    ranks = [group for group in plan.groups if "lora_A" in group.name]
    assert [group.locked for group in ranks] == ["is the rank of an adapter, which its configuration sets"] * 2
    assert {group.n_units for group in plan.prunable} == {16, 12}
    assert etp.verify(model, plan, X).units > 0


@pytest.mark.parametrize("names", [(0,), (2,), (0, 2, 4)])
def test_a_merged_model_is_saved_and_loaded(names: tuple[int, ...], tmp_path: Path) -> None:
    model = adapted(names)
    prune(model)
    for name in names:
        model[name] = model[name].merged()  # type: ignore[operator]
    loaded = etp.load(etp.save(model, tmp_path / "merged"), build=build).eval()
    assert torch.equal(loaded(X), model(X))
    assert loaded[0].out_features == model[0].out_features < 16
    assert not any("base_layer" in name or "lora" in name for name in get_record(loaded).tensors)


def test_a_model_whose_adapters_stay_keeps_its_record(tmp_path: Path) -> None:
    model = adapted()
    prune(model)
    assert current_record(model) == get_record(model)
    loaded = etp.load(etp.save(model, tmp_path / "adapted"), build=adapted).eval()
    assert torch.equal(loaded(X), model(X))


def test_an_adapter_that_came_after_surgery_is_named(tmp_path: Path) -> None:
    model = build()
    prune(model)
    model[2] = Adapted(model[2])  # type: ignore[arg-type]
    with pytest.raises(etp.CheckpointError, match=r"2\.bias lies in an adapter since surgery: merge it"):
        etp.save(model, tmp_path / "adapted")
    model[2] = model[2].merged()  # type: ignore[operator]
    assert torch.equal(etp.load(etp.save(model, tmp_path / "merged"), build=build).eval()(X), model(X))


def test_frozen_weights_are_scored_and_stay_frozen() -> None:
    model, free = adapted(), adapted()
    for layer in (model[0], model[2], model[4]):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora" in name)
    plan = etp.trace(model, X)
    before = [parameter.requires_grad for parameter in model.parameters()]
    scores = []
    for one in (model, free):
        with etp.collect.gradients(one, plan) as record:
            one(X).square().mean().backward()
        scores.append(etp.criteria.taylor(one, plan, record=record))
    for group, span in plan.spans():
        assert group.locked or torch.allclose(scores[0][span], scores[1][span])
        assert group.locked or bool((scores[0][span] > 0).any())
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_gradients_of_frozen_weights_are_gone_before_the_optimizer_steps() -> None:
    model = build()
    model[0].requires_grad_(False)
    plan, weight = etp.trace(model, X), model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with etp.collect.gradients(model, plan):
        model(X).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[0].weight, weight)


def test_lora_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"]))
    plan = etp.trace(model, X)
    assert all("lora" not in group.name for group in plan.prunable)
    etp.prune_(
        model, plan, etp.allocate(model, plan, etp.criteria.magnitude(model, plan), budget=etp.Budget(speed_up=1.5))
    )
    merged = model.merge_and_unload()
    loaded = etp.load(etp.save(merged, tmp_path / "merged"), build=build).eval()
    assert torch.allclose(loaded(X), merged.eval()(X))
