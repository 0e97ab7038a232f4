"""Base class of the statistics of activations, and the table of what each criterion observes.

A statistic is a running sum. It takes the activations at one watch point batch by batch and never stores them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from etp_graph._config import Registry
from etp_graph.errors import ScoreError

from ._watch_points import WatchPoint


class Statistic(ABC):
    """Statistic of the activations at one site.

    Attributes:
        labelled: whether it needs the label of each sample.
    """

    labelled: ClassVar[bool] = False

    def __init__(self, site: WatchPoint) -> None:
        self.site = site
        self.samples = 0

    @abstractmethod
    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """Add a batch: ``values`` [samples, positions, places...], ``labels`` int64 [samples]."""

    @abstractmethod
    def result(self) -> Tensor:
        """Return the statistic of each unit of the site, float64 [units]."""


Observed = type[Statistic] | Literal["gradients"]
"""What a criterion needs of batches of data: a statistic of activations, or the gradients of the weights."""

OBSERVED: Registry[Observed] = Registry("statistic", error=ScoreError)
"""What each criterion that needs data observes, by the name of the criterion."""
