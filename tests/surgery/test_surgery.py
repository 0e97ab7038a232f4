"""Surgery: all or nothing, the same parameters, the same training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.model import named_tensors
from etp_graph.plan import Positions, with_no_unit
from etp_graph.surgery import _cuts
from etp_graph.verification._sampling import randomize_
from tests.support.model_state import same, state_of
from tests.support.models.toy import Toy, toy_plan

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def randomized() -> Toy:
    model = Toy()
    randomize_(model, seed=1)
    return model


def some_selection(plan: etp.Plan) -> etp.Selection:
    keep = {"conv1": torch.arange(8) % 3 != 0, "conv2": torch.arange(6) % 2 == 1}
    return etp.Selection(keep)  # type: ignore[arg-type]


def cut_by_hand(plan: etp.Plan, selection: etp.Selection, name: str, tensor: Tensor) -> Tensor:
    for axis in Positions(plan).axes.get(name, ()):
        tensor = tensor.index_select(
            axis.axis, axis.kept_positions(with_no_unit(selection.flat(plan), True)).nonzero().flatten()
        )
    return tensor.clone()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_with_a_fresh_optimizer_whose_state_was_cut_by_hand(name: str) -> None:
    model, plan, make = randomized(), toy_plan(), OPTIMIZERS[name]
    optimizer = make(model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    dense, old_state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    selection = some_selection(plan)
    parameters = dict(model.named_parameters())
    etp.prune_(model, plan, selection, optimizer=optimizer)
    assert all(parameters[name] is p for name, p in model.named_parameters())

    other = Toy()
    etp.prune_(other, plan, selection)
    for key, tensor in named_tensors(other):
        tensor.data = cut_by_hand(plan, selection, key, dict(named_tensors(dense))[key].detach())
    fresh = make(other.parameters())
    names = [key for key, _ in dense.named_parameters()]
    for index, entries in old_state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim:
                entries[key] = cut_by_hand(plan, selection, names[index], value)
    fresh.load_state_dict(old_state)
    assert any(value.shape != p.shape for value, p in zip(state_of(dense).values(), model.parameters(), strict=False))
    for seed in range(3, 8):
        step(model, optimizer, seed)
        step(other, fresh, seed)
        assert same(state_of(model), state_of(other))


def test_gradients_hooks_flags_and_memory_format_stay() -> None:
    model, plan = randomized().to(memory_format=torch.channels_last), toy_plan()
    calls: list[str] = []
    model.conv1.weight.register_post_accumulate_grad_hook(lambda p: calls.append("gradient"))
    model.conv2.register_forward_hook(lambda *_: calls.append("forward"))
    model.linear.bias.requires_grad_(False)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert model.conv1.weight.grad is not None and model.conv2.bias.grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    selection = some_selection(plan)
    etp.prune_(model, plan, selection)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, cut_by_hand(plan, selection, name, grads[name]))
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv2.weight.is_contiguous()
    assert not model.linear.bias.requires_grad and model.linear.weight.requires_grad
    calls.clear()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert calls == ["forward", "gradient"]
    assert model.conv1.weight.grad.shape == model.conv1.weight.shape


def test_a_graph_that_is_still_alive_does_not_disturb_training() -> None:
    """The ``loss`` variable of a loop outlives it, and with it PyTorch's memory of the old shapes."""
    model, plan = randomized(), toy_plan()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = model(torch.randn(2, 3, 8, 8)).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    etp.prune_(model, plan, some_selection(plan), optimizer=optimizer)
    step(model, optimizer, 0)
    assert loss.requires_grad and model.conv1.weight.grad is not None
    assert model.conv1.weight.grad.shape == model.conv1.weight.shape == (5, 3, 3, 3)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.hidden = nn.Linear(8, 8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embed(x) + self.hidden(self.embed(x)).relu())

    model, tokens = Tied(), torch.randint(0, 11, (2, 5))
    randomize_(model)
    plan = etp.trace(model, tokens)
    group = next(group for group in plan.prunable if any(s.tensor == "embed.weight" for s in group.slices))
    etp.prune_(model, plan, etp.Selection({group.name: torch.arange(8) < 5}))  # type: ignore[dict-item]
    assert model.out.weight is model.embed.weight
    assert model.out.weight.shape == (11, 5)
    assert model.out.in_features == model.embed.embedding_dim == model.hidden.in_features == 5
    assert model(tokens).shape == (2, 5, 11)


def test_three_rounds_each_proved() -> None:
    model, x = randomized(), torch.randn(2, 3, 8, 8)
    for _ in range(3):
        plan = etp.trace(model, x)
        etp.verify(model, plan, x)
        scores = etp.criteria.magnitude(model, plan)
        selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=1.4))
        predicted = etp.cost(model, plan, selection)
        etp.prune_(model, plan, selection)
        now = etp.trace(model, x)
        assert etp.cost(model, now) == predicted
    assert sum(p.numel() for p in model.parameters()) == predicted.params


def refuse(model: nn.Module, plan: etp.Plan, selection: etp.Selection, error: type[Exception], words: str,
           optimizer: torch.optim.Optimizer | None = None) -> None:  # fmt: skip
    """The call fails with these words, and neither tensors nor attributes have changed."""
    before, attributes = state_of(model), str(model)
    with pytest.raises(error, match=words):
        etp.prune_(model, plan, selection, optimizer=optimizer)
    assert same(before, state_of(model)) and str(model) == attributes


def test_bad_input_changes_nothing() -> None:
    plan, good = toy_plan(), some_selection(toy_plan())
    refuse(randomized(), plan, etp.Selection({"nobody": torch.ones(3) > 0}), etp.SelectionError, "nobody")  # type: ignore
    refuse(randomized(), plan, etp.Selection({"conv1": torch.ones(7) > 0}), etp.SelectionError, r"\[8\]")  # type: ignore
    refuse(randomized(), plan, etp.Selection({"conv1": torch.ones(8) < 0}), etp.SelectionError, "at least 1")  # type: ignore
    refuse(randomized(), plan, etp.Selection({"linear": torch.arange(5) > 0}), etp.SelectionError, "locked")  # type: ignore
    refuse(nn.Linear(3, 3), plan, good, etp.PlanError, "lacks")
    refuse(nn.Sequential(randomized()), plan, good, etp.PlanError, "trace this model")
    refuse(randomized().to("meta"), plan, good, etp.PlanError, r"plan\.to\('meta'\)")
    other = torch.optim.SGD(Toy().parameters(), lr=0.1)
    refuse(randomized(), plan, good, etp.PlanError, "does not hold", other)
    pruned = randomized()
    etp.prune_(pruned, plan, good)
    refuse(pruned, plan, good, etp.PlanError, "pruned after tracing")
    with torch.inference_mode():
        refuse(randomized(), plan, good, etp.PlanError, "inference_mode")


def test_a_compiled_model_is_refused() -> None:
    compiled = torch.compile(randomized())
    with pytest.raises(etp.PlanError, match="_orig_mod"):
        etp.trace(compiled, torch.randn(1, 3, 8, 8))
    with pytest.raises(etp.PlanError, match="_orig_mod"):
        etp.prune_(compiled, toy_plan(), some_selection(toy_plan()))  # type: ignore[arg-type]


def test_removing_zero_units_changes_nothing() -> None:
    """After training with the proximal force, units that reached zero are free to go."""
    torch.manual_seed(0)
    model, plan = Toy(), toy_plan()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    regularizer = etp.Regularizer(model, plan, force=etp.forces.exponential(), beta=3e-3).attach(optimizer)
    for seed in range(60):
        step(model, optimizer, seed)
    regularizer.detach()
    scores = etp.criteria.magnitude(model, plan, normalize="none")
    keep = scores > 0
    for group, span in plan.spans():
        if group.locked is not None:
            keep[span] = True
        elif not bool(keep[span].any()):
            keep[span.start] = True
    assert 3 <= int((~keep).sum()) < 13, "the test needs some zero units, and some that are not"
    model.eval()
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        etp.prune_(model, plan, etp.Selection.from_flat(plan, keep))
        after = model(x)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_cutting_in_pieces_is_cutting(form: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuts, "_CHUNK", 8)
    torch.manual_seed(0)
    tensor = torch.randn(7, 5, 3, 2).to(memory_format=form)
    kept = {0: torch.tensor([0, 2, 3, 6]), 1: torch.tensor([1, 4]), 3: torch.tensor([1])}
    cut = _cuts.Cut(tensor, kept)
    found = cut.apply(tensor)
    assert torch.equal(found, tensor[kept[0]][:, kept[1]][..., kept[3]]) and tuple(found.shape) == cut.shape
    assert found.is_contiguous(memory_format=form)
