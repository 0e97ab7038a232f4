"""Running moments of the inputs of a layer, in float64: all that least squares needs of the batches."""

from __future__ import annotations

import torch
from torch import Tensor


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
        return bool(self.gram.isfinite().all())

    def mean_and_second(self, *, centered: bool) -> tuple[Tensor, Tensor]:
        """Return the mean [features] and the second moment [features, features].

        If ``centered``, the second moment is the covariance. Otherwise the mean is zero.
        """
        second, mean = self.gram / max(self.count, 1), self.total / max(self.count, 1)
        if not centered:
            return torch.zeros_like(mean), second
        return mean, second - torch.outer(mean, mean)
