"""Find the operators that read removed units in a forward, and record the moments of their inputs.

The operators are seen below autograd, where every layer is one of a few: a matrix product or a convolution. Packed
projections, layers of other libraries and functional calls on bare parameters are therefore seen as plain modules are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._moments import Moments

_ATEN = torch.ops.aten

_ROW_SUM = "a sum with one of its rows"

ROW_READERS = frozenset((str(_ATEN.embedding.default), str(_ATEN.index.Tensor), _ROW_SUM))
"""Names of operators that read whole rows of a table [rows, outputs]: embeddings, and biases of experts."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rows ``first`` to ``first + rows`` of a parameter along one axis.

    Attributes:
        entry: index on the first axis, if the parameter holds one matrix for each expert; else ``None``.
    """

    parameter: str
    axis: int
    first: int
    rows: int
    entry: int | None = None

    def overlaps(self, other: Place) -> bool:
        """Return True if both are of one parameter and share rows."""
        if (self.parameter, self.entry) != (other.parameter, other.entry):
            return False
        return max(self.first, other.first) < min(self.first + self.rows, other.first + other.rows)


@dataclass(slots=True, kw_only=True)
class Reader:
    """Operator that computes outputs from all input units of a weight.

    Attributes:
        weight: name of the parameter, its output axis and the rows that the operator reads.
        in_axis: axis of the parameter that holds the input units.
        bias: where the bias of these outputs is, or ``None``.
        per_position: whether the features are the input units alone, and each kernel position is an output of its own,
            as in a transposed convolution. Otherwise they are pairs (input unit, kernel position), in this order.
        moments: of the inputs.
    """

    weight: Place
    in_axis: int
    bias: Place | None
    per_position: bool = False
    moments: Moments = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """How a convolution places its kernel; equal for convolutions that read the same patches."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Input:
    """Tensor that an operator read, and its moments. The reference keeps its memory from being used again."""

    tensor: Tensor
    version: int
    geometry: _Geometry | None
    moments: Moments

    def matches(self, x: Tensor, geometry: _Geometry | None) -> bool:
        """Return True if ``x`` holds the same values and is read in the same way."""
        mine = self.tensor
        same = mine.data_ptr() == x.data_ptr() and mine.shape == x.shape and mine.stride() == x.stride()
        return same and self.version == x._version and self.geometry == geometry


class RecordReaders(TorchDispatchMode):
    """Context of forwards whose readers of the given parameters are recorded.

    Args:
        parameters: by name, those whose input axis may lose units.
        biases: by name, all other parameters; a reader's bias is found among them.
        axes: by name, the axes that may lose units. The inputs of operators that read along others are not recorded.
        places: at most this many positions of a feature map are used per convolution and batch.

    Attributes:
        readers: what was found, in the order of the first forward.
        others: parameters that another operator reads, too, or in another way, and the name of that operator.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        *,
        axes: Mapping[str, Collection[int]],
        places: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readers: dict[Place, Reader] = {}
        self.others: dict[str, str] = {}
        self.mask: Tensor | None = None
        self._parameters, self._biases = dict(parameters), dict(biases)
        self._by_memory: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in (*biases.items(), *parameters.items()):
            self._by_memory.setdefault(_memory(tensor), []).append((name, tensor))
        self._axes, self._places = axes, places
        self._generator = torch.Generator().manual_seed(0)
        self._last: _Input | None = None

    def begin_batch(self, mask: Tensor | None) -> None:
        """Begin a batch; ``mask`` [batch, length] is zero at padded tokens, which are left out."""
        self.mask, self._last = mask, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _READERS.get(func)
        found = read(self, args) if read is not None else None
        if found is None:
            self._note_other_use(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note_other_use(self, func: Any, args: Any, kwargs: Any) -> None:
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return  # a view: whoever reads it is seen
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (name := self._name(leaf)) in self._parameters:
                of_a_row = leaf.ndim == 1 and func is _ATEN.add.Tensor
                self.others.setdefault(name, _ROW_SUM if of_a_row else str(func))

    def _name(self, tensor: Tensor) -> str:
        """Return the name of the parameter that a tensor is a view of, or an empty string."""
        at = tensor.storage_offset()
        for name, whole in self._by_memory.get(_memory(tensor), ()):  # several, if one vector holds all parameters
            if whole.storage_offset() <= at < whole.storage_offset() + whole.numel():
                return name
        return ""

    def matrix(self, vectors: Tensor, matrix: Tensor, bias: Tensor | None) -> Reader | None:
        """Record a product of ``vectors`` [n, in] and ``matrix`` [in, out], which is a view of a parameter."""
        whole = self._parameters.get(name := self._name(matrix))
        if whole is None or whole.ndim not in (2, 3):
            return None
        entry = None
        if whole.ndim == 3:  # one matrix for each expert
            entry, bias = int(matrix.storage_offset() - whole.storage_offset()) // max(whole.stride(0), 1), None
        part = whole if entry is None else whole[entry]
        in_axis = next((a for a in (0, 1) if part.stride(a) == matrix.stride(0)), None)
        if in_axis is None or part.shape[in_axis] != matrix.shape[0] or matrix.shape[1] > part.shape[1 - in_axis]:
            return None
        place = self._place(name, part, 1 - in_axis, matrix, rows=matrix.shape[1], entry=entry)
        in_axis += whole.ndim - 2
        moments = self._moments(place, in_axis, vectors, None, vectors.shape[1])
        if moments.waits:  # an expert gets tokens in another order than that of the mask
            moments.add(self._unpadded(vectors) if entry is None else vectors)
        return self._reader(place, in_axis, bias, moments.moments)

    def grouped(self, vectors: Tensor, matrices: Tensor, ends: Tensor | None) -> Reader | None:
        """Record products of the vectors of each expert, up to its entry of ``ends``, and its matrix [in, out]."""
        if ends is None or vectors.ndim != 2 or matrices.ndim != 3 or self._name(matrices) not in self._parameters:
            return None
        found, begin = None, 0
        for matrix, end in zip(matrices, ends.tolist()):
            if end > begin:
                found = self.matrix(vectors[begin:end], matrix, None)
            begin = end
        return found

    def batched(self, vectors: Tensor, matrices: Tensor) -> Reader | None:
        """Record products of the vectors [n, in] and the matrix [in, out] of each expert."""
        if self._name(matrices) not in self._parameters:
            return None  # queries and keys
        found = None
        for part, matrix in zip(vectors, matrices):
            found = self.matrix(part, matrix, None)
        return found

    def convolution(self, args: tuple[Any, ...]) -> Reader | None:
        """Record a convolution by its arguments."""
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args
        whole = self._parameters.get(name := self._name(weight))
        if whole is None or whole.shape != weight.shape or groups > 1:
            return None
        if transposed:
            return self._transposed(name, x, weight)
        geometry = _Geometry(tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
        place = Place(name, 0, 0, weight.shape[0])
        moments = self._moments(place, 1, x, geometry, prod(weight.shape[1:]))
        if moments.waits:
            moments.add(self._patches(x, geometry))
        return self._reader(place, 1, bias, moments.moments)

    def _transposed(self, name: str, x: Tensor, weight: Tensor) -> Reader:
        """Record a transposed convolution. A bias cannot make good a mean, because borders are reached more seldom."""
        place = Place(name, 1, 0, weight.shape[1])
        channels = x.movedim(-(weight.ndim - 1), -1).flatten(0, -2)
        moments = self._moments(place, 0, x, None, weight.shape[0])
        if moments.waits:
            moments.add(channels)
        return self._reader(place, 0, None, moments.moments, per_position=True)

    def _place(
        self, name: str, whole: Tensor, axis: int, part: Tensor, *, rows: int, entry: int | None = None
    ) -> Place:
        first = (part.storage_offset() - whole.storage_offset()) // max(whole.stride(axis), 1)
        return Place(name, axis + (entry is not None), int(first), rows, entry)

    def _reader(
        self, place: Place, in_axis: int, bias: Tensor | None, moments: Moments, *, per_position: bool = False
    ) -> Reader:
        if place not in self.readers:
            at = None
            if bias is not None and (name := self._name(bias)):
                whole = self._parameters.get(name, self._biases.get(name))
                assert whole is not None
                at = self._place(name, whole, 0, bias, rows=place.rows)
            self.readers[place] = Reader(
                weight=place, in_axis=in_axis, bias=at, per_position=per_position, moments=moments
            )
        return self.readers[place]

    def _moments(self, place: Place, in_axis: int, x: Tensor, geometry: _Geometry | None, features: int) -> _Pending:
        """Return the moments of an operator's inputs, those of the operator before if both read the same tensor."""
        if in_axis not in self._axes[place.parameter]:
            return _Pending(Moments(0, x.device), waits=False)
        known, last = self.readers.get(place), self._last
        if last is not None and last.matches(x, geometry) and (known is None or known.moments is last.moments):
            return _Pending(last.moments, waits=False)
        moments = known.moments if known is not None else Moments(features, x.device)
        self._last = _Input(x, x._version, geometry, moments)
        return _Pending(moments, waits=True)

    def _unpadded(self, vectors: Tensor) -> Tensor:
        mask = self.mask
        if mask is None or mask.numel() != len(vectors):
            return vectors
        return vectors[mask.flatten().to(vectors.device) > 0]

    def _patches(self, x: Tensor, geometry: _Geometry) -> Tensor:
        """Return the patches that a convolution reads, [n, features]; a random sample of them."""
        x = x if x.ndim == len(geometry.kernel) + 2 else x.unsqueeze(0)
        x = F.pad(x, [p for p in reversed(geometry.padding) for _ in (0, 1)])
        for axis, (size, stride, dilation) in enumerate(
            zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        spatial = len(geometry.kernel)
        x = x.movedim(1, 1 + spatial).flatten(0, spatial)  # [positions, channels, *kernel]
        if len(x) > self._places:
            x = x[torch.randperm(len(x), generator=self._generator)[: self._places].to(x.device)]
        return x.flatten(1)


@dataclass(frozen=True, slots=True)
class _Pending:
    """Moments, and whether the inputs of this operator still have to be added."""

    moments: Moments
    waits: bool

    def add(self, vectors: Tensor) -> None:
        self.moments.add(vectors)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_READERS: Mapping[Any, Callable[[RecordReaders, Any], Reader | None]] = {
    _ATEN.mm.default: lambda mode, args: mode.matrix(args[0], args[1], None),
    _ATEN.addmm.default: lambda mode, args: mode.matrix(args[1], args[2], args[0]),
    _ATEN.bmm.default: lambda mode, args: mode.batched(args[0], args[1]),
    _ATEN._grouped_mm.default: lambda mode, args: mode.grouped(args[0], args[1], args[2] if len(args) > 2 else None),
    _ATEN.convolution.default: lambda mode, args: mode.convolution(args),
}
"""Operators that layers come to, and how each is recorded."""
