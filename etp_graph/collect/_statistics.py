"""Base class of the statistics of activations, and the table of what each criterion observes.

A statistic is a running sum. It takes the activations at one watch point batch by batch and never stores them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn

from etp_graph._config import Registry
from etp_graph.errors import ScoreError

from ._watch_points import WatchPoint


class Statistic(ABC):
    """Statistic of the activations at one site.

    Attributes:
        labelled: whether it needs the label of each sample.
        backward: whether it needs the gradient of the loss. :meth:`join` is then called in place of :meth:`update`.
    """

    labelled: ClassVar[bool] = False
    backward: ClassVar[bool] = False

    def __init__(self, site: WatchPoint) -> None:
        self.site = site
        self.samples = 0

    def begin(self, module: nn.Module) -> None:  # noqa: B027  # most statistics read no weights
        """Look at the module of the site, once before its first activations; for statistics that read its weights."""

    @abstractmethod
    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """Add a batch: ``values`` [samples, positions, places...], ``labels`` int64 [samples]."""

    def join(self, values: Tensor, gradients: Tensor) -> None:
        """Add a batch of activations and the gradients of the loss by them, both [samples, positions, places...]."""
        raise NotImplementedError

    @abstractmethod
    def result(self) -> Tensor:
        """Return the statistic of each unit of the site, float64 [units]."""


Observed = type[Statistic] | Literal["gradients"]
"""What a criterion needs of batches of data: a statistic of activations, or the gradients of the weights."""

OBSERVED: Registry[Observed] = Registry("statistic", error=ScoreError)
"""What each criterion that needs data observes, by the name of the criterion."""


def needs_backward(observed: Observed | None) -> bool:
    """Return True if a criterion that observes this needs a backward pass of each batch."""
    return observed == "gradients" or (isinstance(observed, type) and observed.backward)
