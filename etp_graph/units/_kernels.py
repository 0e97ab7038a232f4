"""Fast sums over the axes of weights, and products along them, for the forces, which need them in every step.

A weight is viewed as a matrix: rows are its first axis *in memory*, columns are all others. Row sums and column sums
give the sums for every axis, and one read of the weight gives both. Large weights are processed in pieces, which stay
in the cache and limit the memory of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 19
"""Maximum number of elements of a piece, unless one row of the weight is longer."""

_RUN = 256
"""Count of numbers summed one after the other. The partial sums are summed next, which keeps an accuracy of 1e-6."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert to float32 unless the tensor is float64. Sums in lower precision are not accurate enough."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def axis_sums(value: Tensor, over: Sequence[int], transform: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Sum ``transform(value)``, for each axis in ``over``, over all other axes, in float32 or float64. Differentiable.

    On a CPU, the first two axes of a contiguous tensor (nearly every weight) are summed by a row sum and a
    matrix-vector product. This needs one pass, and is several times as fast as sums over several axes.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    if value.device.type != "cpu" or value.ndim < 2 or max(over) > 1 or not value.is_contiguous() or not value.numel():
        full = value.to(dtype) if transform is None else transform(value.to(dtype))
        return [full.sum([d for d in range(full.ndim) if d != axis]) if full.ndim > 1 else full for axis in over]
    rows = value.view(value.shape[0], -1)
    pieces = torch.split(rows, max(1, _CHUNK // max(rows.shape[1], 1))) if value.numel() > 4 * _CHUNK else (rows,)
    first: list[Tensor] = []
    second: Tensor | None = None
    for raw in pieces:
        piece = raw.to(dtype) if transform is None else transform(raw.to(dtype))
        if 0 in over:
            first.append(piece.sum(1))
        if 1 in over:
            part = torch.mv(piece.t(), piece.new_ones(len(piece)))
            second = part if second is None else second + part
    by_axis = {0: torch.cat(first) if len(first) > 1 else first[0]} if first else {}
    if second is not None:
        by_axis[1] = second.view(value.shape[1], -1).sum(1)
    return [by_axis[axis] for axis in over]


class Layout:
    """Memory layout of one weight, and its axes that hold units.

    Args:
        tensor: the weight; only its shape, strides, dtype and device are read.
        over: the axes that hold units.
    """

    def __init__(self, tensor: Tensor, over: Sequence[int]) -> None:
        self.strides = tensor.stride()
        self.over = tuple(over)
        self.vector = tensor.ndim == 1 and tensor.dtype in (torch.float32, torch.float64)
        self.order = sorted(range(tensor.ndim), key=lambda d: (-self.strides[d], d))
        # a shard may be empty, and an empty tensor cannot be reshaped to (0, -1)
        self.dense = tensor.ndim > 1 and tensor.numel() > 0 and tensor.permute(self.order).is_contiguous()
        self._permuted = self.order != list(range(tensor.ndim))
        shape = [tensor.shape[d] for d in self.order]
        self.columns = prod(shape[1:])
        self.step = max(1, _CHUNK // max(self.columns, 1))
        places = [self.order.index(axis) for axis in self.over]
        self.by_rows = 0 in places
        self.by_columns = any(places)
        # for an axis among the columns: the sizes before it, of it, and after it; None for the axis of the rows
        self.inside = [(prod(shape[1:p]), shape[p], prod(shape[p + 1 :])) if p else None for p in places]
        self._numpy = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)

    def square_sums(self, tensor: Tensor, buffer: Tensor | None = None) -> list[Tensor]:
        """Sum the squares, for each of the axes, over all other axes, in float32 or float64.

        ``buffer`` is :meth:`room` for the squares, which many weights can share.
        """
        if not self.dense:
            wide = tensor if tensor.dtype == torch.float64 else tensor.float()
            return axis_sums(wide, self.over, torch.square) if tensor.ndim > 1 else [wide.square()]
        matrix = self._as_matrix(tensor)
        rows: Tensor | None = None
        columns: Tensor | None = None
        if not self.by_columns and matrix.dtype == torch.float32:
            rows = torch.linalg.vector_norm(matrix, dim=1).square_()
        elif self._numpy and not self.by_columns:
            rows = _row_squares(matrix)
        elif self._numpy and not self.by_rows:
            columns = _column_squares(matrix)
        else:
            rows, columns = self._row_and_column_squares(matrix, self.make_buffer(tensor) if buffer is None else buffer)
        found = []
        for place in self.inside:
            sums = rows if place is None else columns
            assert sums is not None
            found.append(sums if place is None or place[1] == len(sums) else sums.view(place).sum((0, 2)))
        return found

    def scale_(self, tensor: Tensor, factors: Sequence[tuple[int, Tensor]]) -> None:
        """Multiply the tensor in place by each (axis, factor [size of the axis]) along its axis."""
        if not self.dense:
            for axis, factor in factors:
                tensor.mul_(factor.view([-1 if d == axis else 1 for d in range(tensor.ndim)]))
            return
        matrix = self._as_matrix(tensor)
        wide = [self._broadcast_factor(axis, factor) for axis, factor in factors]
        if len(wide) == 1 or matrix.numel() <= _CHUNK:
            for factor in wide:
                matrix.mul_(factor)
            return
        pieces = matrix.split(self.step)
        parts = [f.split(self.step) if len(f) > 1 else [f] * len(pieces) for f in wide]
        for piece, *mine in zip(pieces, *parts, strict=True):
            for factor in mine:
                piece.mul_(factor)

    def _broadcast_factor(self, axis: int, factor: Tensor) -> Tensor:
        """Return the factors of an axis as a column or a row that broadcasts against the matrix."""
        place = self.inside[self.over.index(axis)]
        if place is None:
            return factor.view(-1, 1)
        return (factor if place[1] == self.columns else factor.view(1, -1, 1).expand(place)).reshape(1, -1)

    def _as_matrix(self, tensor: Tensor) -> Tensor:
        return (tensor.permute(self.order) if self._permuted else tensor).reshape(tensor.shape[self.order[0]], -1)

    def make_buffer(self, tensor: Tensor) -> Tensor:
        """Return a buffer for the squares of one piece."""
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return tensor.new_empty(min(self.step * self.columns, tensor.numel()), dtype=dtype)

    def _row_and_column_squares(self, matrix: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the sums of squares of each row and, if an axis needs them, of each column."""
        rows: list[Tensor] = []
        columns: Tensor | None = None
        for piece in matrix.split(self.step) if self.step < len(matrix) else (matrix,):
            squares = buffer[: piece.numel()].view(piece.shape)
            if piece.dtype == buffer.dtype:
                torch.mul(piece, piece, out=squares)
            else:
                squares.copy_(piece).square_()
            rows.append(squares.sum(1))
            if self.by_columns:
                part = squares.sum(0)
                columns = part if columns is None else columns.add_(part)
        return torch.cat(rows) if len(rows) > 1 else rows[0], columns


def square_sums(held: Sequence[tuple[Layout, Tensor]]) -> list[list[Tensor]]:
    """Compute :meth:`Layout.square_sums` of many weights. One call squares all vectors, the most common parameters."""
    vectors = [tensor for layout, tensor in held if layout.vector]
    squares = iter(torch._foreach_mul(vectors, vectors) if vectors else ())
    rooms: dict[torch.dtype, Tensor] = {}
    found = []
    for layout, tensor in held:
        if layout.vector:
            found.append([next(squares)])
            continue
        room = rooms.get(tensor.dtype)
        if room is None or len(room) < min(layout.step * layout.columns, tensor.numel()):
            room = rooms[tensor.dtype] = layout.make_buffer(tensor)
        found.append(layout.square_sums(tensor, room))
    return found


def scale_(held: Sequence[tuple[Layout, Tensor, Sequence[tuple[int, Tensor]]]]) -> None:
    """Apply :meth:`Layout.scale_` to many weights. One call scales all vectors."""
    vectors: list[Tensor] = []
    scales: list[Tensor] = []
    for layout, tensor, factors in held:
        if layout.vector and len(factors) == 1:
            vectors.append(tensor)
            scales.append(factors[0][1])
        else:
            layout.scale_(tensor, factors)
    if vectors:
        torch._foreach_mul_(vectors, scales)


def _row_squares(matrix: Tensor) -> Tensor:
    """Sum the squares of each row, on a CPU. NumPy's einsum does not store the squares."""
    values = matrix.numpy()
    whole = values.shape[1] // _RUN * _RUN
    body = values[:, :whole].reshape(len(values), -1, _RUN)
    sums = np.einsum("ijk,ijk->ij", body, body).sum(1)
    rest = values[:, whole:]
    return torch.from_numpy(sums + np.einsum("ij,ij->i", rest, rest))


def _column_squares(matrix: Tensor) -> Tensor:
    """Sum the squares of each column, on a CPU."""
    values = matrix.numpy()
    parts = [np.einsum("ij,ij->j", rows, rows) for rows in (values[i : i + _RUN] for i in range(0, len(values), _RUN))]
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.sum(parts, axis=0))
