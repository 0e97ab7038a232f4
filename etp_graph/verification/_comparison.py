"""Compare the outputs of two models, and say in words how they differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from etp_graph.model import failing_line
from etp_graph.plan import add_line


def as_real(tensor: Tensor) -> Tensor:
    """Convert integers and booleans to float64 and complex numbers to pairs, so that differences can be computed."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor if tensor.is_floating_point() else tensor.double()


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest |got - want| of a tensor, divided by its largest |want|, over all tensors.

    Values that are NaN in both are equal. The result is infinite if numbers or shapes of the tensors differ, or if
    values that differ are not finite.
    """
    worst = float("inf") if len(got) != len(want) or not want else 0.0
    for a, b in zip(got, want, strict=False):
        if a.shape != b.shape:
            return float("inf")
        other = _differ(a, b)
        if bool(other.any()):
            if not bool(a[other].isfinite().all() and b[other].isfinite().all()):
                return float("inf")
            scale = float(b[b.isfinite()].abs().max())
            worst = max(worst, float((a[other] - b[other]).abs().max()) / scale if scale else float("inf"))
    return worst


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Return where values differ; masked logits may be equal infinities, whose difference is NaN."""
    return (a != b) & ~(a.isnan() & b.isnan())


def count_unusable(tensors: Sequence[Tensor]) -> int:
    """Return how many values are NaN."""
    return sum(int(tensor.isnan().sum()) for tensor in tensors)


def describe_difference(got: Sequence[Tensor], want: Sequence[Tensor], error: float) -> str:
    """Say how the outputs of the pruned model differ from those of the masked one."""
    measured = f"pruned and masked model differ by {error:.1e}"
    if error != float("inf"):
        return measured
    if len(got) != len(want):
        return f"{measured}: they return {len(got)} and {len(want)} tensors"
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            return f"{measured}: output {number} has the shapes {list(a.shape)} and {list(b.shape)}"
        other = _differ(a, b)
        if bool(other.any()) and not bool(a[other].isfinite().all() and b[other].isfinite().all()):
            return f"{measured}: output {number} has NaN or infinite values in one of them only"
    return f"{measured}: the masked model returns only zeros where they differ"


def describe_failure(failure: Exception) -> str:
    """Return type, message and line of the model's code of an exception. Some exceptions have no message."""
    text = f"{failure}".strip()
    found = f"{type(failure).__name__}: {text}" if text else type(failure).__name__
    place = failing_line(failure)
    if place is None:
        return found
    line, source = place
    return add_line(f"{found} at {source!r}" if source else found, line)
