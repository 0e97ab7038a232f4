"""Find the named parameters and buffers behind the tensors that a forward uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from etp_graph.model import CountingAttributes, counting_attributes, is_editable, named_tensors

from ._labels import Labels, Producer


@dataclass(frozen=True, slots=True)
class TensorView:
    """Stored tensor (parameter or buffer) that a layer's weight is, is a view of, or is computed from.

    Attributes:
        name: name of the stored tensor.
        shape: shape of the weight that the layer uses.
        axes: for each dimension of the weight the axis of the stored tensor, -1 for a dimension that the view adds;
            empty if they are the same.
        starts: for each dimension the position on that axis where the view begins; empty if all are 0.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    def axis(self, dim: int) -> tuple[str, int]:
        """Return the stored axis (name, axis) behind a dimension of the weight."""
        return self.name, self.axes[dim] if self.axes else dim

    def start(self, dim: int) -> int:
        """Return the position on that axis where the view begins."""
        return self.starts[dim] if self.starts else 0


@dataclass(frozen=True, slots=True)
class NamedModule:
    """Module and its qualified name."""

    name: str
    module: nn.Module | None


class StoredTensors:
    """Names of the tensors and modules of one model.

    Attributes:
        fixed: name of each tensor whose units must all stay -> reason.
        seen: names of the tensors that a forward has used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._module_names: dict[int, str] = {}
        for name, module in self._modules.items():
            self._module_names.setdefault(id(module), name)
        self._tensors = dict(named_tensors(model))
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._bare = {
            name for name, tensor in self._tensors.items()
            if tensor.is_floating_point() and counting_attributes(self.layer_of(name).module) == CountingAttributes()
        }  # fmt: skip
        self._stored: dict[int, Tensor | None] = {}
        for tensor in self._tensors.values():  # for views of a buffer that is a view: their _base is another tensor
            if tensor.device.type != "meta" and tensor.layout == torch.strided:
                at = tensor.untyped_storage().data_ptr()
                self._stored[at] = None if at in self._stored else tensor
        self.fixed: dict[str, str] = {}
        self.seen: set[str] = set()

    def copy(self) -> StoredTensors:
        """Return a copy whose ``fixed`` and ``seen`` change independently."""
        other = copy(self)
        other.fixed, other.seen = dict(self.fixed), set(self.seen)
        return other

    def layer_of(self, name: str) -> NamedModule:
        """Return the layer that a tensor belongs to. The layer of a parametrized weight is the parametrized module."""
        layer, parametrized, _ = name.partition(".parametrizations.")
        owner = layer if parametrized else name.rpartition(".")[0]
        return NamedModule(owner, self._modules.get(owner))

    def may_count(self, attribute: tuple[str, str, int | None]) -> bool:
        """Return True if surgery may write an attribute."""
        module = self._modules.get(attribute[0])
        return module is not None and is_editable(module, attribute[1])

    def module_name(self, module: nn.Module | None) -> str | None:
        """Return the qualified name of a module, or ``None`` if it is not part of the model."""
        return self._module_names.get(id(module))

    def name(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter or buffer, and add it to ``seen``; ``None`` for any other tensor."""
        name = self._names.get(id(tensor))
        if name is not None:
            self.seen.add(name)
        return name

    def view_of(self, tensor: Tensor) -> TensorView | None:
        """Return the stored tensor that this one is, or is a view of.

        Return ``None`` if the dimensions of the view do not lie on one axis of the stored tensor each.
        """
        if (name := self.name(tensor)) is not None:
            return TensorView(name, tuple(tensor.shape))
        base = self.base_of(tensor)
        if base is None or (name := self.name(base)) is None or not base.is_contiguous():
            return None
        axes = _axes_of_view(tensor, base)
        if axes is None:
            return None
        offset = tensor.storage_offset() - base.storage_offset()
        starts = [offset // stride % size for stride, size in zip(base.stride(), base.shape, strict=True)]
        return TensorView(name, tuple(tensor.shape), axes, tuple(int(starts[d]) if d >= 0 else 0 for d in axes))

    def stored_name(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter or buffer that a tensor is or is a view of, or ``None``."""
        base = None if self.name(tensor) else self.base_of(tensor)
        return self.name(tensor if base is None else base)

    def base_of(self, tensor: Tensor) -> Tensor | None:
        """Return the parameter or buffer that a tensor is a view of, or ``None``."""
        if tensor._base is None:
            return None
        if self.name(tensor._base) is not None:
            return tensor._base
        return self._stored.get(tensor.untyped_storage().data_ptr())

    def mark_used(self, tensors: Iterable[Tensor | None]) -> None:
        """Record that a forward uses these tensors."""
        for tensor in tensors:
            if tensor is not None:
                self.name(tensor)

    def bare_name(self, tensor: Tensor) -> str | None:
        """Return the name of a floating-point tensor that belongs to no layer of the layer table; else ``None``.

        Examples are layer scales and position tables.
        """
        name = self.name(tensor)
        return name if name in self._bare else None

    def embedding_name(self, tensor: Tensor) -> str | None:
        """Return the name of a tensor that is the weight of an embedding; else ``None``.

        The tracer needs it where an operator other than the lookup reads the weight.
        """
        name = self.name(tensor)
        owner = self.layer_of(name).module if name is not None else None
        return name if isinstance(owner, nn.Embedding) and owner.weight is tensor else None

    def vector_name(self, tensor: Tensor) -> str | None:
        """Return the name of a parameter with one axis that belongs to a layer of the layer table; else ``None``."""
        name = self.name(tensor) if tensor.ndim == 1 and isinstance(tensor, nn.Parameter) else None
        return name if name is not None and name not in self._bare and ".parametrizations." not in name else None

    def tensor(self, name: str) -> Tensor:
        """Return the tensor with a name."""
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a named tensor."""
        return tuple(self._tensors[name].shape)

    def find_stored(self, weight: Tensor, running: Sequence[nn.Module]) -> tuple[list[TensorView], str | None]:
        """Return the stored tensors behind a layer's weight, the main one first, and a reason if the layer is locked.

        If there are no such tensors, the layer cannot be pruned.
        """
        ref = self.view_of(weight)
        if ref is not None:
            return [ref], self.fixed.get(ref.name)
        owner = self.running_module(running)
        stored, reason = self._source_tensors(owner.module)
        refs = []
        for tensor in stored:
            known = self.name(tensor)
            if known is not None:
                refs.append(TensorView(known, tuple(tensor.shape)))
        if refs and refs[0].shape == tuple(weight.shape):
            return refs, reason
        own = None if owner.module is None else owner.module._parameters.get("weight")
        if own is not None and own.shape == weight.shape and (name := self.name(own)) is not None:
            return [TensorView(name, tuple(own.shape))], "its weight is computed while running"  # standardised, say
        return [], "a weight that is computed while running"

    def _source_tensors(self, module: nn.Module | None) -> tuple[list[Tensor], str | None]:
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

    def owner(self, ref: TensorView, running: Sequence[nn.Module]) -> NamedModule:
        """Return the running module if it owns the weight, else (for a functional call) the module that does."""
        for owner in (self.running_module(running), self.layer_of(ref.name)):
            own = owner.module._parameters.get("weight") if owner.module is not None else None
            if own is self._tensors[ref.name] or ref.name.startswith(f"{owner.name}.parametrizations.weight."):
                return owner
        return NamedModule(self.layer_of(ref.name).name, None)  # bare parameter: no attribute counts its units

    def running_module(self, modules: Sequence[nn.Module]) -> NamedModule:
        """Return the innermost running module with its name."""
        module = modules[-1] if modules else None
        return NamedModule(self.module_name(module) or "", module)

    def produce(self, labels: Labels, owner: NamedModule, refs: Sequence[TensorView], axis: int, kind: str) -> Tensor:
        """Return the labels of the producing axis. For weight_norm, record them for the magnitude, too."""
        size, main = refs[0].shape[axis], refs[0].axis(axis)
        made = labels.produce(Producer(main, owner.name, kind), self.shape(main[0])[main[1]])
        made = made.narrow(0, refs[0].start(axis), size)
        for ref in refs[1:]:
            if ref.shape[axis] == size:
                # Forces shrink only the magnitude, because weight_norm divides by the norm of the direction.
                labels.passive.add(main)
                labels.add_axis((ref.name, axis), made)
        return made

    def add_vector(
        self, labels: Labels, tensor: Tensor | None, ids: Tensor, *, axis: int = 0, known: Tensor | None = None
    ) -> None:
        """Record that a bias, norm scale or running statistic holds these units along ``axis``.

        ``known`` are the labels of a tensor that is computed from stored ones. Lock the units if they are unknown.
        """
        if tensor is None or (tensor.numel() == 1 and len(ids) > 1):
            return
        ref = self.view_of(tensor)
        if ref is None and known is not None and known.numel() == len(ids):
            labels.unite(ids, known.flatten(), "meets a tensor that is partly of fixed width")
        elif ref is None:
            labels.lock(ids, "meets a tensor that is computed while running")
        else:
            self.add_axis(labels, ref, axis, ids)

    def add_axis(self, labels: Labels, ref: TensorView, dim: int, ids: Tensor) -> None:
        """Record that a dimension of a stored tensor, or of a view of it, holds these units."""
        axis, start = ref.axis(dim), ref.start(dim)
        size = self.shape(axis[0])[axis[1]]
        if len(ids) < size:
            if axis not in labels.axes:
                labels.axes[axis] = labels.new_labels(size)
            whole = labels.axes[axis].clone()
            whole[start : start + len(ids)] = ids
            ids = whole
        labels.add_axis(axis, ids)

    def count_attributes(
        self,
        labels: Labels,
        owner: NamedModule,
        *,
        made_out: Tensor | None = None,
        into: Tensor | None = None,
        groups: Tensor | None = None,
        item: int | None = None,
    ) -> None:
        """Record which attributes of the layer count its output units, its input units and its groups.

        ``item`` is the entry of a tuple attribute. An attribute counts only if its value is the number of units.
        """
        row = counting_attributes(owner.module)
        for attribute, ids in ((row.out, made_out), (row.into, into), (row.groups, groups)):
            if attribute is None or ids is None:
                continue
            value = getattr(owner.module, attribute)
            if isinstance(value, tuple):
                if item is not None and value[item] == len(ids):
                    labels.count((owner.name, attribute, item), ids)
            elif value == len(ids):
                labels.count((owner.name, attribute, None), ids)


def _axes_of_view(tensor: Tensor, base: Tensor) -> tuple[int, ...] | None:
    """Return the axis of ``base`` behind each dimension of a view, -1 for one of size 1 that the view adds.

    Return ``None`` if a dimension does not lie on one axis.
    """
    axes = [-1] * tensor.ndim
    for long in (True, False):  # a dimension of size 1 may have the stride of several axes: any that is left will do
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if (size > 1) is long:
                fits = [d for d, s in enumerate(base.stride()) if s == stride and base.shape[d] >= size]
                free = sorted((d for d in fits if d not in axes), key=lambda d: base.shape[d])
                if long and len(free) != 1:
                    return None
                axes[dim] = free[0] if free else -1
    return tuple(axes)
