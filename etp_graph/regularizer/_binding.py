"""Sliced parameters of a live model: checks that they fit the plan, and their places in an optimizer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph._config import quoted
from etp_graph.errors import ForceError, PlanError
from etp_graph.model import is_sharded
from etp_graph.plan import Plan, as_tensor, with_no_unit
from etp_graph.units import Units

K = TypeVar("K", bound=Hashable)

Owner = tuple[int, int]
"""Position of an optimizer among those that train the model, and index of one of its parameter groups."""


class Binding:
    """Sliced parameters of one model, found once and checked cheaply in every step.

    Attributes:
        tensors: the parameters, by name.
        active: True for units that a force may act on, bool [n_units]: their group is not locked, and they have no
            frozen slice.
        frozen: name of each group that is not locked but has frozen slices -> names of the frozen parameters.
        owner: name of each trainable parameter -> its optimizer and parameter group; see :meth:`find_owners`.
    """

    def __init__(self, model: nn.Module, plan: Plan, units: Units) -> None:
        self.model = model
        self.plan = plan
        self._units = units
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        self.tensors: dict[str, nn.Parameter] = {}
        for name in units.axes:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            self._homes[name] = (module, leaf)
            self.tensors[name] = getattr(module, leaf)
        apart = [name for name, tensor in self.tensors.items() if tensor.device != units.device]
        if apart:
            raise PlanError(
                f"{apart[0]} is on {self.tensors[apart[0]].device}, other parameters are on {units.device}: "
                "a force needs all parameters of a plan on one device."
            )
        if spoiled := self._spoiled():
            raise ForceError(f"{quoted(spoiled)} of the model: NaN or infinite values. Repair them before training on.")
        self._flags: tuple[bool, ...] | None = None
        self.active = torch.zeros(0, device="cpu")
        self.frozen: dict[str, tuple[str, ...]] = {}
        self.owner: dict[str, Owner] = {}
        self._optimizers: tuple[Optimizer, ...] = ()
        self.refresh()

    @torch.no_grad()
    def _spoiled(self) -> list[str]:
        """Return the names of parameters with NaN or infinite values.

        A parameter that is not finite on one process is named on all. So all processes raise, and none waits for
        another.
        """
        shards = self._units.shards
        if shards is None:
            return [name for name, tensor in self.tensors.items() if not bool(tensor.isfinite().all())]
        flags = [(~shards.part(name, tensor).isfinite()).any() for name, tensor in self.tensors.items()]
        found = shards.maximum(torch.stack(flags).float()).tolist()
        return [name for name, spoiled in zip(self.tensors, found, strict=True) if spoiled]

    def refresh(self) -> bool:
        """Read again which parameters are frozen. Return True if this has changed."""
        flags = tuple(tensor.requires_grad for tensor in self.tensors.values())
        if flags == self._flags:
            return False
        self._flags = flags
        active = torch.ones(self.plan.n_units, dtype=torch.bool, device="cpu")
        self.frozen = {}
        for group, span in self.plan.spans():
            stuck = [s for s in group.slices if s.tensor in self.tensors and not self.tensors[s.tensor].requires_grad]
            if group.locked is not None:
                active[span] = False
            elif stuck:
                self.frozen[group.name] = tuple(dict.fromkeys(s.tensor for s in stuck))
                for piece in stuck:
                    active[span][as_tensor(piece.unit)] = False
        self.active = active.to(self._units.device)
        return True

    def check(self) -> None:
        """Raise unless the parameters are the same objects as before, with the plan's shapes, on the same device."""
        for name, (module, leaf) in self._homes.items():
            tensor = module._parameters.get(leaf)
            if tensor is None or tensor.device != self._units.device or tuple(tensor.shape) != self.plan.tensors[name]:
                self.plan.check(self.model)
                where = "gone" if tensor is None else f"on {tensor.device}, was on {self._units.device}"
                raise PlanError(f"{name} is {where}: make a new regularizer for the model as it is now.")
            if tensor is not self.tensors[name]:
                if is_sharded(self.tensors[name]) and not is_sharded(tensor):
                    raise ForceError(f"{name} is gathered on every process: call model.reshard() before the step.")
                raise ForceError(f"{name} is another parameter than when the regularizer was made: make it anew.")

    def find_owners(self, optimizers: Sequence[Optimizer]) -> None:
        """Find the optimizer and the parameter group of each trainable parameter that a force acts on.

        Raises:
            ForceError: a parameter is in no group, or no unit is left for the force to act on.
        """
        index = {
            id(p): (which, number)
            for which, optimizer in reversed(list(enumerate(optimizers)))
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        wanted = dict.fromkeys(s.tensor for g in self.plan.prunable for s in g.slices if s.tensor in self.tensors)
        trainable = [name for name in wanted if self.tensors[name].requires_grad]
        absent = [name for name in trainable if id(self.tensors[name]) not in index]
        if absent:
            raise ForceError(
                f"the optimizer{' does' if len(optimizers) == 1 else 's do'} not hold {quoted(absent)}, on which the "
                "force has to act: give it all parameters of the model (model.parameters()), attach all optimizers "
                "(attach([a, b])), or freeze these (requires_grad_(False)), or lock their groups."
            )
        if not bool(self.active.any()):
            raise ForceError(f"no unit is left for the force to act on: {self.describe_frozen()}")
        self.owner = {name: index[id(self.tensors[name])] for name in trainable}
        self._optimizers = tuple(optimizers)

    def smallest_step(self) -> float:
        """Return the smallest relative change that survives rounding in all weights: four times the largest eps."""
        return 4 * max(torch.finfo(self.tensors[name].dtype).eps for name in self.owner)

    @torch.no_grad()
    def add_gradient_(self, pull: Tensor, *, signs: bool = False, names: Iterable[str] | None = None) -> None:
        """Add to the gradient of each slice its weights (or their signs) times the ``pull`` [n_units] of its unit.

        Args:
            pull: the factor of each unit.
            signs: add signs of weights instead of weights.
            names: the parameters; default: all on which a force acts.
        """
        parts = self._units.positions(with_no_unit(pull, 0))
        for name in self.owner if names is None else names:
            tensor = self.tensors[name]
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            held, grad = self._units.local_part(name, tensor).detach(), self._units.local_part(name, tensor.grad)
            values = held.sign() if signs else held
            for axis, part in parts[name]:
                factor = part.to(tensor.dtype).view([-1 if d == axis else 1 for d in range(tensor.ndim)])
                grad.addcmul_(values, factor)

    @torch.no_grad()
    def scale_(self, factors: Mapping[Owner, Tensor]) -> None:
        """Multiply every slice of every unit by the unit's factor.

        Args:
            factors: optimizer and parameter group -> factors [n_units] for the slices that it holds.
        """
        for place, factor in factors.items():
            mine = {name: self.tensors[name] for name, owner in self.owner.items() if owner == place}
            self._units.scale_(mine, with_no_unit(factor, 1))
            if averaged := self._averaged_with(place, mine):
                self._units.scale_(averaged, with_no_unit(factor, 1))

    def _averaged_with(self, place: Owner, mine: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the sequences z of a schedule-free optimizer (Defazio et al. 2024), by name of their parameter.

        Its parameters are means of z and of the weights that are used in the end. A unit is zero in all three only if
        z is scaled, too.
        """
        which, group = place
        optimizer = self._optimizers[which]
        if "train_mode" not in optimizer.param_groups[group]:
            return {}
        found = {name: optimizer.state.get(tensor, {}).get("z") for name, tensor in mine.items()}
        return {name: z for name, z in found.items() if isinstance(z, Tensor) and z.shape == mine[name].shape}

    def describe_frozen(self) -> str:
        """Return a sentence on the groups that frozen parameters exclude from the force; empty if there are none."""
        if not self.frozen:
            return ""
        names = dict.fromkeys(name for names in self.frozen.values() for name in names)
        return (
            f"{quoted(names)} {'is' if len(names) == 1 else 'are'} frozen, so no force acts on units of "
            f"{quoted(self.frozen)}: a unit with a frozen slice cannot become zero."
        )


def step_size(group: Mapping[str, Any], optimizer: Optimizer | None = None) -> float | Tensor:
    """Return η_eff = lr·(1 − dampening)/(1 − momentum), the change of a weight per step if its gradient stays 1.

    The momentum of Muon is that of a mean, which does not enlarge steps.
    """
    rate, momentum = group.get("lr"), group.get("momentum", 0)
    if type(optimizer).__name__ == "Muon":
        momentum = 0
    if rate is None:
        raise ForceError("the optimizer sets its learning rate itself (lr=None), so mode='prox' has no step size.")
    if not 0 <= momentum < 1:
        raise ForceError(f"momentum={momentum!r} leaves no finite step size; it must lie in [0, 1).")
    scaled: float | Tensor = rate * (1 - group.get("dampening", 0)) / (1 - momentum)
    return scaled


def maximum(values: Sequence[float | Tensor]) -> float | Tensor:
    """Return the maximum: a tensor on the device if a value is a tensor, so that the host does not wait for it."""
    plain = max((float(v) for v in values if not isinstance(v, Tensor)), default=0.0)
    found: float | Tensor = plain
    for value in values:
        if isinstance(value, Tensor):
            found = value.clamp_min(plain) if not isinstance(found, Tensor) else torch.maximum(found, value)
    return found


def prox_factors(ratio: Tensor, ripe: Tensor, sizes: Mapping[K, float | Tensor]) -> dict[K, Tensor]:
    """Return max(0, 1 − η_i/η_max·ratio) for ripe units and 1 for others, [n_units] for each parameter group i.

    Args:
        ratio: η_max β κ F(d_u)/‖w_u‖, [n_units].
        ripe: True for units whose force is applied now, bool [n_units].
        sizes: η_i by parameter group.
    """
    most = maximum(list(sizes.values()))
    # Avoid 0/0 if a learning rate of zero is a tensor. If plain numbers are all zero, this function is not called.
    bound = most.clamp_min(1e-30) if isinstance(most, Tensor) else most
    return {i: torch.where(ripe, (1 - ratio * (size / bound)).clamp_min(0), 1.0) for i, size in sizes.items()}
