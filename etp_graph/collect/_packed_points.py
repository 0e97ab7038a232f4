"""Watch the neurons of experts that are packed in one tensor: at the products with the weights that read them.

No module shows these neurons. While the module that holds the weights runs, its products are looked at: the neurons are
the left factor of a product with a view of the weights, if the product sums over the axis of the neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from etp_graph.plan import Group, as_tensor

from ._padding import PaddingMasks
from ._watch_points import WatchPoint

_SUMMED = {
    F.linear: -1,
    **{
        getattr(owner, name): -2
        for owner, names in (
            (torch, ("matmul", "mm", "bmm", "_grouped_mm")), (Tensor, ("matmul", "mm", "bmm", "__matmul__")),
            (F, ("grouped_mm",)),
        )
        for name in names if hasattr(owner, name)
    },
}  # fmt: skip
"""Products of a tensor and weights, and the dimension of the weights over which each sums."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedPoint(WatchPoint):
    """Neurons of all experts, as the weights of one parameter read them.

    Attributes:
        parameter: attribute of the module that holds the weights, [experts, ...].
        axis: its axis of the neurons.
    """

    parameter: str
    axis: int


def packed_points(model: nn.Module, group: Group, start: int) -> list[PackedPoint]:
    """Return where neurons of packed experts may be read; of the places one is never seen, where they are produced.

    Args:
        model: the model.
        group: a group of units that no module shows.
        start: flat number of its first unit.
    """
    if group.kind == "experts":
        return []
    found, parameters = [], dict(model.named_parameters())
    for piece in group.slices:
        home, _, name = piece.tensor.rpartition(".")
        if piece.tensor in parameters and parameters[piece.tensor].ndim == 3 and piece.axis > 0:
            units, local = (as_tensor(piece.unit) + start).unique(return_inverse=True)
            index = as_tensor(piece.index)
            found.append(PackedPoint(home, "input", -1, index, units, local, name, piece.axis))
    return found


Watched = Sequence[tuple[PackedPoint, Tensor, Callable[[Tensor], None]]]
"""Points of one module, the weights of each, and what takes the activations."""


class PackedReads:
    """Shows the neurons of packed experts while their modules run.

    Args:
        model: the model.
        watched: points, each with a function that takes the activations of one product, [..., neurons].
        padding: knows the tokens that are padding.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Sequence[tuple[PackedPoint, Callable[[Tensor], None]]],
        padding: PaddingMasks,
    ) -> None:
        self._model, self._watched, self._padding = model, watched, padding
        self._tokens: dict[str, int] = {}
        self._read: dict[int, int] = {}
        self._by_all: set[int] = set()
        self._running: list[Watched] = []

    def register(self) -> list[Any]:
        """Watch the modules, and return the handles of their hooks."""
        handles = []
        for name in dict.fromkeys(point.module for point, _ in self._watched):
            module = self._model.get_submodule(name)
            own = [(p, getattr(module, p.parameter), show) for p, show in self._watched if p.module == name]
            handles.append(module.register_forward_pre_hook(partial(self._begin, name, own), with_kwargs=True))
            handles.append(module.register_forward_hook(self._end, always_call=True))
        return handles

    def mode(self) -> AbstractContextManager[object]:
        """Return the context of the forwards. Without points it does nothing."""
        return _Products(self._running, self._note) if self._watched else nullcontext()

    def begin_forward(self) -> None:
        """Forget what an interrupt may have left."""
        self._running.clear()

    def reads_per_token(self, point: PackedPoint) -> float:
        """Return by how many experts a token that is no padding is read on average."""
        if id(point) in self._by_all:
            return float(getattr(self._model.get_submodule(point.module), point.parameter).shape[0])
        return self._read.get(id(point), 0) / max(self._tokens.get(point.module, 0), 1)

    def _begin(
        self, name: str, watched: Watched, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count the tokens, and begin to look."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        tokens = next((value for value in given if value.is_floating_point() and value.ndim), None)
        if tokens is not None:
            count, mask = tokens.numel() // max(tokens.shape[-1], 1), self._padding.mask_at(name)
            count = int(mask.sum()) if mask is not None and mask.numel() == count else count
            self._tokens[name] = self._tokens.get(name, 0) + count
        self._running.append(watched)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look no more; also called after an exception."""
        if self._running:
            self._running.pop()

    def _note(self, point: PackedPoint, x: Tensor) -> None:
        """Count the rows that an expert reads. Of three dimensions, all experts read all tokens."""
        self._read[id(point)] = self._read.get(id(point), 0) + x.numel() // max(x.shape[-1], 1)
        if x.ndim == 3:
            self._by_all.add(id(point))


class _Products(TorchFunctionMode):
    """Mode that shows the left factors of products with weights of packed experts, while their module runs."""

    def __init__(self, running: Sequence[Watched], note: Callable[[PackedPoint, Tensor], None]) -> None:
        super().__init__()
        self._running, self._note = running, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running and func in _SUMMED and len(args) > 1 and isinstance(args[1], Tensor):
            self._look(args[0], args[1], _SUMMED[func])
        return func(*args, **(kwargs or {}))

    def _look(self, x: Tensor, weights: Tensor, dim: int) -> None:
        for point, whole, show in self._running[-1]:
            same = weights.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            if same and weights.stride(dim) == whole.stride(point.axis) and x.shape[-1] == whole.shape[point.axis]:
                self._note(point, x)
                if x.numel():
                    show(x)
