"""Criteria from activations and from gradients by activations, each against its definition written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etp_graph import collect, criteria, trace
from etp_graph.collect import OwnLabels
from etp_graph.criteria.from_activations import _block_losses
from etp_graph.criteria.from_activations._block_losses import surgeon_losses
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(196, 4)
    )


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layers = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Conv1D(4, 8))
    nn.init.normal_(layers[2].weight)
    return layers


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linear, (12, 5)),
    "tokens": (linear, (3, 7, 5)),
    "convolution": (conv, (6, 5, 6, 6)),
    "transposed": (transposed, (6, 5, 6, 6)),
    "Conv1D": (conv1d, (12, 5)),
}


def case(name: str) -> tuple[nn.Module, Plan, list[Tensor]]:
    build, shape = NETS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    return model, trace(model, batches[0], check=False), batches


def scores(criterion: str, model: nn.Module, plan: Plan, batches: list[Tensor]) -> Tensor:
    with collect.watch(model, plan, criterion) as record, torch.no_grad():
        for x in batches:
            model(x)
    return criteria.CRITERIA[criterion](model, plan, record=record)[: plan["0"].n_units]


def read_by_second(name: str, model: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What the second layer reads, [vectors, 8], and its weights by input, [8, outputs]."""
    with torch.no_grad():
        x = torch.cat([model[1](model[0](b)) for b in batches])
    weight = model[2].weight.detach()
    x = x.movedim(1, -1) if name in ("convolution", "transposed") else x
    return x.flatten(0, -2), (weight if name in ("transposed", "Conv1D") else weight.movedim(1, 0)).flatten(1)


@pytest.mark.parametrize("name", NETS)
def test_wanda_sums_weights_times_the_size_of_what_they_read(name: str) -> None:
    model, plan, batches = case(name)
    x, weight = read_by_second(name, model, batches)
    sizes = [float(x[:, j].square().mean().sqrt()) for j in range(8)]
    wanted = torch.tensor([sum(abs(float(w)) * sizes[j] for w in weight[j]) for j in range(8)])
    found = scores("wanda", model, plan, batches)
    torch.testing.assert_close(found, (wanted / wanted.mean()).to(found), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NETS)
def test_flap_is_the_standardized_fluctuation(name: str) -> None:
    model, plan, batches = case(name)
    x, weight = read_by_second(name, model, batches)
    raw = torch.tensor([float(x[:, j].var(correction=0) * weight[j].square().sum()) for j in range(8)])
    wanted = (raw - raw.mean()) / raw.std(correction=0)
    found = scores("flap", model, plan, batches)
    torch.testing.assert_close(found - found.mean(), (wanted - wanted.mean()).to(found), rtol=1e-5, atol=1e-5)
    assert float(found.min()) >= 0


def test_flap_keeps_its_digits_far_from_zero() -> None:
    model, plan, batches = case("linear")
    model[0].bias.data += 1e6
    x, weight = read_by_second("linear", model, batches)
    raw = (x - x.mean(0)).square().mean(0) * weight.square().sum(1)
    found = scores("flap", model, plan, batches)
    torch.testing.assert_close(found.argsort(), raw.argsort())


def residual(x: Tensor, weight: Tensor, gone: list[int]) -> float:
    """Half the mean square of the output that the inputs that stay cannot reproduce."""
    stay = [j for j in range(x.shape[1]) if j not in gone]
    y = x @ weight
    left = y - x[:, stay] @ torch.linalg.lstsq(x[:, stay], y).solution
    return float(left.square().sum()) / len(x) / 2


def test_obs_is_what_least_squares_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_block_losses, "RIDGE", 1e-12)
    torch.manual_seed(1)
    x, weight = torch.randn(50, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    weight *= torch.tensor([[1.0], [3.0], [9.0], [27.0], [81.0], [243.0]], dtype=torch.float64)
    found = surgeon_losses(x.mT @ x / 50, weight @ weight.mT, torch.arange(6))
    order = found.argsort().tolist()
    assert float(found[order[0]]) == pytest.approx(residual(x, weight, order[:1]), rel=1e-6)
    for count in range(1, 6):  # the losses of one removal after the other add up to that of all together
        assert float(found[order[:count]].sum()) == pytest.approx(residual(x, weight, order[:count]), rel=1e-6)


def test_units_of_several_positions_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_block_losses, "RIDGE", 1e-12)
    torch.manual_seed(1)
    x, weight = torch.randn(50, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    unit = torch.tensor([0, 1, 2, 0, 1, 0, 2])  # 3, 2 and 2 positions, mixed
    found = surgeon_losses(x.mT @ x / 50, weight @ weight.mT, unit)
    first = int(found.argmin())
    places = {u: (unit == u).nonzero().flatten().tolist() for u in range(3)}
    single = {u: residual(x, weight, places[u]) for u in range(3)}
    assert first == min(single, key=single.__getitem__)
    assert float(found[first]) == pytest.approx(single[first], rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "tokens", "Conv1D"])
def test_obs_ranks_by_the_weights_that_read(name: str) -> None:
    model, plan, batches = case(name)
    x, weight = read_by_second(name, model, batches)
    wanted = surgeon_losses(x.mT @ x / len(x), weight @ weight.mT, torch.arange(8))
    found = scores("obs", model, plan, batches)
    torch.testing.assert_close(found, wanted.to(found))


@pytest.mark.parametrize("criterion", ["obs", "kron_obs"])
def test_a_large_unit_with_a_twin_scores_low(criterion: str) -> None:
    model, plan, batches = case("linear")
    model[0].weight.data[1], model[0].bias.data[1] = 5 * model[0].weight.data[0], 5 * model[0].bias.data[0]
    found = joined(criterion, model, plan, batches) if criterion == "kron_obs" else scores("obs", model, plan, batches)
    assert int(found.argmin()) in (0, 1)
    assert float(found[:2].min()) < 0.3 * float(found.median())


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def joined(criterion: str, model: nn.Module, plan: Plan, batches: list[Tensor]) -> Tensor:
    with collect.watch(model, plan, criterion) as record:
        for x in batches:
            squared(model, x).backward()
    model.zero_grad()
    return criteria.CRITERIA[criterion](model, plan, record=record)[: plan["0"].n_units]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_fisher_is_half_the_mean_square_of_the_gradients_of_gates(name: str, frozen: bool) -> None:
    model, plan, batches = case(name)
    model.requires_grad_(not frozen)
    found = joined("fisher", model, plan, batches)
    squares, count = torch.zeros(8, dtype=torch.float64), 0
    for x in batches:
        hidden = model[1](model[0](x)).detach()
        shape = (len(x), 8, 1, 1) if hidden.ndim == 4 else hidden.shape  # a gate for each map, or each token
        gates = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        model[2:](hidden * gates).square().sum().backward()
        assert gates.grad is not None
        each = gates.grad.flatten(1) if hidden.ndim == 4 else gates.grad.flatten(0, -2)
        squares += each.square().sum(0)
        count += len(each)
    torch.testing.assert_close(found, (squares / count / 2).to(found))
    assert all(p.requires_grad is not frozen for p in model.parameters())


@pytest.mark.parametrize("name", ["linear", "tokens", "Conv1D"])
def test_kron_obs_weighs_errors_with_the_gradients_by_outputs(name: str) -> None:
    model, plan, batches = case(name)
    x, weight = read_by_second(name, model, batches)
    outputs = torch.cat([model(b) for b in batches]).flatten(0, -2)
    slopes = 2 * outputs.detach()  # the derivative of the sum of squares
    weighted = weight @ (slopes.mT @ slopes / len(slopes)) @ weight.mT
    wanted = surgeon_losses(x.mT @ x / len(x), weighted, torch.arange(8))
    found = joined("kron_obs", model, plan, batches)
    torch.testing.assert_close(found, wanted.to(found))


def test_own_labels_give_the_fisher_information_of_the_predictions() -> None:
    """For softmax regression it is known: E over labels of (∂ log p / ∂ logit_c)² is p_c (1 − p_c)."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, dtype=torch.float64).expand(20_000, 4)
    model, shift = nn.Identity(), torch.zeros(20_000, 4, dtype=torch.float64, requires_grad=True)
    OwnLabels(seed=3)(model, logits + shift).backward()
    assert shift.grad is not None
    p = logits[0].softmax(0)
    torch.testing.assert_close(shift.grad.square().mean(0), p * (1 - p), rtol=0.05, atol=0.005)


def test_own_labels_leave_padding_out_and_repeat_with_their_seed() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 5)

        def forward(self, tokens: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.table(tokens)}

    model, mask = Tagger(), torch.tensor([[1, 1, 0, 0]])
    batch = {"tokens": torch.tensor([[1, 2, 3, 4]]), "attention_mask": mask}
    first, again = (float(OwnLabels(seed=1)(model, batch).detach()) for _ in range(2))
    assert first == again
    OwnLabels()(model, batch).backward()
    assert model.table.weight.grad is not None
    assert model.table.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("output", [torch.tensor([[float("nan"), 1.0]]), torch.zeros(3), "text", ()])
def test_outputs_that_are_no_logits_are_refused(output: object) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> object:
            return output

    with pytest.raises(ScoreError, match="logits"):
        OwnLabels()(Fixed(), torch.zeros(1))


@pytest.mark.parametrize("criterion", ["wanda", "flap", "obs"])
def test_activations_that_are_not_finite_are_an_error(criterion: str) -> None:
    model, plan, batches = case("linear")
    batches[1][0, 0] = torch.nan
    with pytest.raises(ScoreError, match="NaN"):
        scores(criterion, model, plan, batches)


def test_without_a_backward_the_error_says_what_to_run() -> None:
    model, plan, batches = case("linear")
    with collect.watch(model, plan, "fisher") as record:
        model(batches[0])
    with pytest.raises(ScoreError, match="backward"):
        criteria.fisher(model, plan, record=record)


def test_fewer_samples_than_units_give_finite_scores() -> None:
    model, plan, batches = case("linear")
    few = [batches[0][:2]]
    for found in (scores("obs", model, plan, few), joined("kron_obs", model, plan, few)):
        assert bool(found.isfinite().all()) and float(found.max()) > 0


def test_heads_that_share_a_key_are_scored_together() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(40, (2, 16))
    plan = trace(model, {"input_ids": tokens, "use_cache": False}, check=False)
    before = copy.deepcopy(model.state_dict())
    for criterion in ("wanda", "obs", "fisher", "kron_obs"):
        with collect.watch(model, plan, criterion) as record:
            logits = model(input_ids=tokens, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").backward()
        found = criteria.CRITERIA[criterion](model, plan, record=record)
        for group, span in plan.spans():
            if group.locked is None:
                assert bool((found[span] > 0).all()), (criterion, group.name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
