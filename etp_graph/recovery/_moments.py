"""Running moments of the inputs of a layer, in float64: all that least squares needs of the batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 512
"""Rows of a matrix that are copied at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMoments:
    """Moments of features, some of which stay.

    Attributes:
        kept: the features that stay, bool [features].
        mean: the means of all, float64 [features].
        inner: second moment of the kept features, float64 [kept, kept].
        cross: of the removed with the kept ones, float64 [removed, kept].
        outer: of the removed features, float64 [removed, removed].
    """

    kept: Tensor
    mean: Tensor
    inner: Tensor
    cross: Tensor
    outer: Tensor


class Moments:
    """Number, sum and Gram matrix of feature vectors.

    Attributes:
        count: number of vectors.
        total: their sum, float64 [features].
        gram: Σ x xᵀ, float64 [features, features].
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, vectors: Tensor) -> None:
        """Add vectors [n, features]."""
        wide = vectors.double()
        self.count += len(wide)
        self.total += wide.sum(0)
        self.gram.addmm_(wide.mT, wide)

    @property
    def finite(self) -> bool:
        """Return False if a vector held NaN or an infinity."""
        return bool(self.gram.diagonal().isfinite().all())  # a square of each number is in it

    def split(self, kept: Tensor, *, centered: bool) -> SplitMoments:
        """Return the moments of the features that stay, bool [features], and of the others.

        If ``centered``, the second moments are covariances. Otherwise the means are zero.
        """
        stay, gone = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        mean = self.total / max(self.count, 1)

        def second(rows: Tensor, columns: Tensor) -> Tensor:
            found = self.gram.new_empty(len(rows), len(columns))
            for part, some in zip(found.split(_ROWS), rows.split(_ROWS), strict=True):  # to save memory
                torch.index_select(self.gram[some], 1, columns, out=part)
                part.div_(max(self.count, 1))
                if centered:
                    part.sub_(torch.outer(mean[some], mean[columns]))
            return found

        return SplitMoments(
            kept=kept, mean=mean if centered else torch.zeros_like(mean), inner=second(stay, stay),
            cross=second(gone, stay), outer=second(gone, gone),
        )  # fmt: skip

    def release(self) -> None:
        """Free the Gram matrix. The moments cannot be used any more."""
        self.gram = self.gram.new_zeros(0, 0)
