"""F statistic of the activations of a unit between classes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from etp_graph.collect import Observations, Statistic, WatchPoint
from etp_graph.criteria._common import recorded
from etp_graph.criteria._registry import register_criterion
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan


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


@register_criterion("f_statistic", observes=Classes)
def f_statistic(model: nn.Module, plan: Plan, *, record: Observations | None = None) -> Tensor:
    """Return the F statistic of a one-way analysis of variance: between-class over within-class variance.

        F = [Σ_k n_k (μ_k − μ)² / (K − 1)] / [Σ_k Σ_{i in k} (a_i − μ_k)² / (n − K)]

    a_i is the activation of a channel in sample i, averaged over its places (pixels or tokens). A unit of several
    channels or dimensions has the mean of their F.

    Source: Fisher 1925, as the screening of features by class-conditional statistics.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.activations`, with the labels of every batch.

    Returns:
        Scores, float [plan.n_units]; zero for locked groups, whose activations are not recorded.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    return recorded("f_statistic", model, plan, record)
