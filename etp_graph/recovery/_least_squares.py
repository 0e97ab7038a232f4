"""Least squares of what a layer loses onto what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._moments import SplitMoments

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


def solve(weight: Tensor, moments: SplitMoments, *, ridge: float) -> Solution:
    """Return the weights of the kept features that reproduce the outputs of all features best.

    Minimises ``E ||W x - V x_K - b||² + λ ||V - W_K||²`` over V and b, with λ = ridge · mean diagonal of the second
    moment of x_K. This is the reconstruction of ThiNet (Luo et al. 2017, equation 9) and channel pruning (He et al.
    2017, equation 5) with ridge regression around the old weights.

    Args:
        weight: W, float64 [outputs, features].
        moments: of the features; covariances if the layer has a bias, else second moments and a mean of zero.
        ridge: weight of the penalty; 0 is the plain least-squares solution of smallest change.
    """
    kept, mean = moments.kept, moments.mean
    old, gone = weight[:, kept], weight[:, ~kept]
    change = gone @ _times_inverse(moments.cross, moments.inner, ridge)
    shift = gone @ mean[~kept] - change @ mean[kept]
    lost, crossed = _trace(gone, moments.outer), gone @ moments.cross
    left = lost - 2 * float((crossed * change).sum()) + _trace(change, moments.inner)
    total = _trace(old, moments.inner) + 2 * float((crossed * old).sum()) + lost
    return Solution(weight=old + change, shift=shift, lost=lost, left=max(left, 0.0), total=total)


def _times_inverse(left: Tensor, matrix: Tensor, ridge: float) -> Tensor:
    """Return ``left (matrix + λ I)⁻¹``; the pseudo-inverse if that matrix is singular.

    The matrix is changed and restored, because a copy of it may not fit into memory.
    """
    size = len(matrix)
    if size == 0:
        return left
    diagonal = matrix.diagonal()
    before, damping = diagonal.clone(), ridge * float(diagonal.mean())
    if damping > 0:
        diagonal.add_(damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        diagonal.copy_(before)
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
