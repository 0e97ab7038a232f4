"""Parameters that are divided among processes (DTensors, as in FSDP2): local parts, and sums over all processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from etp_graph.errors import ForceError, PlanError


def is_sharded(tensor: object) -> bool:
    """Return True if this is a DTensor.

    If ``torch.distributed.tensor`` is not imported, no DTensor can exist. Importing it only for this check would be
    slow.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if at least one of the tensors is a DTensor."""
    return any(is_sharded(tensor) for tensor in tensors.values())


def local_ranges(name: str, tensor: Any) -> tuple[range, ...]:
    """Return the positions of each axis of a tensor that this process holds.

    Raises:
        PlanError: a placement is neither ``Shard`` nor ``Replicate``, this process is not in the tensor's mesh, or the
            shape of the local tensor does not follow from the placements.
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
    """Return the part of a tensor that this process holds: of a DTensor the local tensor, else a view of ``ranges``.

    It shares memory with the tensor, and is differentiable.
    """
    shape = tuple(map(len, ranges))
    if is_sharded(tensor):
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return found if tuple(found.shape) == shape else found.reshape(shape)  # shapes differ only if it is empty
    for axis, positions in enumerate(ranges):
        if len(positions) < tensor.shape[axis]:
            tensor = tensor.narrow(axis, positions.start, len(positions))
    return tensor


class Shards:
    """Division of the sliced parameters of one model among processes, found once.

    Sums over parameters that are divided along the same mesh dimensions share one row. Each row takes one all-reduce
    for each of these dimensions. FSDP needs one all-reduce in total. So does HSDP, because it divides parameters along
    one dimension and replicates them along the other.

    Args:
        tensors: the parameters, by name.

    Attributes:
        held: by name of the parameter, the positions of each axis that this process holds.
        row: by name of the parameter, the row in which it is summed; row 0 is for parameters that are not divided.
        n_rows: number of rows.

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
        """Return the part that this process holds of a parameter, or of a tensor of its shape."""
        return local_part(tensor, self.held[name])

    def total(self, rows: Tensor) -> Tensor:
        """Sum over all rows and processes, [n]; ``rows`` [n_rows, n] are the sums of this process.

        Differentiable. Every process computes the same total, so the backward pass needs no communication: each process
        gets the gradient with respect to its own parameters.

        Raises:
            ForceError: an all-reduce failed, because a process died or does not take part.
        """
        found: Tensor = _Total.apply(rows, self)
        return found

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum of each element of ``values`` [n] over all processes, [n]."""
        from torch.distributed import ReduceOp

        rows = values.repeat(self.n_rows, 1)
        return torch.stack([self._reduced(row, number, ReduceOp.MAX) for number, row in enumerate(rows)]).amax(0)

    def sum_without_grad(self, rows: Tensor) -> Tensor:
        """Compute :meth:`total` without gradients."""
        total = rows[0]
        for number in range(1, self.n_rows):
            total = total + self._reduced(rows[number], number)
        return total

    def _reduced(self, row: Tensor, number: int, op: Any = None) -> Tensor:
        import torch.distributed as dist

        groups, device = self._groups[number]
        # with CPU offload, parameters are not on the device of the process group
        moved = row.contiguous().to(device) if groups else row
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
    """Return the process groups among which a tensor is divided, and the type of the device they communicate on."""
    if not is_sharded(tensor):
        return (), "cpu"
    mesh = tensor.device_mesh
    dims = [d for d, p in enumerate(tensor.placements) if type(p).__name__ == "Shard" and mesh.size(d) > 1]
    return tuple(mesh.get_group(d) for d in dims), mesh.device_type


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
