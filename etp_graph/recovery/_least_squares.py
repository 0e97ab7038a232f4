"""Least squares of what a layer loses onto what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CUTOFF = 1e-12
"""Eigenvalues below this share of the largest one count as zero, where nothing else makes the problem well posed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """New weights of the kept features.

    Attributes:
        weight: float64 [outputs, kept].
        shift: what the bias gains, float64 [outputs].
        lost: mean square of the output without the removed features, after their mean went into the bias.
        left: the same with the new weights.
        total: mean square of the output (its variance, if the features are centred).
    """

    weight: Tensor
    shift: Tensor
    lost: float
    left: float
    total: float


def solve(weight: Tensor, mean: Tensor, second: Tensor, kept: Tensor, *, ridge: float) -> Solution:
    """Return the weights of the kept features that reproduce the outputs of all features best.

    Minimises ``E ||W x - V x_K - b||² + λ ||V - W_K||²`` over V and b, with λ = ridge · mean diagonal of the second
    moment of x_K. This is the reconstruction of ThiNet (Luo et al. 2017, equation 9) and channel pruning (He et al.
    2017, equation 5) with ridge regression around the old weights.

    Args:
        weight: W, float64 [outputs, features].
        mean: mean of the features; zero if the layer has no bias, float64 [features].
        second: their covariance, or second moment if the mean is zero, float64 [features, features].
        kept: features that stay, bool [features].
        ridge: weight of the penalty; 0 is the plain least-squares solution of smallest change.
    """
    old, gone = weight[:, kept], weight[:, ~kept]
    inner, cross = second[kept][:, kept], second[~kept][:, kept]
    change = gone @ _times_inverse(cross, inner, ridge)
    shift = gone @ mean[~kept] - change @ mean[kept]
    lost = _trace(gone, second[~kept][:, ~kept])
    left = lost - 2 * float((gone @ cross * change).sum()) + _trace(change, inner)
    return Solution(
        weight=old + change, shift=shift, lost=lost, left=max(left, 0.0), total=_trace(weight, second)
    )  # fmt: skip


def _times_inverse(left: Tensor, matrix: Tensor, ridge: float) -> Tensor:
    """Return ``left (matrix + λ I)⁻¹``; the pseudo-inverse if that matrix is singular."""
    size = len(matrix)
    if size == 0:
        return left
    damping = ridge * float(matrix.diagonal().mean())
    if damping > 0:
        factor, info = torch.linalg.cholesky_ex(matrix + damping * torch.eye(size).to(matrix))
        if int(info) == 0:
            solved: Tensor = torch.cholesky_solve(left.mT, factor)
            return solved.mT
    values, vectors = torch.linalg.eigh(matrix)
    floor = _CUTOFF * size * float(values[-1].clamp_min(0))
    inverse = torch.where(values > floor, 1 / values.clamp_min(floor or 1.0), 0.0)
    solution: Tensor = left @ vectors * inverse @ vectors.mT
    return solution


def _trace(weight: Tensor, second: Tensor) -> float:
    return float((weight @ second * weight).sum())
