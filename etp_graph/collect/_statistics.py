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
        of_experts: whether it takes what each expert of a layer adds to each token, [tokens, experts, 1], NaN where the
            router sends a token to other experts. Units of other kinds are then not seen.
    """

    labelled: ClassVar[bool] = False
    of_experts: ClassVar[bool] = False

    def __init__(self, site: WatchPoint) -> None:
        self.site = site
        self.samples = 0

    def begin(self, module: nn.Module) -> None:  # noqa: B027  # most statistics read no weights
        """Look at the module of the site, once before its first activations; for statistics that read its weights."""

    @abstractmethod
    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """Add a batch: ``values`` [samples, positions, places...], ``labels`` int64 [samples]."""

    @abstractmethod
    def result(self) -> Tensor:
        """Return the statistic of each unit of the site, float64 [units]."""


class BackwardStatistic(Statistic):
    """Statistic of activations and of the gradients of the loss by them. Each batch needs a backward."""

    def update(self, values: Tensor, labels: Tensor | None) -> None:
        """Do nothing: activations alone do not tell how the loss changes."""

    @abstractmethod
    def join(self, values: Tensor, gradients: Tensor) -> None:
        """Add a batch of activations and the gradients of the loss by them, both [samples, positions, places...]."""


class RunningMean:
    """Mean of a tensor over batches of different sizes, in float64."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, total: Tensor, count: int) -> None:
        """Add the sum over ``count`` items."""
        self._total = total.double() if self._total is None else self._total + total
        self._count += count

    @property
    def value(self) -> Tensor:
        """The mean of all items that were added; there is at least one batch."""
        assert self._total is not None
        return self._total / max(self._count, 1)


Observed = type[Statistic] | Literal["gradients"]
"""What a criterion needs of batches of data: a statistic of activations, or the gradients of the weights."""

OBSERVED: Registry[Observed] = Registry("statistic", error=ScoreError)
"""What each criterion that needs data observes, by the name of the criterion."""


def needs_backward(observed: Observed | None) -> bool:
    """Return True if a criterion that observes this needs a backward pass of each batch."""
    return observed == "gradients" or (isinstance(observed, type) and issubclass(observed, BackwardStatistic))
