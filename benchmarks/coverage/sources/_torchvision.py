"""Detection, segmentation, video and optical flow of torchvision. Its classifiers stand in the registry."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ._common import first_that_runs, square_images

PACKAGE = "torchvision"
_PARTS = ("detection", "segmentation", "video", "optical_flow")


def names() -> list[str]:
    """Return ``PART/MODEL`` for every model of these parts."""
    if find_spec("torchvision") is None:
        return []
    from torchvision import models

    return [f"{part}/{name}" for part in _PARTS for name in models.list_models(module=getattr(models, part))]


def family(name: str) -> str:
    """Return the family of the page."""
    return f"torchvision, {name.partition('/')[0].replace('_', ' ')}"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model with small inputs of its part."""
    from torchvision import models

    part, _, short = name.partition("/")
    options: dict[str, Any] = {"weights": None}
    if part in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if part == "detection" and not short.startswith("ssd"):
        options |= {"min_size": 96, "max_size": 128}
    return first_that_runs([lambda: models.get_model(short, **options)], lambda model: _inputs(part))


def _inputs(part: str) -> list[Any]:
    """Return inputs to try: lists of images, images, clips, pairs of frames."""
    if part == "detection":
        return [([torch.rand(3, 96, 128)],)]
    if part == "segmentation":
        return square_images([96])
    if part == "video":
        return [torch.randn(1, 3, 8, 64, 64), torch.randn(1, 3, 16, 64, 64), torch.randn(1, 3, 16, 224, 224)]
    return [(torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))]
