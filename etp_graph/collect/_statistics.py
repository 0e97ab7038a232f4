"""Statistics of activations, kept as running sums: what a collector remembers of the batches that it saw.

Each takes the activations of one :class:`etp_graph.collect._watch_points.WatchPoint`, batch by batch, and never stores
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from etp_graph.errors import ScoreError

from ._watch_points import WatchPoint


class Statistic(ABC):
    """A statistic of the activations at one site.

    Attributes:
        labelled: it needs the label of each sample.
    """

    labelled: ClassVar[bool] = False

    def __init__(self, site: WatchPoint) -> None:
        self.site = site
        self.samples = 0

    @abstractmethod
    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """Take a batch: ``values`` [samples, positions, places...], ``labels`` int64 [samples]."""

    @abstractmethod
    def result(self) -> Tensor:
        """The statistic of each unit of the site, float64 [units]."""


class Magnitudes(Statistic):
    """E |a| over samples and places."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._total: Tensor | None = None
        self._count = 0

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`."""
        total = values.abs().flatten(2).sum((0, 2), dtype=torch.float64)
        self._total = total if self._total is None else self._total + total
        self._count += values.numel() // max(values.shape[1], 1)
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        assert self._total is not None
        return self.site.average(self._total / max(self._count, 1))


class Ranks(Statistic):
    """E rank, of the map [H, W] of each channel, or of the matrix [places, width] of each unit."""

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._total: Tensor | None = None

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`. Raises :class:`ScoreError` for activations that are not finite."""
        values = values if values.dtype == torch.float64 else values.float()
        if not bool(values.isfinite().all()):
            raise ScoreError(f"hrank: activations at {self.site.module!r} are NaN or infinite: repair the model.")
        if values.ndim == 4:
            total = self.site.average(torch.linalg.matrix_rank(values).double().sum(0))
        else:
            total = values.new_zeros(len(self.site.units), dtype=torch.float64)
            for units, matrices in self.site.matrices(values):
                total[units.to(total.device)] = torch.linalg.matrix_rank(matrices).double().sum(0)
        self._total = total if self._total is None else self._total + total
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`."""
        assert self._total is not None
        return self._total / max(self.samples, 1)


class Classes(Statistic):
    """F of a one-way analysis of variance of pooled activations, from the sums of each class."""

    labelled: ClassVar[bool] = True

    def __init__(self, site: WatchPoint) -> None:
        super().__init__(site)
        self._sums = torch.zeros(0, len(site.index), dtype=torch.float64, device="cpu")
        self._squares = torch.zeros(len(site.index), dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(0, dtype=torch.float64, device="cpu")

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """See :class:`Statistic`. Raises :class:`ScoreError` for labels that do not belong to this batch."""
        if labels is None or len(labels) != len(values):
            found = "no labels" if labels is None else f"{len(labels)} labels"
            raise ScoreError(
                f"f_statistic: {len(values)} samples at {self.site.module!r} and {found}: call labels(y), of the "
                "record or of the phase, with one class number for each sample before every forward."
            )
        pooled = values.double().flatten(2).mean(2).cpu()
        labels = labels.cpu()
        missing = int(labels.max()) + 1 - len(self._counts) if len(labels) else 0
        if missing > 0:
            self._sums = torch.cat([self._sums, self._sums.new_zeros(missing, self._sums.shape[1])])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(missing)])
        self._sums.index_add_(0, labels, pooled)
        self._counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64, device="cpu"))
        self._squares += pooled.square().sum(0)
        self.samples += len(values)

    def result(self) -> Tensor:
        """See :class:`Statistic`. Raises :class:`ScoreError` with fewer than two classes, or one sample for each."""
        counts, sums = self._counts[self._counts > 0], self._sums[self._counts > 0]
        n, classes = self.samples, len(counts)
        if classes < 2 or n <= classes:
            raise ScoreError(
                f"f_statistic: {n} samples of {classes} classes; it takes two classes, and more samples than classes."
            )
        means = sums / counts.unsqueeze(1)
        between = (counts.unsqueeze(1) * (means - sums.sum(0) / n).square()).sum(0)
        within = (self._squares - (counts.unsqueeze(1) * means.square()).sum(0)).clamp_min(0)
        # Rounding leaves about eps of the squares; below that there is no variance, and 0/0 of a dead unit is 0.
        grain = torch.finfo(torch.float64).eps * self._squares.clamp_min(torch.finfo(torch.float64).tiny)
        between = torch.where(between > n * grain, between, 0.0)
        return self.site.average((between / (classes - 1)) / (within.clamp_min(n * grain) / (n - classes)))


STATISTICS: Mapping[str, type[Statistic]] = {"activation": Magnitudes, "hrank": Ranks, "f_statistic": Classes}
"""Every statistic, by the name of the criterion that reads it."""
