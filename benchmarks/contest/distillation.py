"""Distillation from the dense network while fine-tuning, for any method: ``NAME+kd`` (Hinton et al. 2015)."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

TEMPERATURE, WEIGHT = 4.0, 0.5


class Distillation:
    """Watches the forwards of a student, and has the teacher answer the same inputs.

    Args:
        student: the network that is trained.
        teacher: the dense network; it stays as it is.
        classes: outputs are logits over their last dimension, compared as distributions at a temperature; otherwise
            they are values, compared by their squared difference.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, classes: bool) -> None:
        self.teacher, self.classes = teacher, classes
        self._loss: Tensor | None = None
        self._handle = student.register_forward_hook(self._watch, with_kwargs=True)

    def __enter__(self) -> Distillation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._handle.remove()

    def penalty(self) -> Tensor:
        """What to add to the loss of the step whose forward was the last, a scalar."""
        assert self._loss is not None, "the student has not run forward since the last step"
        loss, self._loss = self._loss, None
        return loss

    def _watch(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with torch.no_grad():
            wanted = main_output(self.teacher.eval()(*args, **kwargs))
        found = main_output(output)
        if not self.classes:
            self._loss = WEIGHT * F.mse_loss(found, wanted)
            return
        student_log = (found / TEMPERATURE).log_softmax(-1).flatten(0, -2)
        teacher_log = (wanted / TEMPERATURE).log_softmax(-1).flatten(0, -2)
        divergence = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
        self._loss = WEIGHT * TEMPERATURE**2 * divergence


def main_output(output: Any) -> Tensor:
    """The logits of a model's output, or its first tensor."""
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    return next(value for value in tree_leaves(output) if isinstance(value, Tensor))
