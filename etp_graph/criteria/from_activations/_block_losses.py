"""Optimal Brain Surgeon for units: the loss of removing each one if the others make good what they can."""

from __future__ import annotations

import torch
from torch import Tensor

from etp_graph.collect import positions_by_width

RIDGE = 1e-2
"""What is added to the diagonal of the second moment, relative to its mean. It keeps the inverse finite."""

ROUNDS = 32
"""A layer loses its units in this many rounds. The losses of those that stay are computed anew after each."""


def surgeon_losses(second: Tensor, weight: Tensor, unit: Tensor) -> Tensor:
    """Return the loss of each unit at the time of its removal, the least important unit first, float64 [units].

    Unit u at the positions B costs ``½ tr((([M⁻¹]_BB)⁻¹ − λ I) Γ_BB)``, which is zero for a silent unit. The units with
    the least losses are removed, and M⁻¹ and Γ become those of the layer after compensation (Hassibi & Stork 1993, eq.
    5; Frantar & Alistarh 2022, eq. 4). This repeats until all are removed. A loss is at least that of the units removed
    before, so that the scores keep the order.

    Args:
        second: E x xᵀ of the inputs of a layer, float64 [positions, positions]; M is this plus a ridge, λ I.
        weight: Γ = Wᵀ G W, float64 [positions, positions]. G weighs errors of the outputs: the identity, or the second
            moment of the gradients, with which Γ is the second moment of the gradients by the inputs.
        unit: the unit of each position, int64 [positions].
    """
    size, n_units = len(second), int(unit.max()) + 1 if len(unit) else 0
    damping = RIDGE * float(second.diagonal().mean()) or 1.0  # dead inputs: any value, because nothing is lost
    inverse = torch.linalg.inv(second + damping * torch.eye(size, dtype=second.dtype, device=second.device))
    inverse, weight = (inverse + inverse.mT) / 2, weight.clone()
    found, alive = second.new_zeros(n_units), torch.ones(n_units, dtype=torch.bool, device=second.device)
    step, least = -(-n_units // ROUNDS), second.new_zeros(())
    while bool(alive.any()):
        losses = _block_losses(inverse, weight, unit, alive, damping)
        values, gone = losses.sort(stable=True)
        count = min(step, int(alive.sum()))
        least = torch.maximum(least, values[:count])
        found[gone[:count]], least = least, least[-1]
        alive[gone[:count]] = False
        if bool(alive.any()):
            _remove_(inverse, weight, torch.isin(unit, gone[:count]).nonzero().flatten())
    return found


def _block_losses(inverse: Tensor, weight: Tensor, unit: Tensor, alive: Tensor, damping: float) -> Tensor:
    """Return the loss of each unit, float64 [units]; infinite for those that were removed."""
    losses = inverse.new_full((len(alive),), torch.inf)
    for same_width, positions in positions_by_width(unit, len(alive)):
        stay = alive[same_width]
        units, at = same_width[stay], positions[stay]
        rows, columns = at.unsqueeze(2), at.unsqueeze(1)
        solved = torch.linalg.solve(inverse[rows, columns], weight[rows, columns])
        errors = solved - damping * weight[rows, columns]
        losses[units] = errors.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0) / 2
    return losses


def _remove_(inverse: Tensor, weight: Tensor, gone: Tensor) -> None:
    """Remove positions from M, and let the others make good for them in Γ, in place.

    With ``T = [M⁻¹]_BB⁻¹ [M⁻¹]_B:``, M⁻¹ loses ``[M⁻¹]_:B T`` and W loses ``W_B T``.
    """
    rows = inverse[gone]
    change = torch.linalg.solve(rows[:, gone], rows)
    inverse.sub_(rows.mT @ change)
    cross = weight[:, gone] @ change
    weight.sub_(cross + cross.mT - change.mT @ weight[gone][:, gone] @ change)
    for matrix in (inverse, weight):  # what rounding left of the removed rows
        matrix[gone] = 0
        matrix[:, gone] = 0
