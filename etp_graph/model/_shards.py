"""Parameters that several processes share (DTensors, as FSDP2 makes them): who holds what, and sums over all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from etp_graph.errors import ForceError, PlanError


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor. Nobody has one who has not imported its module, which takes a while to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one of the tensors is a DTensor."""
    return any(is_sharded(tensor) for tensor in tensors.values())


def local_ranges(name: str, tensor: Any) -> tuple[range, ...]:
    """The positions of each axis that this process holds of a tensor.

    Raises:
        PlanError: a placement other than ``Shard`` and ``Replicate``, or this process is not in the tensor's mesh.
    """
    ranges = [range(size) for size in tensor.shape]
    if not is_sharded(tensor):
        return tuple(ranges)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise PlanError(f"{name} lives on {mesh}, to which this process does not belong: call this inside the mesh.")
    for dim, placement in enumerate(placements):
        if type(placement).__name__ == "Shard":
            axis = placement.dim % tensor.ndim
            whole = ranges[axis]
            step = -(-len(whole) // mesh.size(dim))
            ranges[axis] = whole[step * coordinate[dim] : step * (coordinate[dim] + 1)]
        elif type(placement).__name__ != "Replicate":
            raise PlanError(
                f"{name} has the placement {placement}: only Shard and Replicate are known. Shard different axes by "
                "tensor parallelism and by FSDP, or leave tensor parallelism out."
            )
    shape, found = tuple(map(len, ranges)), tuple(tensor.to_local().shape)
    if shape != found and tensor.to_local().numel() + _numel(shape):
        raise PlanError(f"{name}: this process holds {list(found)}, {placements} on {mesh} would be {list(shape)}.")
    return tuple(ranges)


def local_part(tensor: Tensor, ranges: tuple[range, ...]) -> Tensor:
    """What this process holds of a tensor: of a DTensor the local one, else a view of these positions; differentiable.

    It shares memory with the tensor.
    """
    shape = tuple(map(len, ranges))
    if is_sharded(tensor):
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return found if tuple(found.shape) == shape else found.reshape(shape)  # one without numbers may have any shape
    for axis, positions in enumerate(ranges):
        if len(positions) < tensor.shape[axis]:
            tensor = tensor.narrow(axis, positions.start, len(positions))
    return tensor


class Shards:
    """How the sliced parameters of one model are shared, found once.

    Parameters that are shared along the same dimensions of a mesh are summed in one row, and each row takes one
    all-reduce for each of these dimensions: one in all for FSDP, and for HSDP, whose other dimension only repeats.

    Args:
        tensors: the parameters, by name.

    Attributes:
        held: the positions of each axis that this process holds, by name.
        row: in which row a parameter is summed, by name; row 0: not shared.
        n_rows: their number.

    Raises:
        PlanError: see :func:`held`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.held = {name: local_ranges(name, tensor) for name, tensor in tensors.items()}
        rows: dict[tuple[str, ...], int] = {(): 0}
        self._groups: list[tuple[tuple[Any, ...], str]] = [((), "cpu")]
        self.row: dict[str, int] = {}
        for name, tensor in tensors.items():
            groups, device = _groups(tensor)
            key = tuple(group.group_name for group in groups)
            if key not in rows:
                rows[key] = len(rows)
                self._groups.append((groups, device))
            self.row[name] = rows[key]
        self.n_rows = len(rows)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of a parameter, or of a tensor of its shape."""
        return local_part(tensor, self.held[name])

    def total(self, rows: Tensor) -> Tensor:
        """The sum over all rows and processes, [n]; ``rows`` [n_rows, n] are this process's sums.

        Differentiable: every process has the same total, and what it does to its own parameters is its own gradient.

        Raises:
            ForceError: a process does not answer.
        """
        found: Tensor = _Total.apply(rows, self)
        return found

    def maximum(self, values: Tensor) -> Tensor:
        """The maximum over all processes of each number of ``values`` [n]."""
        from torch.distributed import ReduceOp

        rows = values.repeat(self.n_rows, 1)
        return torch.stack([self._reduced(row, number, ReduceOp.MAX) for number, row in enumerate(rows)]).amax(0)

    def sum_without_grad(self, rows: Tensor) -> Tensor:
        """:meth:`total` without gradients."""
        total = rows[0]
        for number in range(1, self.n_rows):
            total = total + self._reduced(rows[number], number)
        return total

    def _reduced(self, row: Tensor, number: int, op: Any = None) -> Tensor:
        import torch.distributed as dist

        groups, device = self._groups[number]
        moved = row.contiguous().to(device) if groups else row  # CPU offload: parameters are not where processes talk
        moved = moved.clone() if moved is row else moved
        try:
            for group in groups:
                dist.all_reduce(moved, op=op or dist.ReduceOp.SUM, group=group)
        except RuntimeError as error:
            raise ForceError(
                f"the norms of the units cannot be summed over {len(groups)} group(s) of processes ({error}): one of "
                "them died, or does not take part. Start all of them from the last checkpoint."
            ) from error
        return moved.to(row.device)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.n_rows = len(rows)
        return shards.sum_without_grad(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].expand(ctx.n_rows, -1), None


def _groups(tensor: Any) -> tuple[tuple[Any, ...], str]:
    """The groups of processes among which a tensor is divided, and the device on which they talk."""
    if not is_sharded(tensor):
        return (), "cpu"
    mesh = tensor.device_mesh
    dims = [d for d, p in enumerate(tensor.placements) if type(p).__name__ == "Shard" and mesh.size(d) > 1]
    return tuple(mesh.get_group(d) for d in dims), mesh.device_type


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
