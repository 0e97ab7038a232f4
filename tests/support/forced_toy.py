"""The toy network in a training loop, and the equations of a force written out as loops over positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph import forces
from etp_graph.plan import Plan, as_tensor
from tests.support.models.toy import Toy

MODES = ["prox", "gradient", "loss"]


def toy(dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype)


def batches(n: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=source).to(dtype), torch.randint(5, (8,), generator=source))
            for _ in range(n)]  # fmt: skip


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module, optimizer: Optimizer, data: list[tuple[Tensor, Tensor]], extra: Callable[[], Tensor] | None = None
) -> None:
    for batch in data:
        optimizer.zero_grad()
        (loss_of(model, batch) + (0 if extra is None else extra())).backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def positions(model: nn.Module, plan: Plan) -> list[tuple[int, str, int, int]]:
    """Every (unit, parameter, axis, position) of groups that are not locked."""
    parameters = dict(model.named_parameters())
    return [
        (span.start + int(u), s.tensor, s.axis, int(i))
        for group, span in plan.spans() if group.locked is None
        for s in group.slices if s.tensor in parameters
        for i, u in zip(as_tensor(s.index), as_tensor(s.unit), strict=True)
    ]  # fmt: skip


def norms_of(model: nn.Module, plan: Plan) -> Tensor:
    total = torch.zeros(plan.n_units, dtype=torch.float64)
    for u, name, axis, i in positions(model, plan):
        total[u] += model.get_parameter(name).detach().double().select(axis, i).square().sum()
    return total.sqrt()


def numbers_of(model: nn.Module, plan: Plan) -> Tensor:
    total = torch.zeros(plan.n_units, dtype=torch.float64)
    for u, name, axis, i in positions(model, plan):
        total[u] += model.get_parameter(name).select(axis, i).numel()
    return total


def sums_of(model: nn.Module, plan: Plan) -> Tensor:
    total = torch.zeros(plan.n_units, dtype=torch.float64)
    for u, name, axis, i in positions(model, plan):
        total[u] += model.get_parameter(name).detach().double().select(axis, i).abs().sum()
    return total


def equation_of_force(force: forces.Force, model: nn.Module, plan: Plan) -> Tensor:
    """F of each unit in index order, group by group; zero for locked groups."""
    found = torch.zeros(plan.n_units, dtype=torch.float64)
    norms = norms_of(model, plan)
    for group, span in plan.spans():
        if group.locked is None:
            d = torch.arange(group.n_units, dtype=torch.float64) / (group.n_units - 1)
            own = norms[span]
            found[span] = force(d, size=group.n_units, importance=(own - own.min()) / (own.max() - own.min()))
    return found


@torch.no_grad()
def shrink_by_the_equation(
    model: nn.Module, plan: Plan, force: forces.Force, beta: float, eta: dict[str, float]
) -> None:
    norms, kappa = norms_of(model, plan), numbers_of(model, plan).sqrt()
    pull = beta * equation_of_force(force, model, plan) * (norms if force.squared else kappa)
    for u, name, axis, i in positions(model, plan):
        factor = 0.0 if norms[u] == 0 else max(0.0, 1 - float(eta[name] * pull[u] / norms[u]))
        model.get_parameter(name).select(axis, i).mul_(factor)
