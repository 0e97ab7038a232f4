"""Find the named parameters and buffers behind the tensors that a forward pass uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from . import layers
from .labels import Labels, Producer
from .plan import named_tensors


@dataclass(frozen=True, slots=True)
class Ref:
    """A stored tensor that a layer's weight is, or is computed from."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """A module and its qualified name."""

    name: str
    module: nn.Module | None


class Weights:
    """Names of the tensors and modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._module_names: dict[int, str] = {}
        for name, module in self._modules.items():
            self._module_names.setdefault(id(module), name)
        self._tensors = dict(named_tensors(model))
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._bare = {
            name for name, tensor in self._tensors.items()
            if tensor.is_floating_point() and layers.counts(self._holder(name).module) == layers.Counts()
        }  # fmt: skip
        self.fixed: dict[str, str] = {}
        self.seen: set[str] = set()

    def _holder(self, name: str) -> Owner:
        """The layer that a tensor belongs to, looking through its parametrizations."""
        layer, parametrized, _ = name.partition(".parametrizations.")
        owner = layer if parametrized else name.rpartition(".")[0]
        return Owner(owner, self._modules.get(owner))

    def module_name(self, module: nn.Module | None) -> str | None:
        """Qualified name of a module of the model, or ``None`` for one that is not part of it."""
        return self._module_names.get(id(module))

    def name(self, tensor: Tensor) -> str | None:
        """Name of a parameter or buffer, or ``None`` for any other tensor."""
        name = self._names.get(id(tensor))
        if name is not None:
            self.seen.add(name)
        return name

    def use(self, tensors: Iterable[Tensor | None]) -> None:
        """Note that a forward pass reads these tensors."""
        for tensor in tensors:
            if tensor is not None:
                self.name(tensor)

    def bare_name(self, tensor: Tensor) -> str | None:
        """Name of a parameter or buffer that belongs to no layer of the table (layer scale, position table)."""
        name = self.name(tensor)
        return name if name in self._bare else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a named tensor."""
        return tuple(self._tensors[name].shape)

    def find(self, weight: Tensor, running: Sequence[nn.Module]) -> tuple[list[Ref], str | None]:
        """The stored tensors behind a layer's weight, main one first, and a reason if the layer must stay whole."""
        name = self.name(weight)
        if name is not None:
            return [Ref(name, tuple(weight.shape))], self.fixed.get(name)
        owner = self.running(running)
        stored, reason = self._sources(owner.module)
        refs = []
        for tensor in stored:
            known = self.name(tensor)
            if known is not None:
                refs.append(Ref(known, tuple(tensor.shape)))
        if not refs or len(refs[0].shape) != weight.ndim or refs[0].shape != tuple(weight.shape):
            return [], "a weight that is computed while running"
        return refs, reason

    def _sources(self, module: nn.Module | None) -> tuple[list[Tensor], str | None]:
        if module is None:
            return [], None
        if parametrize.is_parametrized(module, "weight"):
            chain: Any = module.parametrizations["weight"]  # type: ignore[index]
            if len(chain) == 1 and isinstance(chain[0], _WeightNorm) and chain.original0.ndim:
                return [chain.original1, chain.original0], None
            kinds = ", ".join(type(step).__name__ for step in chain)
            stored = list(chain.parameters(recurse=False))
            return stored, f"weight is parametrized by {kinds}: remove the parametrization before tracing"
        if isinstance(old := module._parameters.get("weight_v"), Tensor):
            return [old], "weight_norm is the deprecated one: use torch.nn.utils.parametrizations"
        return [], None

    def layer(self, ref: Ref, running: Sequence[nn.Module]) -> Owner:
        """The layer that uses a weight now: the running module, or for a functional call the weight's own module."""
        for owner in (self.running(running), self._holder(ref.name)):
            own = owner.module._parameters.get("weight") if owner.module is not None else None
            if own is self._tensors[ref.name] or ref.name.startswith(f"{owner.name}.parametrizations.weight."):
                return owner
        return Owner(self._holder(ref.name).name, None)  # a bare parameter: no attribute counts its units

    def running(self, modules: Sequence[nn.Module]) -> Owner:
        """The innermost running module, with its name."""
        module = modules[-1] if modules else None
        return Owner(self.module_name(module) or "", module)

    def produce(self, labels: Labels, owner: Owner, refs: Sequence[Ref], axis: int, kind: str) -> Tensor:
        """The labels of the producing axis; a magnitude of weight_norm carries them too."""
        size = refs[0].shape[axis]
        made = labels.produce(Producer((refs[0].name, axis), owner.name, kind), size)
        for ref in refs[1:]:
            if ref.shape[axis] == size:
                # A direction of length zero has no norm to divide by: only the magnitude is ever driven to zero.
                labels.passive.add((refs[0].name, axis))
                labels.record((ref.name, axis), made)
        return made

    def along(self, labels: Labels, tensor: Tensor | None, ids: Tensor, *, axis: int = 0) -> None:
        """A bias, norm scale or running statistic holds these units along ``axis``."""
        if tensor is None or (tensor.numel() == 1 and len(ids) > 1):
            return
        name = self.name(tensor)
        if name is None:
            labels.lock(ids, "meets a tensor that is computed while running")
        else:
            labels.record((name, axis), ids)

    def count(
        self,
        labels: Labels,
        owner: Owner,
        *,
        made_out: Tensor | None = None,
        into: Tensor | None = None,
        groups: Tensor | None = None,
        item: int | None = None,
    ) -> None:
        """Note which attributes of the layer count these units."""
        row = layers.counts(owner.module)
        for attribute, ids in ((row.out, made_out), (row.into, into), (row.groups, groups)):
            if attribute is None or ids is None:
                continue
            value = getattr(owner.module, attribute)
            if isinstance(value, tuple):
                if item is not None and value[item] == len(ids):
                    labels.count((owner.name, attribute, item), ids)
            elif value == len(ids):
                labels.count((owner.name, attribute, None), ids)
