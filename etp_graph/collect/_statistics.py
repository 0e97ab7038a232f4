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
    """Statistic of the activations at one watch point.

    A subclass adds the number of samples of each batch to ``samples``. A criterion names its statistic when it is
    registered: ``register_criterion("mine", observes=MyStatistic)``.

    Args:
        site: the watch point, see :class:`WatchPoint`.

    Attributes:
        labelled: True if it needs the label of each sample.
        samples: number of samples seen; a watch point without samples is left out of the mean over watch points.
    """

    labelled: ClassVar[bool] = False

    def __init__(self, site: WatchPoint) -> None:
        self.site = site
        self.samples = 0

    @abstractmethod
    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """Add a batch.

        Args:
            values: activations, [samples, positions, places]; [samples, positions, H, W] for feature maps.
            labels: class numbers, int64 [samples]; ``None`` unless ``labelled``.
        """

    @abstractmethod
    def result(self) -> Tensor:
        """Return the statistic of each unit of the watch point, float64 [units]."""


Observed = type[Statistic] | Literal["gradients"]
"""What a criterion needs of batches of data: a statistic of activations, or the gradients of the weights."""

OBSERVED: Registry[Observed] = Registry("statistic", error=ScoreError)
"""What each criterion that needs data observes, by the name of the criterion."""
