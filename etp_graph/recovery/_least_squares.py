"""Least squares of what a layer loses onto what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._moments import SplitMoments

_ROWS = 128
"""Outputs that are solved at once."""

_CUTOFF = 1e-12
"""Eigenvalues below this share of the largest one count as zero, where nothing else makes the problem well posed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """New weights of the kept features.

    Attributes:
        weight: [outputs, kept], in the element type of the old one.
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
    2017, equation 5) with ridge regression around the old weights. The outputs are solved some at a time, to save
    memory.

    Args:
        weight: W [outputs, features].
        moments: of the features; covariances if the layer has a bias, else second moments and a mean of zero.
        ridge: weight of the penalty; 0 is the plain least-squares solution of smallest change.
    """
    kept, mean = moments.kept, moments.mean
    inverse = _Inverse(moments.inner, ridge)
    found, shift = weight.new_empty(len(weight), int(kept.sum())), list[Tensor]()
    lost = left = total = 0.0
    for rows, part in zip(weight.split(_ROWS), found.split(_ROWS), strict=True):
        old, gone = rows[:, kept].double(), rows[:, ~kept].double()
        crossed = gone @ moments.cross
        change = inverse.times(crossed)
        shift.append(gone @ mean[~kept] - change @ mean[kept])
        part_lost, both = _trace(gone, moments.outer), float((crossed * change).sum())
        lost += part_lost
        left += part_lost - both - inverse.damping * float(change.square().sum())  # as (inner + λ) change = crossed
        total += _trace(old, moments.inner) + 2 * float((crossed * old).sum()) + part_lost
        part.copy_(old + change)
    return Solution(weight=found, shift=torch.cat(shift), lost=lost, left=max(left, 0.0), total=total)


class _Inverse:
    """Inverse of ``matrix + λ I``; the pseudo-inverse of ``matrix`` if that is singular or λ is zero.

    Attributes:
        damping: λ; zero for the pseudo-inverse.
    """

    def __init__(self, matrix: Tensor, ridge: float) -> None:
        self.damping = ridge * float(matrix.diagonal().mean()) if len(matrix) else 0.0
        self._factor: Tensor | None = None
        self._pseudo: Tensor = matrix
        if self.damping > 0:
            self._factor = _damped_factor(matrix, self.damping)
        if self._factor is None:
            self.damping = 0.0
            values, vectors = torch.linalg.eigh(matrix)
            floor = _CUTOFF * len(matrix) * float(values[-1].clamp_min(0)) if len(matrix) else 0.0
            inverse = torch.where(values > floor, 1 / values.clamp_min(floor or 1.0), 0.0)
            self._pseudo = vectors * inverse @ vectors.mT

    def times(self, left: Tensor) -> Tensor:
        """Return ``left`` times the inverse."""
        if self._factor is None:
            return left @ self._pseudo
        solved: Tensor = torch.cholesky_solve(left.mT, self._factor)
        return solved.mT


def _damped_factor(matrix: Tensor, damping: float) -> Tensor | None:
    """Return the Cholesky factor of ``matrix + λ I``, or ``None`` if it has none.

    The diagonal is changed and restored, because a copy of the matrix may not fit into memory.
    """
    diagonal = matrix.diagonal()
    before = diagonal.clone()
    diagonal.add_(damping)
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal.copy_(before)
    return factor if int(info) == 0 else None


def _trace(weight: Tensor, second: Tensor) -> float:
    return float((weight @ second * weight).sum())
