"""Every architecture of segmentation-models-pytorch, with small encoders of three kinds."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from ._common import first_that_runs, square_images

PACKAGE = "segmentation-models-pytorch"
_ENCODERS = ("resnet18", "mobilenet_v2", "mit_b0")


def names() -> list[str]:
    """Return ``ARCHITECTURE/ENCODER``."""
    if find_spec("segmentation_models_pytorch") is None:
        return []
    smp = import_module("segmentation_models_pytorch")

    return [f"{architecture}/{encoder}" for architecture in smp.MODEL_ARCHITECTURES_MAPPING for encoder in _ENCODERS]


def family(name: str) -> str:
    """Return the family of the page."""
    return "segmentation-models-pytorch"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model without pretrained weights. DPT takes encoders of timm alone."""
    smp = import_module("segmentation_models_pytorch")

    architecture, _, encoder = name.partition("/")
    encoder = "tu-vit_tiny_patch16_224" if architecture == "dpt" else encoder

    def make() -> nn.Module:
        model: nn.Module = smp.create_model(architecture, encoder_name=encoder, encoder_weights=None, classes=3)
        return model

    return first_that_runs([make], lambda model: square_images([64, 128, 224], batch=2))
