"""Copies of a model for trials: in another precision, with random weights, whole or masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from etp_graph.model import copy_model, named_tensors, plain_forward
from etp_graph.plan import Plan, Positions
from etp_graph.standins import standing_in

from ._masked import Masked
from ._sampling import RandomValues


class Copy:
    """Copy of a model in one precision, of which each run gets a copy on the same memory.

    With random weights the masked model needs no memory of its own: its units are set to zero here, and the weights are
    written again before they are needed.

    Args:
        model: the model.
        dtype: the precision.
        seed: seed of the random weights; ``None``: those of the model.
        copied: what makes the copy in a precision, with memory of its own, if not the whole model is copied.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, seed: int | None, copied: Callable[[torch.dtype], nn.Module] | None
    ) -> None:
        with plain_forward(model):
            self._model = copied(dtype) if copied else _copy_in(model, dtype, filled=seed is None)
        self._model.requires_grad_(True)
        self._values = None if seed is None else RandomValues(seed)
        self._intact = True
        if self._values is not None:
            self._values.write_(self._model)

    def draw(self, seed: int) -> None:
        """Write the random values of another seed, unless the model has its own weights."""
        if self._values is not None and seed != self._values.seed:
            self._values.seed, self._intact = seed, True
            self._values.write_(self._model)

    @property
    def model(self) -> nn.Module:
        """The copy, with all of its weights."""
        if not self._intact and self._values is not None:
            self._values.write_(self._model, parameters_only=True)
        self._intact = True
        return self._model

    def run_copy(self) -> nn.Module:
        """Return a copy on the same memory, for one run, because a model may keep what it computes."""
        return copy_model(self.model, share=True)

    @contextmanager
    def masked(self, plan: Plan, keep: Tensor) -> Iterator[nn.Module]:
        """Run a copy inside whose removed units are zero. Other copies lose the weights of these units, too."""
        masked = self.run_copy()
        if self._values is None:
            _give_own_memory(masked, plan)
        else:
            self._intact = False
        with Masked(masked, plan, keep, finite=self._values is not None), standing_in(masked, views_only=True):
            yield masked


def _copy_in(model: nn.Module, dtype: torch.dtype, *, filled: bool) -> nn.Module:
    """Return a copy of a model in another precision.

    Args:
        model: the model.
        dtype: of all floating-point tensors, also of those that modules keep as plain attributes (what an earlier
            forward computed).
        filled: whether floating-point parameters get the values of the model; otherwise they have any values.
    """
    made = copy_model(model, share=True)
    for parameter in made.parameters():
        if type(parameter) is nn.Parameter:
            target = dtype if parameter.is_floating_point() else parameter.dtype
            if filled or not parameter.is_floating_point():
                parameter.data = parameter.data.to(target, copy=True)
            else:
                parameter.data = torch.empty_like(parameter.data, dtype=target)
    for module in made.to(dtype).modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.to(dtype)
    return made


def _give_own_memory(model: nn.Module, plan: Plan) -> None:
    """Give the parameters that units slice memory of their own, in a copy that shares it with another model."""
    tensors = dict(named_tensors(model))
    for name in Positions(plan).axes:
        if isinstance(tensors[name], nn.Parameter):
            tensors[name].data = tensors[name].data.clone()
